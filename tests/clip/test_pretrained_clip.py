"""PretrainedCLIP by itself: what a feature depends on, 16 bits, saving, and a sentence for every wrong argument."""

import pytest
import torch
from clip_twins import CONTEXT, END, SIDE, VOCABULARY, pictures, shaken, texts

from dalle_fast.clip import PretrainedCLIP
from dalle_fast.clip import towers as towers_module
from dalle_fast.models.saving import Pretrained

SIZES = {
    "embed_dim": 16, "image_size": SIDE, "patch_size": 8, "vision_width": 64, "vision_layers": 2, "vision_heads": 4,
    "context_length": CONTEXT, "vocab_size": VOCABULARY, "text_width": 64, "text_layers": 2, "text_hidden": 80,
}  # fmt: skip


def small(**changes):
    torch.manual_seed(1)
    return shaken(PretrainedCLIP(**SIZES | changes))


@pytest.fixture(scope="module")
def model():
    return small()


# --- what a feature depends on


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_features_and_logits_are_equal_alone_and_in_a_batch(model, threads, restored_threads):
    torch.set_num_threads(threads)
    images, ids = pictures(5), texts()
    image_features, text_features = model.encode_image(images), model.encode_text(ids)
    per_image, per_text = model(images, ids)
    assert torch.equal(per_image.t(), per_text) and per_image.shape == (5, 4)
    torch.set_num_threads(1)
    for i, image in enumerate(images):
        assert torch.equal(model.encode_image(image[None])[0], image_features[i])
        for j, text in enumerate(ids):
            assert torch.equal(model(image[None], text[None])[0][0, 0], per_image[i, j])
    for j, text in enumerate(ids):
        assert torch.equal(model.encode_text(text[None])[0], text_features[j])


@torch.no_grad()
def test_a_text_is_read_up_to_its_end_token(model):
    ids = texts()
    other, cut = ids.clone(), ids[1:2, :7]
    other[0, 3:], other[1, 7:] = 5, 9  # smaller ids than the end token's
    assert torch.equal(model.encode_text(ids), model.encode_text(other))
    assert torch.equal(model.encode_text(cut)[0], model.encode_text(ids)[1])
    other[0, 1] += 1
    assert not torch.equal(model.encode_text(ids)[0], model.encode_text(other)[0])


@torch.no_grad()
def test_an_end_token_of_its_own(model):
    own = small(end_token=END)
    assert torch.equal(own.encode_text(texts()), model.encode_text(texts()))


def test_equal_texts_are_read_once(model, monkeypatch):
    read = []
    forward = type(model.text_tower).forward
    monkeypatch.setattr(
        type(model.text_tower), "forward", lambda self, ids, ends: read.append(ids) or forward(self, ids, ends)
    )
    with torch.no_grad():
        features = model.encode_text(texts()[[0, 1, 0, 0]])
    assert len(read) == 2 and torch.equal(features[0], features[3])


def test_attention_is_our_op_causal_for_texts_alone(model, monkeypatch):
    asked = []
    attend = towers_module.sparse_attention
    monkeypatch.setattr(
        towers_module,
        "sparse_attention",
        lambda q, k, v, *, pattern: asked.append(pattern) or attend(q, k, v, pattern=pattern),
    )
    with torch.no_grad():
        model(pictures(1), texts()[:1])
    assert [pattern.name for pattern in asked] == ["bidirectional"] * 2 + ["full"] * 2


def test_training_mode_computes_the_batch_together(model):
    model.train()
    try:
        together = model(pictures(), texts())[0]
        together.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        model.eval()
        model.zero_grad()
    alone = model(pictures(), texts())[0]
    torch.testing.assert_close(together, alone)
    alone.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_an_empty_batch(model):
    assert model.encode_image(pictures()[:0]).shape == model.encode_text(texts()[:0]).shape == (0, 16)
    per_image, per_text = model(pictures()[:0], texts())
    assert per_image.shape == (0, 4) and per_text.shape == (4, 0)


# --- dtypes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_compute_in_float32(dtype):
    half = small().to(dtype)
    wide = small().to(dtype).float()
    assert torch.equal(half(pictures(), texts())[0], wide(pictures(), texts())[0])
    assert half.encode_text(texts()).dtype == half.encode_image(pictures()).dtype == torch.float32
    assert half.text_tower.pos_emb.dtype == dtype


@torch.no_grad()
def test_float64_is_float64():
    exact, own = small().double(), small()
    features = exact.encode_image(pictures().double())
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), own.encode_image(pictures()))


# --- saving


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_it_saves_and_loads_as_every_model_here(tmp_path, quick_gelu):
    model = small(quick_gelu=quick_gelu, image_mean=[0.5, 0.25, 0.5])
    model.save_pretrained(tmp_path, dtype=torch.float16)
    again = Pretrained.from_pretrained(tmp_path)
    assert type(again) is PretrainedCLIP and again.config == model.config and again.image_mean == (0.5, 0.25, 0.5)
    rounded = small(quick_gelu=quick_gelu).half().float()
    with torch.no_grad():
        assert torch.equal(again(pictures(), texts())[0], rounded(pictures(), texts())[0])
    state = torch.random.get_rng_state()
    PretrainedCLIP.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- wrong arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size must divide image_size=32, got 5"),
        ({"patch_size": 64}, "patch_size must divide image_size=32, got 64"),
        ({"vision_heads": 5}, "vision_heads must divide vision_width=64, got 5"),
        ({"text_width": 80}, "text_heads must divide text_width=80, got a head for every 64"),
        ({"image_std": [1.0]}, "must be three numbers each"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainedCLIP(**SIZES | changes)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "image must be floating, got torch.uint8"),
        (torch.zeros(1, 3, 32, 31), ValueError, r"image must be \[B, 3, 32, 32\], got \[1, 3, 32, 31\]"),
        (torch.zeros(3, 32, 32), ValueError, "image must be"),
    ],
)
def test_wrong_images_are_refused(model, image, error, message):
    with pytest.raises(error, match=message):
        model.encode_image(image)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.zeros(1, 5), TypeError, "text must be ids of int64 or int32, got torch.float32"),
        (torch.zeros(5, dtype=torch.long), ValueError, r"text must be \[B, n\]"),
        (torch.zeros(1, 17, dtype=torch.long), ValueError, "1 <= n <= context_length=16"),
        (torch.full((1, 5), 60), ValueError, r"text ids must be in 0\.\.59, got 60"),
        (torch.full((1, 5), -1), ValueError, r"text ids must be in 0\.\.59, got -1"),
    ],
)
def test_wrong_texts_are_refused(model, text, error, message):
    with pytest.raises(error, match=message):
        model.encode_text(text)
