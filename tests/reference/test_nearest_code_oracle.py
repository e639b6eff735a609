"""The oracle of nearest_code against a double loop over exact integers, ties and near-ties."""

import pytest
import torch

from dalle_fast.ops.nearest_code import nearest_code
from dalle_fast.reference.nearest_code import ROWS_AT_ONCE


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equals_a_double_loop_over_integers():
    """Small integers: every distance is exact, ties are many, and the first of equals must win."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (5, 7, 3), generator=generator)
    codebook = torch.randint(-3, 4, (11, 3), generator=generator)
    got = nearest_code(x.float(), codebook.float(), impl="reference")
    for i in range(5):
        for j in range(7):
            distances = [sum((a - b) ** 2 for a, b in zip(x[i, j].tolist(), c, strict=True)) for c in codebook.tolist()]
            assert got[i, j] == distances.index(min(distances))


@pytest.mark.parametrize("normalised", [False, True])
def test_equal_codes_give_the_lowest_index(normalised):
    codebook = _draw(5, 6).repeat(7, 1)
    got = nearest_code(_draw(40, 6, seed=1), codebook, normalised=normalised)
    assert got.max() < 5 and len(got.unique()) > 1


def test_a_code_far_from_zero_is_told_from_its_neighbour():
    """|x|^2 - 2 x.c + |c|^2 in float32 loses this difference of 1e-6 entirely."""
    codebook = torch.full((2, 4), 1000.0)
    codebook[1, 0] += 2**-10
    assert nearest_code(codebook, codebook).tolist() == [0, 1]


def test_normalised_takes_the_largest_cosine():
    x, codebook = _draw(50, 4), _draw(9, 4, seed=1) * torch.arange(1, 10)[:, None]
    cosine = torch.nn.functional.cosine_similarity(x.double()[:, None], codebook.double()[None], dim=-1)
    first, second = cosine.topk(2, dim=-1).values.unbind(-1)
    assert (first - second).min() > 1e-5, "the test's own gap must be clear of float32 rounding"
    got = nearest_code(x, codebook, normalised=True)
    assert torch.equal(got, cosine.argmax(dim=-1))
    assert not torch.equal(got, nearest_code(x, codebook))


def test_rows_beyond_one_block_are_each_by_themselves():
    x, codebook = _draw(ROWS_AT_ONCE + 3, 2), _draw(6, 2, seed=1)
    got = nearest_code(x, codebook)
    assert torch.equal(got[-3:], nearest_code(x[-3:], codebook))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_agree_with_float64_where_the_gap_is_clear(dtype):
    x, codebook = _draw(200, 8).to(dtype), _draw(20, 8, seed=1).to(dtype)
    distances = (x.double()[:, None] - codebook.double()).square().sum(-1)
    assert (distances.topk(2, largest=False).values.diff() > 1e-5).all()
    assert torch.equal(nearest_code(x, codebook), distances.argmin(dim=-1))


def test_no_gradient_and_no_dependence_on_autocast():
    x, codebook = _draw(30, 8).requires_grad_(), _draw(20, 8, seed=1).requires_grad_()
    plain = nearest_code(x, codebook)
    assert not plain.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(x, codebook), plain)
