"""The bits of pixels and scores depend on their own codes, text and picture alone: not on batch, order or threads."""

import threading

import pytest
import torch
from tolerance import assert_within_budget

from dalle_fast.models.alone import each_alone, in_float32
from dalle_fast.models.clip import CLIP
from dalle_fast.models.dvae import DiscreteVAE

# (arguments of the VAE, side of the grid of codes): maps of even and odd sides, widths on and off every vector.
VAES = {
    "blocks": ({"image_size": 64, "codebook_dim": 64, "num_resnet_blocks": 1}, 5),
    "wide": ({"image_size": 64, "codebook_dim": 512, "num_layers": 2}, 8),
    "odd": ({"image_size": 16, "codebook_dim": 7, "num_layers": 2, "hidden_dim": 5, "num_resnet_blocks": 2}, 3),
}
CLIP_SIZES = {
    "dim_text": 72,
    "dim_image": 136,
    "dim_latent": 33,
    "num_text_tokens": 50,
    "text_enc_depth": 1,
    "text_seq_len": 20,
    "text_heads": 1,
    "visual_enc_depth": 1,
    "visual_heads": 2,
    "visual_image_size": 40,
    "visual_patch_size": 8,
}
COUNTS = (1, 2, 3, 4)  # threads


@pytest.fixture
def threads():
    """Sets the number of threads while the test runs."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def vae_and_codes(name, dtype=torch.float32, batch=5):
    sizes, side = VAES[name]
    torch.manual_seed(0)
    vae = DiscreteVAE(num_tokens=20, **sizes).to(dtype)
    return vae, torch.randint(20, (batch, side * side), generator=torch.Generator().manual_seed(1))


def clip_and_pairs(dtype=torch.float32, batch=5):
    torch.manual_seed(0)
    text = torch.randint(1, 50, (batch, 19), generator=torch.Generator().manual_seed(1))
    return CLIP(**CLIP_SIZES).to(dtype), text, torch.rand(batch, 3, 40, 40).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_a_picture_has_the_same_bits_alone_in_any_batch_and_order_on_any_number_of_threads(name, dtype, threads):
    vae, codes = vae_and_codes(name, dtype)
    threads(1)
    expected = vae.decode(codes)
    order = torch.tensor([3, 0, 4, 4, 1])
    for n_threads in COUNTS:
        threads(n_threads)
        assert torch.equal(vae.decode(codes), expected)
        assert torch.equal(vae.decode(codes[order]), expected[order])
        assert torch.equal(vae.decode(codes[2:3]), expected[2:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_score_has_the_same_bits_alone_in_any_batch_and_order_on_any_number_of_threads(dtype, threads, attention):
    clip, text, image = clip_and_pairs(dtype)
    mask = torch.arange(19) < torch.tensor([19, 3, 7, 19, 1])[:, None]
    threads(1)
    expected, masked, one_text = clip(text, image), clip(text, image, text_mask=mask), clip(text[:1], image)
    order = torch.tensor([3, 0, 4, 4, 1])
    for n_threads in COUNTS:
        threads(n_threads)
        assert torch.equal(clip(text[order], image[order]), expected[order])
        assert torch.equal(clip(text[2:3], image[2:3]), expected[2:3])
        assert torch.equal(clip(text, image, text_mask=mask)[1:3], masked[1:3])
        assert torch.equal(clip(text[:1].expand(5, -1), image), one_text)
        assert torch.equal(clip(text, image[:1])[:1], expected[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_and_scores_are_those_of_the_whole_batch_within_the_budget(dtype):
    """The oracle is the batch through the modules as they stand."""
    vae, codes = vae_and_codes("blocks", dtype, batch=2)
    clip, text, image = clip_and_pairs(dtype, batch=2)

    def pictures():
        return vae.decoder(vae.codebook(codes).unflatten(1, (5, 5)).permute(0, 3, 1, 2))

    def scores(pixels):
        return (clip._text_latents(text, None) * clip._image_latents(pixels)).sum(-1) * clip.temperature.exp()

    with torch.no_grad():
        got, own = (vae.decode(codes), clip(text, image)), (pictures(), scores(image))
        vae.double(), clip.double()
        exact = pictures(), scores(image.double())
    for what, *results in zip(("pixels", "scores"), got, exact, own, strict=True):
        assert_within_budget(*results, what)


@torch.no_grad()
def test_a_text_that_comes_again_is_read_once():
    clip, text, image = clip_and_pairs()
    read = []
    clip.text_emb.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    clip(text[[0, 1, 0, 0, 1]], image)
    assert len(read) == 2
    assert torch.equal(torch.cat(sorted(read, key=lambda row: row.tolist())), text[:2].unique(dim=0))
    read.clear()
    text[1], mask = text[0], torch.ones(5, 19, dtype=torch.bool)
    mask[1, 4:] = False  # the same text, another mask
    clip(text[[0, 1, 0, 0, 1]], image, text_mask=mask[[0, 1, 0, 0, 1]])
    assert len(read) == 2


def test_gradients_of_pixels_and_scores_reach_the_weights_in_their_own_dtype():
    for dtype in (torch.float64, torch.bfloat16):
        vae, codes = vae_and_codes("odd", dtype)
        clip, text, image = clip_and_pairs(dtype)
        for module, result in ((vae.decoder, vae.decode(codes)), (clip, clip(text[:1], image))):
            result.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.any() for p in module.parameters())
    with torch.inference_mode():
        assert vae.decode(codes).is_inference()


def test_rows_run_on_one_thread_each_and_see_the_modes_of_the_caller(threads):
    def row(i):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return torch.tensor(i)

    threads(3)
    for grad in (True, False):
        seen = []
        with torch.set_grad_enabled(grad), torch.autocast("cpu"):
            assert torch.stack(each_alone(row, 5)).tolist() == [0, 1, 2, 3, 4]
        assert seen == [(1, grad, True)] * 5
    assert each_alone(row, 0) == []
    assert torch.get_num_threads() == 3


def test_an_error_in_a_row_is_raised_and_the_threads_are_given_back(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        each_alone(lambda i: torch.tensor(1 // (i - 1)), 4)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == 2 and seen == [2]


def test_the_twin_in_float32_shares_hooks_and_leaves_the_module_as_it_is():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2).bfloat16(), torch.nn.Linear(2, 2).double())
    seen = []
    module[0].register_forward_hook(lambda *_: seen.append(1))
    twin = in_float32(module)
    assert [p.dtype for p in twin.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert twin[1].weight is module[1].weight
    twin[0](torch.ones(1, 3))
    assert seen == [1]
    assert module[0].weight.dtype == torch.bfloat16
