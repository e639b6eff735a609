"""Muon: what its update is, map by map."""

import pytest
import torch
from tolerance import assert_same_in_float64

from dalle_fast.training.muon import Muon, orthogonalise


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


def test_muon_updates_stacked_maps_one_by_one():
    first, second = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    both = torch.nn.Parameter(torch.zeros(8, 3))
    generator = torch.Generator().manual_seed(0)
    first.grad, second.grad = torch.randn(4, 3, generator=generator), 9 * torch.randn(4, 3, generator=generator)
    both.grad = torch.cat((first.grad, second.grad))
    Muon([(both, 2)], lr=0.1).step()
    Muon([(first, 1), (second, 1)], lr=0.1).step()
    assert torch.equal(both, torch.cat((first, second)))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="must be 2-D"):
        Muon([(torch.nn.Parameter(torch.zeros(3)), 1)], lr=0.1)
