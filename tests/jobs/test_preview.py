"""Previews: what is drawn so far, grey elsewhere; early, as often as asked for, and never in the way."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import saved_model

from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.preview import Preview
from dalle_fast.sampling.gallery import to_pixels

GREY = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DrawingModel.read(saved_model(tmp_path_factory.mktemp("saved") / "model"))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "preview.png"


def random_codes(batch, seed=0):
    return torch.randint(30, (batch, 64), generator=torch.Generator().manual_seed(seed))


def sheet_of(path):
    """[H, W, 3]"""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).long()


def picture(sheet, number, columns):
    """The 16 x 16 pixels of a picture, [16, 16, 3]."""
    top, left = number // columns * 20 + 2, number % columns * 20 + 2
    return sheet[top : top + 16, left : left + 16]


def decoded(model, codes):
    """[B, 16, 16, 3]"""
    with torch.no_grad():
        pixels = to_pixels(model.dalle.vae, model.dalle.vae.decode(codes.clamp(min=0)))
    return (pixels * 255).round().long().permute(0, 2, 3, 1)


@pytest.mark.parametrize(("batch", "columns", "rows"), [(1, 1, 1), (3, 2, 2), (16, 4, 4), (64, 4, 4)])
def test_the_last_sheet_shows_whole_pictures(model, out, batch, columns, rows):
    codes, preview = random_codes(batch), Preview(out, model, every=100)
    for start in range(0, 64, 8):
        preview(start, codes[:, start : start + 8])
    sheet, expected = sheet_of(out), decoded(model, codes[:16])
    assert sheet.shape == (rows * 20, columns * 20, 3)
    for number in range(min(batch, 16)):
        assert torch.equal(picture(sheet, number, columns), expected[number])
    assert (sheet[0] == 255).all()
    if batch == 3:
        assert (picture(sheet, 3, columns) == 255).all()


def test_rows_that_are_not_drawn_are_grey(model, out):
    codes, preview = random_codes(4), Preview(out, model, every=1)
    for row in range(8):
        preview(8 * row, codes[:, 8 * row : 8 * row + 8])
        so_far = codes.clone()
        so_far[:, 8 * row + 8 :] = -1
        sheet, expected = sheet_of(out), decoded(model, so_far)
        for number in range(4):
            shown, drawn = picture(sheet, number, 2), 2 * (row + 1)
            assert torch.equal(shown[:drawn], expected[number, :drawn])
            assert (shown[drawn:] == GREY).all()


@pytest.mark.parametrize(("every", "rows"), [(1, range(1, 9)), (3, (1, 3, 6, 8)), (4, (1, 4, 8)), (50, (1, 8))])
def test_the_first_row_makes_a_sheet_then_every_so_many(model, out, every, rows):
    codes, preview, written = random_codes(2), Preview(out, model, every), []
    for row in range(1, 9):
        preview(8 * row - 8, codes[:, 8 * row - 8 : 8 * row])
        if out.exists():
            written.append(row)
            out.unlink()
    assert written == list(rows)


def test_samples_of_other_micro_batches_stay_as_they_are(model, out):
    codes, preview = random_codes(4), Preview(out, model, every=1)
    for samples in ([0, 3], [1, 2]):
        for start in range(0, 64, 8):
            row = torch.full((4, 8), -1)
            row[samples] = codes[samples, start : start + 8]
            preview(start, row)
        sheet, expected = sheet_of(out), decoded(model, codes)
        for number in range(4):
            shown = picture(sheet, number, 2)
            done = number in samples or samples == [1, 2]
            assert torch.equal(shown, expected[number]) if done else (shown == GREY).all()


def test_the_next_batch_begins_anew(model, out):
    preview = Preview(out, model, every=1)
    for seed in range(2):
        codes = random_codes(1, seed)
        for start in range(0, 64, 8):
            preview(start, codes[:, start : start + 8])
            assert (picture(sheet_of(out), 0, 1)[start // 4 + 2 :] == GREY).all()
        assert torch.equal(picture(sheet_of(out), 0, 1), decoded(model, codes)[0])
    preview(0, random_codes(3)[:, :8])  # another size
    assert sheet_of(out).shape == (40, 40, 3)


def test_known_codes_are_seen_from_the_start(model, out):
    codes = random_codes(1)
    known = codes[0].clone()
    known[20:40] = -1
    preview = Preview(out, model, every=1, known=known)
    preview(20, codes[:, 20:24])
    shown, so_far = picture(sheet_of(out), 0, 1), known[None].clone()
    so_far[:, 20:24] = codes[:, 20:24]
    missing = (so_far < 0).view(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert (shown[missing] == GREY).all()
    assert torch.equal(shown[~missing], decoded(model, so_far)[0][~missing])


def test_it_follows_a_drawing_and_changes_nothing(model, out):
    text = model.token_ids(["red apple", "a flag"], False)
    preview = Preview(out, model, every=2)
    codes = model.dalle.generate_images(text, seed=0, return_tokens=True, on_tokens=preview)[1]
    assert torch.equal(codes, model.dalle.generate_images(text, seed=0, return_tokens=True)[1])
    assert torch.equal(picture(sheet_of(out), 1, 2), decoded(model, codes)[1])
    assert [path.name for path in out.parent.iterdir()] == ["preview.png"]


def test_a_disk_that_takes_no_sheet_is_a_warning(model, tmp_path, caplog):
    preview = Preview(tmp_path / "no folder" / "preview.png", model, every=1)
    with caplog.at_level(logging.WARNING):
        preview(0, random_codes(1)[:, :8])
    assert "preview.png cannot be written: No such file or directory" in caplog.text


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1, "most": 0}])
def test_numbers_below_one_are_refused(model, out, options):
    with pytest.raises(ValueError, match="of a preview must be at least 1, got 0"):
        Preview(out, model, **options)
