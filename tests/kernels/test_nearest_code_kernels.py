"""Triton's kernels of nearest_code in the interpreter, which checks bounds and races: against the oracle; ties, NaN."""

import math
from functools import partial

import pytest
import torch
from nearest_code_checks import DTYPES, check_as_near_as_the_oracle, draw, draw_small_integers

from dalle_fast.ops.nearest_code import nearest_code

pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")

from dalle_fast.kernels.nearest_code import LAUNCH, MERGE_ROWS, Launch, launch_nearest_code

# Blocks so small that few rows, codes and channels make several of each, and several shares of codes.
SMALL = Launch(block_m=16, block_n=16, block_d=4, codes=32, num_warps=4)
# rows, codes, channels: of one, off the blocks and on them
SIZES = [(1, 1, 1), (3, 2, 5), (17, 33, 7), (16, 64, 8), (40, 70, 19)]


def search(x, codebook, *, normalised=False, launch=SMALL):
    return launch_nearest_code(x, codebook, normalised=normalised, launch=launch)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What kernels leave unwritten is NaN, or the last of all codes."""
    allocate = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small_integers_tie_as_in_the_oracle(sizes):
    x, codebook = draw_small_integers(*sizes)
    assert torch.equal(search(x, codebook), nearest_code(x, codebook, impl="reference"))


@pytest.mark.parametrize("launch", [SMALL, LAUNCH], ids=["small", "table"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_code_is_as_near_as_the_oracles(dtype, normalised, launch):
    sizes = (40, 70, 19) if launch == SMALL else (33, 1100, 5)
    x, codebook = (t.to(dtype) for t in draw(*sizes))
    check_as_near_as_the_oracle(partial(search, launch=launch), x, codebook, normalised=normalised)


def test_equal_codes_give_the_first_of_them():
    x, codebook = draw(20, 11, 6)
    assert torch.equal(search(x, codebook.repeat(7, 1)), search(x, codebook))


def test_rows_that_are_not_numbers_take_what_argmin_takes_and_touch_no_other():
    x, codebook = draw(20, 100, 6)
    clean = search(x, codebook)
    x[3], x[17, 2] = math.nan, math.inf
    got = search(x, codebook)
    assert got[3] == got[17] == 0
    others = torch.ones(20, dtype=torch.bool)
    others[[3, 17]] = False
    assert torch.equal(got[others], clean[others])
    codebook[[40, 90], 1] = math.nan
    assert (search(x[others], codebook) == 40).all()


def test_strided_views_a_row_alone_and_inputs_stay():
    x, codebook = draw(24, 40, 6)
    before = x.clone(), codebook.clone()
    expected = search(x, codebook)
    packed = torch.cat((x, x), dim=1)[:, 6:].view(3, 8, 6)
    assert torch.equal(search(packed, codebook.T.contiguous().T), expected.view(3, 8))
    assert torch.equal(search(x[5], codebook), expected[5])
    assert torch.equal(x, before[0]) and torch.equal(codebook, before[1])


def test_the_op_runs_them_by_name_and_refuses_in_words():
    x, codebook = draw(5, 7, 3)
    assert torch.equal(nearest_code(x, codebook, impl="triton"), nearest_code(x, codebook, impl="reference"))
    assert nearest_code(x[:0], codebook, impl="triton").shape == (0,)
    with pytest.raises(NotImplementedError, match="float64 exceeds"):
        nearest_code(x.double(), codebook.double(), impl="triton")


def test_shares_are_whole_blocks():
    assert LAUNCH.codes % LAUNCH.block_n == SMALL.codes % SMALL.block_n == 0
    assert MERGE_ROWS & (MERGE_ROWS - 1) == 0
