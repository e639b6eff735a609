"""Codes that are given: of a picture's first rows, or of what a mask leaves; pictures of any size and kind."""

import pytest
import torch
from PIL import Image
from small_models import small_dalle

from dalle_fast.jobs.known import inpainted_codes, primed_codes


@pytest.fixture(scope="module")
def model():
    return small_dalle(torch.float32)


def levels(height=16, width=16, seed=0):
    """uint8 [height, width, 3]"""
    return torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def saved(path, picture, **options):
    Image.fromarray(picture.numpy()).save(path, **options)
    return path


def all_codes(model, picture):
    return model.vae.get_codebook_indices(picture.permute(2, 0, 1)[None].float() / 255)[0]


@pytest.fixture
def image(tmp_path):
    return saved(tmp_path / "picture.png", levels())


def test_priming_keeps_the_first_rows(model, image):
    codes = all_codes(model, levels())
    assert codes.unique().numel() > 3  # else a wrong picture would do
    known = primed_codes(model, image, 3)
    assert known.dtype == torch.int64 and torch.equal(known[:24], codes[:24]) and (known[24:] == -1).all()


def test_without_rows_priming_keeps_what_generate_images_would(model, image):
    pixels = levels().permute(2, 0, 1)[None].float() / 255
    text = torch.ones(1, 5, dtype=torch.long)
    drawn = [
        model.generate_images(text, seed=1, return_tokens=True, **given)[1]
        for given in ({"img": pixels}, {"known_tokens": primed_codes(model, image, None)[None]})
    ]
    assert torch.equal(*drawn)
    assert int((primed_codes(model, image, None) >= 0).sum()) == 28


def test_the_middle_square_of_a_picture_counts(model, image, tmp_path):
    square = primed_codes(model, image, 7)
    for name, height, width in (("wide", 16, 40), ("high", 31, 16)):
        picture = levels(height, width, seed=1)
        top, left = (height - 16) // 2, (width - 16) // 2
        picture[top : top + 16, left : left + 16] = levels()
        assert torch.equal(primed_codes(model, saved(tmp_path / f"{name}.png", picture), 7), square)


@pytest.mark.parametrize("side", [1, 5, 16, 50, 300])
def test_pictures_of_any_size_are_resized(model, tmp_path, side):
    plain = torch.tensor([200, 30, 90], dtype=torch.uint8)
    expected = all_codes(model, plain.expand(16, 16, 3))
    path = saved(tmp_path / "plain.png", plain.repeat(side, side + 3, 1))
    assert torch.equal(primed_codes(model, path, 7)[:56], expected[:56])


def test_pictures_of_any_kind_are_read(model, tmp_path):
    grey = levels()[..., :1].expand(-1, -1, 3).contiguous()
    expected = all_codes(model, grey)[:56]
    Image.fromarray(grey.numpy()).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(grey.numpy()).convert("L").quantize(256).save(tmp_path / "palette.gif")
    turned = Image.Exif()
    turned[0x0112] = 3  # stored upside down
    flipped = Image.fromarray(grey.flip(0, 1).contiguous().numpy())
    flipped.save(tmp_path / "turned.png", exif=turned)
    for name in ("grey.png", "palette.gif", "turned.png"):
        assert torch.equal(primed_codes(model, tmp_path / name, 7)[:56], expected), name
    seen = Image.fromarray(levels().numpy()).convert("RGBA")
    seen.putalpha(0)
    seen.save(tmp_path / "clear.png")
    white = all_codes(model, torch.full((16, 16, 3), 255, dtype=torch.uint8))[:56]
    assert torch.equal(primed_codes(model, tmp_path / "clear.png", 7)[:56], white)


def test_a_vae_of_one_channel_reads_grey(tmp_path):
    from dalle_fast.models.dalle import DALLE
    from dalle_fast.models.dvae import DiscreteVAE

    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=30, codebook_dim=8, num_layers=1, hidden_dim=8, channels=1)
    model = DALLE(dim=16, vae=vae, num_text_tokens=20, text_seq_len=5, depth=1, heads=1, dim_head=16).eval()
    grey = levels()[..., 0]
    codes = vae.get_codebook_indices(grey[None, None].float() / 255)[0]
    assert torch.equal(primed_codes(model, saved(tmp_path / "grey.png", grey), 4)[:32], codes[:32])


def mask_of(path, *pixels, size=(16, 16), value=255):
    mask = torch.zeros(size, dtype=torch.uint8)
    for y, x in pixels:
        mask[y, x] = value
    return saved(path, mask)


@pytest.mark.parametrize("value", [128, 255])
def test_a_code_is_drawn_anew_where_one_pixel_of_its_cell_is_white(model, image, tmp_path, value):
    codes = all_codes(model, levels())
    pixels = [(0, 0), (5, 9), (15, 15)]
    known = inpainted_codes(model, image, mask_of(tmp_path / "mask.png", *pixels, value=value))
    anew = [y // 2 * 8 + x // 2 for y, x in pixels]
    assert (known < 0).nonzero().flatten().tolist() == anew
    assert torch.equal(known[known >= 0], codes[known >= 0])


def test_a_thin_line_of_a_large_mask_is_not_lost(model, tmp_path):
    picture = saved(tmp_path / "large.png", levels(640, 960))
    line = [(y, 160 + 81) for y in range(640)]  # 160 at the left are cropped
    known = inpainted_codes(model, picture, mask_of(tmp_path / "mask.png", *line, size=(640, 960)))
    assert (known < 0).nonzero().flatten().tolist() == [row * 8 + 1 for row in range(8)]


@pytest.mark.parametrize("rows", [0, 8, -1])
def test_rows_out_of_range_are_refused(model, image, rows):
    with pytest.raises(ValueError, match=rf"prime_rows must be in 1..7, of 8 rows of codes, got {rows}"):
        primed_codes(model, image, rows)


def test_files_that_are_no_pictures_are_refused_by_name(model, image, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = saved(tmp_path / "whole.png", levels(200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.png").mkdir()
    for name in ("text", "empty", "cut", "folder", "missing"):
        path = tmp_path / f"{name}.png"
        message = f"must be an image file that can be read, got {path}"
        with pytest.raises(ValueError, match=f"the picture to go on from {message}"):
            primed_codes(model, path, None)
        with pytest.raises(ValueError, match=f"the picture to paint in {message}"):
            inpainted_codes(model, path, image)
        with pytest.raises(ValueError, match=f"the mask {message}"):
            inpainted_codes(model, image, path)


def test_masks_that_do_not_fit_are_refused(model, image, tmp_path):
    with pytest.raises(ValueError, match=r"as large as its picture, 16 x 16 pixels, got 17 x 16 in .*other.png"):
        inpainted_codes(model, image, mask_of(tmp_path / "other.png", size=(16, 17)))
    with pytest.raises(ValueError, match=r"must be white where .* got none of it in .*dark.png"):
        inpainted_codes(model, image, mask_of(tmp_path / "dark.png", (3, 3), value=127))
