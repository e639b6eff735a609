"""What is said of the data before the first step."""

import pytest
import torch
from data_folders import SIZE, encoded, opened, tokenizer, write_folder, write_pair
from PIL import Image

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.encode import encode


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_of_pictures_it_says_counts_lengths_sizes_and_what_was_skipped(tmp_path, words):
    write_folder(tmp_path / "data", 6, width=11, height=5)
    write_pair(tmp_path / "data", "long", 7, text="red bird " * 9)
    write_pair(tmp_path / "data", "empty", 7, text="")
    write_pair(tmp_path / "data", "broken", 7, text="a")
    (tmp_path / "data" / "broken.png").write_bytes(b"")
    (tmp_path / "data" / "bare.png").write_bytes(encoded(3))
    source = opened(tmp_path / "data", words, text_seq_len=12, truncate=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    text = source.report(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "out" / "data.txt").read_text() == text
    lengths = sorted(len(words.encode(line)) for line in lines_of(source))
    assert text.splitlines() == [
        "9 samples to train on, 0 held out; 9 looked at",
        "captions a sample: 1 to 3",
        f"tokens a caption: least {lengths[0]}, median {lengths[10]}, 90 % {lengths[17]}, 99 % {lengths[19]}, "
        f"most {lengths[19]}",
        "of 20 captions 1 (5.0%) are cut at text_seq_len=12",
        "pictures: short sides 5 to 8 pixels, most often 11 x 5 (6); 6 are smaller than 8 and get enlarged",
        "skipped: 1 x broken picture",
        "skipped: 1 x empty caption",
        "skipped: 1 x picture without a caption",
    ]
    with Image.open(tmp_path / "out" / "batch.png") as sheet:
        assert sheet.size == (4 * 128, 2 * (128 + 36))


def lines_of(source):
    lines = []
    for index in range(len(source.samples)):
        if "empty" not in source.samples.name(index):
            lines += source.samples.captions(index)
    return lines


def test_the_picture_is_the_first_batch_with_its_captions_below(tmp_path, words):
    write_folder(tmp_path / "data", 1)
    options = {"resize": "none", "flip": False, "first_caption": 1.0, "word_dropout": 0.0, "bpe_dropout": 0.0}
    opened(tmp_path / "data", words, **options).report(tmp_path / "captioned")
    opened(tmp_path / "data", **options).report(tmp_path / "bare")
    with (
        Image.open(tmp_path / "captioned" / "batch.png") as with_text,
        Image.open(tmp_path / "bare" / "batch.png") as bare,
    ):
        original = Image.open(tmp_path / "data" / "deeper" / "000.png").resize((128, 128), Image.Resampling.NEAREST)
        assert with_text.crop((0, 0, 128, 128)).tobytes() == original.tobytes()
        text = with_text.crop((0, 128, 128, 164)).convert("L")
        assert text.getextrema()[0] < 64
        assert bare.crop((0, 128, 128, 164)).convert("L").getextrema() == (255, 255)


def test_a_caption_that_is_too_long_is_found_before_the_training(tmp_path, words):
    write_folder(tmp_path / "data", 30)
    write_pair(tmp_path / "data", "long", 7, text="red bird\n" + "red bird " * 20)
    source = opened(tmp_path / "data", words, first_caption=1.0)
    with pytest.raises(ValueError, match=r"long\.png: a caption must fit text_seq_len=24, got"):
        source.report(tmp_path / "out")


@pytest.mark.parametrize("vae_is_there", [True, False])
def test_of_codes_it_says_how_they_are_used(tmp_path, words, vae_is_there):
    write_folder(tmp_path / "data", 4)
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=SIZE, num_tokens=12, codebook_dim=5, num_layers=1, hidden_dim=6)
    vae.save_pretrained(tmp_path / "vae")
    encode(str(tmp_path / "data"), tmp_path / "vae", tmp_path / "codes")
    if not vae_is_there:
        (tmp_path / "vae").rename(tmp_path / "gone")
    source = opened(tmp_path / "codes", words, need={"text", "codes"})
    codes = torch.stack([source.samples.codes(index) for index in range(4)])
    text = source.report(tmp_path / "out")
    used = codes.unique()
    top = codes.flatten().bincount().argmax().item()
    assert f"codes used: {len(used)}, unused: {12 - len(used)}, perplexity" in text
    assert f"most frequent: {top} {(codes == top).double().mean():.1%}" in text
    assert "codes: 16 a picture out of 12, from" in text
    with Image.open(tmp_path / "out" / "batch.png") as sheet:
        assert sheet.size == (4 * 128, 2 * (128 + 36))
