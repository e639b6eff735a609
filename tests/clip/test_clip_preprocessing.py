"""Pictures and texts as OpenAI's CLIP reads them."""

import numpy as np
import pytest
import torch
from clip_twins import openai_module
from PIL import Image

from dalle_fast.clip import ClipTokenizer, preprocess, tokenize
from dalle_fast.clip.preprocessing import MEAN, STD, centre, resized_sides
from dalle_fast.tokenizers import find_clip_merges


def picture(width, height, mode="RGB"):
    levels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def levels_of(pixels):
    """Normalised pixels [..., 3, S, S] as levels 0..255, unrounded."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (pixels.double() * std + mean) * 255


# --- pictures


@pytest.mark.parametrize("sides", [(64, 64), (64, 48), (48, 66), (200, 150), (32, 32), (20, 25), (7, 7)])
def test_pil_pictures_are_those_of_hugging_face_s_pil_processor(sides):
    processing = pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip", reason="transformers has no PIL processor"
    )
    processor = processing.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(picture(*sides), return_tensors="pt")["pixel_values"][0]
    got = preprocess(picture(*sides), 32)
    assert got.shape == (3, 32, 32) and got.dtype == torch.float32
    assert torch.equal(levels_of(got).round(), levels_of(expected).round())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_pictures_become_rgb_at_the_end(mode):
    given = picture(40, 50, mode)
    resized = given.resize((32, 40), Image.Resampling.BICUBIC).crop((0, 4, 32, 36)).convert("RGB")
    assert torch.equal(
        levels_of(preprocess(given, 32)).round().byte(), torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    )


def test_sides_are_cut_and_the_centre_goes_to_even_numbers():
    assert resized_sides(50, 99, 32) == (32, 63) and resized_sides(99, 50, 32) == (63, 32)
    assert resized_sides(32, 32, 32) == (32, 32)
    assert [centre(32 + n, 32, 32)[0] for n in range(6)] == [0, 0, 1, 2, 2, 2]


def test_several_pictures_and_one_are_the_same():
    several = preprocess([picture(40, 50), picture(64, 32)], 32)
    assert torch.equal(several[1], preprocess(picture(64, 32), 32)) and several.shape == (2, 3, 32, 32)
    assert preprocess([], 32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("sides", [(64, 64), (96, 70), (16, 16), (33, 40)])
def test_tensors_are_pil_s_pictures_without_its_roundings(sides):
    given = picture(*sides)
    pixels = torch.from_numpy(np.array(given)).permute(2, 0, 1) / 255
    from_pil, from_tensor = (levels_of(preprocess(one, 32)) for one in (given, pixels))
    # PIL rounds to half a level twice, and the second filter's weights add up, signs aside, to less than 1.4
    assert (from_tensor - from_pil).abs().max() < 0.5 * 1.4 + 0.5
    assert levels_of(preprocess(pixels, 32)).amin() > -1e-3 and levels_of(preprocess(pixels, 32)).amax() < 255.001


def test_a_tensor_of_the_right_size_is_only_normalised():
    pixels = torch.rand(3, 32, 32)
    expected = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(preprocess(pixels, 32), expected)
    assert torch.equal(preprocess(pixels.half(), 32), preprocess(pixels.half().float(), 32))
    assert preprocess(pixels.double(), 32).dtype == torch.float64
    grey = preprocess(pixels[:1], 32, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(grey, pixels[:1].expand(3, -1, -1))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_is_resized_alone_as_in_a_batch(threads, restored_threads):
    torch.set_num_threads(threads)
    pixels = torch.rand(5, 3, 50, 64)
    batch = preprocess(pixels, 32)
    assert all(torch.equal(preprocess(one, 32), row) for one, row in zip(pixels, batch, strict=True))
    assert preprocess(pixels[:0], 32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "pixels must be floating, got torch.uint8. Divide"),
        (torch.zeros(4, 8, 8), ValueError, r"with 1 or 3 channels, got \[4, 8, 8\]"),
        (torch.zeros(8, 8), ValueError, r"got \[8, 8\]"),
        (torch.full((3, 8, 8), 1.5), ValueError, r"pixels must be in 0\.\.1, got 1.5\.\.1.5"),
        (torch.full((3, 8, 8), float("nan")), ValueError, r"pixels must be in 0\.\.1, got nan"),
        ("a.png", TypeError, "got str. Open a file"),
        ([1, 2], TypeError, "must be PIL pictures or a tensor"),
    ],
)
def test_other_things_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        preprocess(given, 32)


# --- texts


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return ClipTokenizer(find_clip_merges())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_ids_are_openai_s(tokenizer):
    pytest.importorskip("regex", reason="clip-anytorch's tokenizer needs regex")
    theirs = openai_module("simple_tokenizer").SimpleTokenizer()
    texts = ["A red  apple", "it's 2 o'clock\n& &amp; ümläut", "", "<|startoftext|> x", "🍎 apple", "a" * 40]
    rows = tokenizer.tokenize(texts)
    start, end = theirs.encoder["<|startoftext|>"], theirs.encoder["<|endoftext|>"]
    for text, row in zip(texts, rows.tolist(), strict=True):
        ids = [start, *theirs.encode(text), end]
        assert row == ids + [0] * (77 - len(ids))
    assert torch.equal(tokenize(texts[0]), rows[:1])


def test_a_text_too_long_is_refused_or_cut_before_its_end_token(tokenizer):
    with pytest.raises(ValueError, match="must have at most 8 tokens, start and end included, got 12 in 'a a a"):
        tokenizer.tokenize("a " * 10, 8)
    (row,) = tokenizer.tokenize(["a " * 10], 8, truncate=True)
    assert row[0] == 49406 and row[-1] == 49407 and row[-2] == row[1]
    with pytest.raises(TypeError, match="a text must be a str, got int"):
        tokenizer.tokenize([3])
