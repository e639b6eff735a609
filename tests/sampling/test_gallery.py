"""Sheets: what a user sees of a drawing."""

import numpy as np
import pytest
import torch

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.sampling.gallery import labelled_grid, to_pil, to_pixels


@pytest.mark.parametrize("normalization", [((0.5,) * 3, (0.5,) * 3), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), None])
def test_to_pixels_undoes_the_normalisation_of_the_vae(normalization):
    vae = DiscreteVAE(
        image_size=8, num_tokens=4, codebook_dim=4, num_layers=1, hidden_dim=4, normalization=normalization
    )
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(to_pixels(vae, vae.norm(images)), images, rtol=0, atol=1e-6)


def test_to_pixels_stays_within_the_range():
    vae = DiscreteVAE(image_size=8, num_tokens=4, codebook_dim=4, num_layers=1, hidden_dim=4)
    assert to_pixels(vae, torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)).unique().tolist() == [0.0, 1.0]


def test_a_grid_holds_every_picture_in_its_place():
    colours = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [0, 0, 0]]])  # row, column, channel
    rows = [(label, colours[r, :, :, None, None].expand(2, 3, 4, 4)) for r, label in enumerate(("one", "two"))]
    sheet = np.asarray(labelled_grid(rows, scale=3))
    for r in range(2):
        for c in range(2):
            top, left = 8 + r * (12 + 22 + 8) + 22, 8 + c * (12 + 8)
            cell = sheet[top : top + 12, left : left + 12] / 255
            assert np.array_equal(cell, np.broadcast_to(colours[r, c].numpy(), (12, 12, 3)))


def test_a_long_label_is_shortened_not_drawn_beyond_the_sheet():
    sheet = labelled_grid([("a very long label " * 9, torch.ones(1, 3, 32, 32))])
    assert np.asarray(sheet)[:, -4:].min() == 255


def test_grids_of_unlike_rows_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        labelled_grid([("a", torch.ones(1, 3, 4, 4)), ("b", torch.ones(2, 3, 4, 4))])
    with pytest.raises(ValueError, match="one or more"):
        labelled_grid([])
    with pytest.raises(ValueError, match="1 or 3"):
        to_pil(torch.ones(2, 4, 4))
