"""One test for each defect of dalle_pytorch 1.6.6 that is mended here; each fails on the original.

The rows are those of docs/upstream.md. Every docstring says what the original does. B15 (ids 40407 and 49407 in
`SimpleTokenizer.decode`) is in test_tokenizers.py, which has a vocabulary to decode with.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dalle_fast import CLIP, DALLE, DiscreteVAE

VAE = {"image_size": 32, "num_tokens": 40, "codebook_dim": 16, "num_layers": 2, "hidden_dim": 8}
SIZES = {"dim": 48, "num_text_tokens": 60, "text_seq_len": 12, "depth": 2, "heads": 2, "dim_head": 24}
SPARSE = ["axial_row", "axial_col", "conv_like"]
GREEDY = {"filter_thres": 0.9999}


def make_dalle(vae: DiscreteVAE | None = None, **changes: object) -> DALLE:
    """A model in which every path matters: LayerScale is 0.5, norms and biases are not at their start values."""
    torch.manual_seed(0)
    dalle = DALLE(vae=vae or DiscreteVAE(**VAE), **{**SIZES, **changes})
    with torch.no_grad():
        for name, parameter in dalle.named_parameters():
            if name.endswith(".scale"):
                parameter.fill_(0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return dalle.eval()


def batch(size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 60, (size, 12), generator=generator)
    return text, torch.randint(0, 40, (size, 64), generator=generator)


def drawn_codes(dalle: DALLE, text: Tensor, monkeypatch: pytest.MonkeyPatch, **arguments: object) -> Tensor:
    """What `generate_images` hands to the VAE, which the original shows too."""
    handed: list[Tensor] = []
    decode = dalle.vae.decode
    with monkeypatch.context() as patch:
        patch.setattr(dalle.vae, "decode", lambda codes: (handed.append(codes), decode(codes))[1])
        dalle.generate_images(text, **GREEDY, **arguments)
    return torch.cat(handed)


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal up to float32's rounding of logits of order 1; the defects are off by 0.1 and more."""
    return bool(torch.allclose(got, wanted, atol=1e-4, rtol=1e-4))


# --- B1 to B5: conditioning and caches -------------------------------------------------------------------------------


@torch.no_grad()
def test_b1_null_conditioning_leaves_the_text_alone() -> None:
    """The original multiplies the caller's text by the mask in place."""
    dalle = make_dalle()
    text, codes = batch()
    dalle(text, codes, null_cond_prob=1.0)
    dalle.generate_images(text, cond_scale=3.0, **GREEDY)
    assert torch.equal(text, batch()[0])


@torch.no_grad()
def test_b2_the_cache_is_used_without_guidance() -> None:
    """The original drops the cache where cond_scale is 1: it stays empty and every step reads the whole sequence."""
    dalle = make_dalle()
    text, codes = batch()
    cache: dict = {}
    dalle.forward_with_cond_scale(text, codes[:, :5], cond_scale=1, cache=cache)
    assert cache
    step = dalle.forward_with_cond_scale(text, codes[:, :6], cond_scale=1, cache=cache)
    assert step.shape[1] == 1
    assert close(step[:, -1], dalle(text, codes[:, :6])[:, -1])


@torch.no_grad()
def test_b3_guidance_with_a_cache_equals_guidance_without() -> None:
    """The original runs the null branch on the keys and values of the conditional one."""
    dalle = make_dalle(attn_types=("full",))
    text, codes = batch()
    cache: dict = {}
    for n in range(12):
        cached = dalle.forward_with_cond_scale(text.clone(), codes[:, :n], cond_scale=3.0, cache=cache)[:, -1]
        uncached = dalle.forward_with_cond_scale(text.clone(), codes[:, :n], cond_scale=3.0)[:, -1]
        assert close(cached, uncached), n


@pytest.mark.parametrize("attn_type", SPARSE)
@torch.no_grad()
def test_b4_every_sparse_layer_has_a_cache_of_its_own(attn_type: str) -> None:
    """The original keeps the activations of all sparse layers in one slot."""
    dalle = make_dalle(attn_types=(attn_type,), shift_tokens=False)
    text, codes = batch()
    cache: dict = {}
    for n in range(12):
        assert close(dalle(text, codes[:, :n], cache=cache)[:, -1], dalle(text, codes[:, :n])[:, -1]), n


@torch.no_grad()
def test_b5_a_primed_cache_shifts_what_it_remembers_once() -> None:
    """The original fills its queue with values that are shifted already, and shifts them again."""
    dalle = make_dalle(attn_types=("full",), shift_tokens=True)
    text, codes = batch()
    cache: dict = {}
    for n in range(5, 20):
        assert close(dalle(text, codes[:, :n], cache=cache)[:, -1], dalle(text, codes[:, :n])[:, -1]), n


# --- B6: texts -------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer without a `.tokenizer` inside."""

    def encode(self, text: str) -> list[int]:
        return [1 + "abcdefgh".index(letter) for letter in text]

    def decode(self, ids: Tensor, pad_tokens: set[int] = frozenset()) -> str:
        return " ".join(str(int(i)) for i in ids if int(i) not in pad_tokens)


@torch.no_grad()
def test_b6_texts_go_on_as_the_model_was_trained() -> None:
    """The original leaves out `<bos>` and the token shift, needs a GPU and an object with `.tokenizer`."""
    dalle = make_dalle()
    tokens, texts = dalle.generate_texts(Letters(), "abc", **GREEDY)
    assert tokens.shape == (1, 12) and len(texts) == 1
    assert tokens[0, :3].tolist() == [1, 2, 3]
    text = torch.tensor([[1, 2, 3] + [0] * 9])
    for i in range(3, 12):
        wanted = dalle(text)[
            0, i
        ].argmax()  # a full text: `<bos>` in front, shifted; the padding behind is not seen yet
        assert tokens[0, i] == wanted, i
        text[0, i] = wanted


# --- B7 to B12: precision, reversible layers, input ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_b7_half_precision_keeps_the_angles(dtype: torch.dtype) -> None:
    """The original rounds its table of angles, which reach 8192 radians, with the weights."""
    there_and_back = make_dalle().to(dtype).float()
    rounded = make_dalle()
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(dtype))
    text, codes = batch()
    assert torch.equal(there_and_back(text, codes), rounded(text, codes))


def test_b8_reversible_layers_go_backward_in_evaluation_mode() -> None:
    """The original restores a random state that only training records: TypeError."""
    text, codes = batch()
    gradients = []
    for training in (True, False):
        dalle = make_dalle(reversible=True).train(training)
        dalle(text, codes, return_loss=True).backward()
        gradients.append([p.grad for p in dalle.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_b9_a_loss_of_part_of_an_image() -> None:
    """The original compares logits and labels of different length: an obscure error of the cross entropy."""
    dalle = make_dalle()
    text, codes = batch()
    logits = dalle(text, codes[:, :10])[:, :22]  # positions 0..11 predict text, 12..21 the ten codes
    labels = torch.cat((text, codes[:, :10] + dalle.num_text_tokens), dim=1)
    in_text, in_image = (
        torch.nn.functional.cross_entropy(logits[:, part].flatten(0, 1), labels[:, part].flatten())
        for part in (slice(0, 12), slice(12, 22))
    )
    assert close(dalle(text, codes[:, :10], return_loss=True), (in_text + 7 * in_image) / 8)


@torch.no_grad()
def test_b9_more_codes_than_fit() -> None:
    """The original fails somewhere inside, on shapes that say nothing."""
    text, codes = batch()
    with pytest.raises(ValueError, match=r"at most 64.*got \[2, 80\]"):
        make_dalle()(text, torch.cat((codes, codes[:, :16]), dim=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_b9_ids_of_other_integer_types(dtype: torch.dtype) -> None:
    """The original's embedding refuses int16. int32, which it takes on a recent torch, is here too."""
    dalle = make_dalle()
    text, codes = batch()
    wanted = dalle(text, codes, return_loss=True)
    assert torch.equal(dalle(text.to(dtype), codes.to(dtype), return_loss=True), wanted)


@torch.no_grad()
def test_b9_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original reads an empty batch of images as no image and drops their positions; its sampling then fails."""
    dalle = make_dalle()
    text, codes = batch()
    assert dalle(text[:0], codes[:0]).shape == (0, 76, dalle.total_tokens)
    assert drawn_codes(dalle, text[:0], monkeypatch).shape == (0, 64)


@pytest.mark.parametrize("attn_type", ["full", *SPARSE])
@torch.no_grad()
def test_b10_one_attention_type_as_a_string(attn_type: str) -> None:
    """The original reads the string letter by letter: 'attention type "f" is not valid'."""
    text, codes = batch()
    assert torch.equal(make_dalle(attn_types=attn_type)(text, codes), make_dalle(attn_types=(attn_type,))(text, codes))


def test_b11_an_error_while_drawing_leaves_the_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original leaves the model in evaluation mode."""
    dalle = make_dalle().train()
    dalle.vae.eval()
    flags = {name: module.training for name, module in dalle.named_modules()}

    def fail(codes: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dalle.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        dalle.generate_images(batch()[0], **GREEDY)
    assert {name: module.training for name, module in dalle.named_modules()} == flags


@pytest.mark.parametrize("attn_type", SPARSE)
@pytest.mark.parametrize("heads", [1, 2])
def test_b12_sparse_layers_without_rotary(attn_type: str, heads: int) -> None:
    """The original multiplies a view in place where heads or batch are 1: RuntimeError in the backward pass."""
    dalle = make_dalle(attn_types=(attn_type,), rotary_emb=False, heads=heads)
    text, codes = batch()
    alone = dalle(text[:1], codes[:1])
    alone.clamp(min=-50).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dalle.transformer.parameters())
    assert close(alone[0], dalle(text, codes)[0])


# --- B12a: VAE and CLIP ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_b12a_a_vae_without_normalization() -> None:
    """The original iterates over None: TypeError."""
    vae = DiscreteVAE(**VAE, normalization=None)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(vae.norm(images), images)
    same = DiscreteVAE(**VAE, normalization=((0.0,) * 3, (1.0,) * 3))
    same.load_state_dict(vae.state_dict())
    assert torch.equal(vae(images, return_logits=True), same(images, return_logits=True))


@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_b12a_priming_with_other_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original refuses every priming image that has not 3 channels, whatever the VAE has."""
    normalization = ((0.5,) * channels, (0.5,) * channels)
    dalle = make_dalle(DiscreteVAE(**VAE, channels=channels, normalization=normalization))
    images = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(2))
    codes = drawn_codes(dalle, batch()[0], monkeypatch, img=images, num_init_img_tokens=20)
    assert torch.equal(codes[:, :20], dalle.vae.get_codebook_indices(images)[:, :20])


def test_b12a_a_masked_text_row_is_an_error() -> None:
    """The original divides by zero and returns NaN."""
    clip = CLIP(
        dim_text=16,
        dim_image=16,
        dim_latent=8,
        num_text_tokens=60,
        text_enc_depth=1,
        text_seq_len=12,
        text_heads=1,
        visual_enc_depth=1,
        visual_heads=1,
        visual_image_size=32,
        visual_patch_size=8,
    )
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="text_mask must keep a token in every row, got none in row 1"):
        clip(batch()[0], torch.rand(2, 3, 32, 32), text_mask=mask)


# --- B14, B15: import and tokenizer ----------------------------------------------------------------------------------


def test_b14_import_needs_no_pkg_resources() -> None:
    """The original imports pkg_resources, which setuptools no longer brings."""
    code = "import sys; sys.modules['pkg_resources'] = None; from dalle_fast import DALLE; print(DALLE.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "DALLE", done.stderr


# --- B16: the trainers ------------------------------------------------------------------------------------------------


def test_b16_the_temperature_is_a_function_of_the_step() -> None:
    """The original's falls below its exp(-rate * step), each factor multiplied to those before."""
    from dalle_fast.training.config import resolve
    from dalle_fast.training.schedules import ramp

    config = resolve("vae", preset="upstream", overrides=["data.source=pictures"])
    for step in (0, 1000, 20_000, 693_147):
        assert ramp(config.temperature, step) == pytest.approx(math.exp(-1e-6 * step), rel=1e-6)
    assert ramp(config.temperature, 10**7) == 0.5


def test_b16_padding_dilutes_no_text_loss() -> None:
    """The original's mean is over all positions: a longer text_seq_len makes it smaller, whatever the caption says."""
    from dalle_fast.training.tasks.dalle import token_losses

    dalle = make_dalle()
    text, codes = batch()
    text[:, 3:] = 0
    mean, _, counted = token_losses(dalle, text, codes, codes, padding_loss="first")
    logits = dalle(text, codes)
    ends = torch.tensor([[60 + 3], [60 + 3]])
    wanted = torch.cat((text[:, :3], ends), dim=1)
    each = torch.nn.functional.cross_entropy(logits[:, :4].flatten(0, 1), wanted.flatten())
    assert counted == 8 and mean.item() == pytest.approx(each.item(), rel=1e-5)
