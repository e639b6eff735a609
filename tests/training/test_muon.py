"""Muon's update is an orthogonal matrix with the gradient's directions; the optimiser is in test_optimisers.py."""

import pytest
import torch
from tolerance import assert_same_in_float64

from dalle_fast.training.muon import orthogonalise


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 6), (2, 5, 5)])
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    got = u.mT @ orthogonalise(matrices) @ vh.mT
    levels = got.diagonal(dim1=1, dim2=2)
    assert_same_in_float64(got, torch.diag_embed(levels), n_terms=1000)
    # Jordan et al.: the quintic ends between 0.68 and 1.13 for singular values of at least 1 % of the norm.
    kept = s / s.norm(dim=1, keepdim=True) > 0.01
    assert levels[kept].min() > 0.6 and levels.max() < 1.3
