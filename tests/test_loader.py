"""TextImageDataset: which files belong together, what a pair holds, and that broken files end in a sentence."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dalle_fast.loader import TextImageDataset
from dalle_fast.training.data.pictures import random_square


class Lengths:
    """A tokenizer whose ids are the lengths of the words."""

    def tokenize(self, texts, context_length=256, truncate_text=False):
        ids = [len(word) for word in texts.split()]
        if len(ids) > context_length and not truncate_text:
            raise ValueError(f"tokenize: got {len(ids)} tokens.")
        row = torch.zeros(1, context_length, dtype=torch.long)
        row[0, : len(ids)] = torch.tensor(ids[:context_length])
        return row


def save_picture(path, width=20, height=14, mode="RGB", color=None):
    """A picture whose red grows to the right and green to the bottom, or of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None].round()
    pixels[..., 1] = np.linspace(0, 255, height)[:, None].round()
    picture = Image.fromarray(pixels).convert(mode) if color is None else Image.new(mode, (width, height), color)
    picture.save(path)


def save_pair(folder, name, caption="a red bird", suffix=".png", **picture):
    save_picture(folder / f"{name}{suffix}", **picture)
    (folder / f"{name}.txt").write_text(caption)


def dataset(folder, **options):
    return TextImageDataset(folder, **{"text_len": 8, "image_size": 16, "tokenizer": Lengths(), **options})


def test_a_pair_is_ids_and_a_square_picture(tmp_path):
    save_pair(tmp_path, "bird")
    ids, picture = dataset(tmp_path)[0]
    assert ids.tolist() == [1, 3, 4, 0, 0, 0, 0, 0] and ids.dtype == torch.long
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1
    assert picture.is_contiguous()


def test_pictures_and_texts_match_by_name_across_folders(tmp_path):
    save_pair(tmp_path / "a", "same", caption="in a", color="red")
    save_pair(tmp_path / "b", "same", caption="in the b", color="blue")
    save_picture(tmp_path / "pictures" / "deep" / "apart.jpeg", color="white")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "apart.txt").write_text("lives in another folder")
    save_picture(tmp_path / "no text.png")
    (tmp_path / "no picture.txt").write_text("alone")
    save_pair(tmp_path, "upper", suffix=".PNG", color="white", caption="one")
    pairs = dataset(tmp_path)
    assert pairs.keys == ["a/same", "b/same", "pictures/deep/apart", "upper"]
    found = {key: pairs[i] for i, key in enumerate(pairs.keys)}
    assert found["a/same"][0][:2].tolist() == [2, 1] and found["a/same"][1][0].min() == 1
    assert found["b/same"][0][:3].tolist() == [2, 3, 1] and found["b/same"][1][2].min() == 1
    assert found["pictures/deep/apart"][0][:4].tolist() == [5, 2, 7, 6]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
@pytest.mark.parametrize("transparent", [False, True])
def test_every_picture_mode_becomes_three_or_four_channels(tmp_path, mode, transparent):
    save_pair(tmp_path, "picture", mode=mode, color=1 if mode == "1" else "white")
    picture = dataset(tmp_path, transparent=transparent)[0][1]
    assert torch.equal(picture, torch.ones(4 if transparent else 3, 16, 16))


def test_one_caption_a_line_each_is_drawn_and_blank_lines_are_none(tmp_path):
    save_pair(tmp_path, "bird", caption="one\n\n  \ntwo words\r\nthree words here\n")
    pairs = dataset(tmp_path)
    lengths = [int((pairs[0][0] > 0).sum()) for _ in range(60)]
    assert set(lengths) == {1, 2, 3}  # one of them missed by chance: 3 * (2 / 3) ** 60 < 1e-10


def test_torch_seed_repeats_captions_and_crops(tmp_path):
    save_pair(tmp_path, "bird", caption="\n".join("word " * i for i in range(1, 8)))
    pairs = dataset(tmp_path, resize_ratio=0.2)

    def draw(seed):
        torch.manual_seed(seed)
        return [pairs[0] for _ in range(4)]

    first, again, other = draw(3), draw(3), draw(4)
    for (ids, picture), (same_ids, same_picture) in zip(first, again, strict=True):
        assert torch.equal(ids, same_ids) and torch.equal(picture, same_picture)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))


def test_workers_of_a_data_loader_draw_repeatably_and_differently(tmp_path):
    for name in ("a", "b"):
        save_pair(tmp_path, name)
    pairs = dataset(tmp_path, resize_ratio=0.1)

    def read():
        loader = DataLoader(pairs, batch_size=1, num_workers=2, generator=torch.Generator().manual_seed(5))
        return torch.cat([pictures for _, pictures in loader])

    first = read()
    assert torch.equal(first, read())
    assert not torch.equal(first[0], first[1])  # the same picture, cropped by two workers


@pytest.mark.parametrize("size", [(20, 14), (14, 20), (9, 9), (40, 3), (3, 40), (1, 1)])
def test_crops_are_squares_inside_of_the_asked_share(size):
    width, height = size
    corners = set()
    for _ in range(300):
        left, top, side = random_square(width, height, 0.5)
        assert 0 <= left <= width - side and 0 <= top <= height - side and side >= 1
        oblong = min(size) < round(math.sqrt(width * height * 0.5))
        if oblong:
            assert (left, top, side) == ((width - side) // 2, (height - side) // 2, min(size))
        else:
            assert round(math.sqrt(width * height * 0.5)) <= side <= min(size)
        corners.add((left, top))
    if size in ((20, 14), (14, 20)):
        assert {0} < {left for left, _ in corners} and {0} < {top for _, top in corners}


def test_crop_of_the_whole_picture_keeps_its_pixels(tmp_path):
    save_pair(tmp_path, "bird", width=16, height=16)
    picture = dataset(tmp_path, resize_ratio=1.0)[0][1]
    expected = np.array(Image.open(tmp_path / "bird.png"))
    assert np.array_equal((picture * 255).round().byte().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_broken_pairs_are_named_once_and_replaced(tmp_path, caplog, shuffle):
    save_pair(tmp_path, "a")
    whole = (tmp_path / "a.png").read_bytes()
    for name, data in {"b": b"no picture", "c": whole[: len(whole) // 2], "d": b""}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        (tmp_path / f"{name}.txt").write_text("broken")
    save_pair(tmp_path, "e", caption=" \n\n")
    save_pair(tmp_path, "f")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\xff")
    save_pair(tmp_path, "g", caption="the good one", color="red")
    pairs = dataset(tmp_path, shuffle=shuffle)
    with caplog.at_level(logging.WARNING, logger="dalle_fast.loader"):
        for _ in range(3):
            for index in range(1, 6):
                ids = pairs[index][0][:3].tolist()
                assert ids in ([3, 4, 3], [1, 3, 4]) if shuffle else ids == [3, 4, 3]
    named = [message for message in caplog.messages if message.startswith("skipped")]
    assert len(named) == 5
    for name in "bcdef":
        assert sum(f"{name}.png" in message for message in named) == 1
    assert "holds no caption" in next(message for message in named if "e.png" in message)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_folder_of_broken_files_ends_in_a_sentence(tmp_path, shuffle):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"no picture")
        (tmp_path / f"{name}.txt").write_text("caption")
    pairs = dataset(tmp_path, shuffle=shuffle)
    assert len(pairs) == 3
    with pytest.raises(ValueError, match="got 3 unusable pairs"):
        pairs[1]


def test_a_caption_too_long_names_its_file(tmp_path):
    save_pair(tmp_path, "bird", caption="word " * 9)
    with pytest.raises(ValueError, match=r"bird\.txt does not fit.*got 9 tokens.*truncate_captions=True"):
        dataset(tmp_path)[0]
    assert dataset(tmp_path, truncate_captions=True)[0][0].tolist() == [4] * 8


def test_wrong_arguments_are_sentences(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder, found none at"):
        dataset(tmp_path / "absent")
    (tmp_path / "alone.txt").write_text("no picture")
    with pytest.raises(ValueError, match="got 1 files and no such pair"):
        dataset(tmp_path)
    save_pair(tmp_path, "bird")
    for options, message in (
        ({"resize_ratio": 0}, r"resize_ratio must be in \(0, 1\], got 0"),
        ({"resize_ratio": 1.5}, "got 1.5"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"text_len": 0}, "text_len and image_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset(tmp_path, **options)
    pairs = dataset(tmp_path)
    for index in (1, -2):
        with pytest.raises(IndexError, match=rf"0\.\.0, got {index}"):
            pairs[index]
    assert torch.equal(pairs[-1][0], pairs[0][0])


def test_without_a_tokenizer_it_is_clips(tmp_path):
    from dalle_fast.tokenizer import tokenizer

    save_pair(tmp_path, "bird")
    assert TextImageDataset(tmp_path).tokenizer is tokenizer
