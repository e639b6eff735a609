"""Pictures become pixels: each way of resizing takes the squares that it says, and draws nothing else."""

import io

import numpy as np
import pytest
import torch
from data_folders import encoded, picture
from PIL import Image

from dalle_fast.training.data.pictures import Pixels, random_square, turned_and_shifted
from dalle_fast.training.order import generator


def ramp(width, height):
    """A file whose red is the column and green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return file_of(Image.fromarray(pixels))


def file_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer


def corner(pixels):
    """Column, row and distance between pixels of what was taken out of `ramp`, where nothing was resized much."""
    return int(pixels[0, 0, 0]), int(pixels[1, 0, 0]), float(pixels[0, 0, -1]) - float(pixels[0, 0, 0])


def drawn(pixels, file, n=60):
    return [pixels(file, generator(0, position)) for position in range(n)]


def test_upstream_takes_the_square_that_the_generator_draws():
    file = ramp(40, 30)
    pixels = Pixels(8, resize="upstream", smallest_crop=0.3)
    for position in range(20):
        left, top, side = random_square(40, 30, 0.3, generator(0, position))
        expected = Image.open(file).crop((left, top, left + side, top + side)).resize((8, 8), Image.Resampling.BILINEAR)
        got = pixels(file, generator(0, position))
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.array(expected))


def test_upstream_matches_torchvision_where_the_square_is_the_same():
    """With smallest_crop 1 the square is the middle one, as Resize and CenterCrop of the original's dVAE trainer."""
    got = Pixels(8, resize="upstream", smallest_crop=1.0)(ramp(40, 30), generator(0, 0))
    expected = Image.open(ramp(40, 30)).crop((5, 0, 35, 30)).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), np.array(expected))


def test_paper_for_the_dvae_takes_any_square_and_resizes_to_9_to_12_eighths():
    corners = [corner(picture) for picture in drawn(Pixels(16, resize="paper"), ramp(100, 40), 200)]
    # A square of 40 becomes one of 18 to 24, so 16 of its pixels span 15 x 40 / 24 .. 15 x 40 / 18 columns.
    assert all(15 * 40 / 24 - 2 <= span <= 15 * 40 / 18 + 2 for _, _, span in corners)
    assert min(span for *_, span in corners) < 27 and max(span for *_, span in corners) > 31
    assert min(left for left, *_ in corners) < 5 and max(left for left, *_ in corners) > 60
    assert min(top for _, top, _ in corners) < 3


def test_paper_for_the_transformer_stays_near_the_middle():
    corners = [corner(picture) for picture in drawn(Pixels(16, resize="paper", captioned=True), ramp(100, 40), 200)]
    # Within 3/8 .. 5/8 of the slack of 60, then within 18 - 16 of 18 pixels.
    assert all(22 <= left <= 38 + 6 for left, *_ in corners)
    assert all(15 * 40 / 18 - 2 <= span <= 15 * 40 / 16 + 2 for *_, span in corners)
    assert len({left for left, *_ in corners}) > 10


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (16, 40), (17, 16), (5, 9), (1, 1), (300, 16)])
def test_paper_takes_pictures_of_any_size(size, captioned):
    for got in drawn(Pixels(16, resize="paper", captioned=captioned), file_of(picture(1, *size)), 5):
        assert got.shape == (3, 16, 16)


def test_none_keeps_a_picture_of_the_size_and_averages_a_larger_one():
    exact = picture(3, 16, 16)
    assert np.array_equal(Pixels(16)(file_of(exact), generator(0, 0)).permute(1, 2, 0).numpy(), np.array(exact))
    wide = picture(3, 48, 32)
    means = np.array(wide)[:, 8:40].reshape(16, 2, 16, 2, 3).mean((1, 3))
    got = Pixels(16)(file_of(wide), generator(0, 0)).permute(1, 2, 0).numpy()
    # Pillow averages rows, rounds, then averages columns and rounds.
    assert np.abs(got - means).max() <= 1
    assert Pixels(16)(file_of(picture(3, 5, 7)), None).shape == (3, 16, 16)


def test_without_a_generator_nothing_is_drawn():
    options = {"resize": "upstream", "flip": True, "augment": "emoji"}
    file = file_of(picture(3, 20, 30))
    assert torch.equal(Pixels(8, **options)(file, None), Pixels(8)(file, None))


def test_half_are_mirrored():
    file = file_of(picture(3, 8, 8))
    plain = Pixels(8)(file, None)
    mirrored = [torch.equal(got, plain.flip(2)) for got in drawn(Pixels(8, flip=True), file, 200)]
    assert abs(sum(mirrored) - 100) < 5 * 50**0.5
    assert all(torch.equal(got, plain) for got in drawn(Pixels(8), file, 3))


def test_the_emoji_are_turned_and_shifted_with_white_borders():
    pixels = torch.randint(0, 250, (3, 8, 8), dtype=torch.uint8)
    turned = {
        tuple(picture.flatten().tolist())
        for rows in (pixels, pixels.flip(1))
        for columns in (rows, rows.flip(2))
        for picture in (columns, columns.transpose(1, 2))
    }
    assert len(turned) == 8
    seen, shifted = set(), 0
    for position in range(300):
        got = turned_and_shifted(pixels, generator(0, position))
        assert got.shape == pixels.shape and got.dtype == torch.uint8
        if tuple(got.flatten().tolist()) in turned:
            seen.add(tuple(got.flatten().tolist()))
        else:
            shifted += 1
            assert (got == 255).any()
    assert seen == turned
    assert abs(shifted - 150 * 48 / 49) < 5 * 75**0.5


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P", "1"])
def test_every_mode_becomes_the_channels_asked_for(channels, mode, kind):
    original = picture(4).convert(kind)
    got = Pixels(8, channels)(file_of(original), None)
    assert got.shape == (channels, 8, 8)
    assert np.array_equal(got.permute(1, 2, 0).squeeze(2).numpy(), np.array(original.convert(mode)))


def test_two_channels_are_a_sentence():
    with pytest.raises(ValueError, match="channels must be 1, 3 or 4, got 2"):
        Pixels(8, 2)


def test_jpeg_is_read():
    assert Pixels(8)(io.BytesIO(encoded(1, "jpeg")), None).shape == (3, 8, 8)
