"""nearest_code in C++: every instruction set against the oracle, ties, near-ties, numbers that are none."""

from functools import partial

import pytest
import torch
from nearest_code_checks import DTYPES, check_as_near_as_the_oracle, draw, draw_small_integers

from dalle_fast.ops.nearest_code import nearest_code

# rows, codes, channels: of one, off the tiles of 64 rows and the blocks of 48 codes, wider than a vector or not
SIZES = [(1, 1, 1), (3, 2, 5), (65, 49, 16), (130, 500, 17), (64, 96, 130)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small_integers_tie_as_in_the_oracle(sizes, isa):
    x, codebook = draw_small_integers(*sizes)
    assert torch.equal(nearest_code(x, codebook, impl="cpu"), nearest_code(x, codebook, impl="reference"))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_code_is_as_near_as_the_oracles(sizes, dtype, normalised, isa):
    x, codebook = (t.to(dtype) for t in draw(*sizes))
    check_as_near_as_the_oracle(partial(nearest_code, impl="cpu"), x, codebook, normalised=normalised)


def test_equal_codes_give_the_first_of_them(isa):
    x, codebook = draw(100, 20, 24)
    assert torch.equal(nearest_code(x, codebook.repeat(7, 1), impl="cpu"), nearest_code(x, codebook, impl="cpu"))


def test_rows_that_are_not_numbers_take_what_argmin_takes_and_touch_no_other(isa):
    x, codebook = draw(70, 100, 8)
    clean = nearest_code(x, codebook, impl="cpu")
    x[3], x[66, 2] = torch.nan, torch.inf
    got = nearest_code(x, codebook, impl="cpu")
    assert got[3] == got[66] == 0
    others = torch.ones(70, dtype=torch.bool)
    others[[3, 66]] = False
    assert torch.equal(got[others], clean[others])
    codebook[[40, 90], 1] = torch.nan
    assert (nearest_code(x[others], codebook, impl="cpu") == 40).all()


def test_any_strides_any_number_of_threads_and_inputs_stay(isa):
    x, codebook = draw(300, 200, 12)
    before, threads = x.clone(), torch.get_num_threads()
    expected = nearest_code(x, codebook, impl="cpu")
    apart = x.T.contiguous().T.view(3, 100, 12)
    try:
        for n_threads in (1, 2, 4):
            torch.set_num_threads(n_threads)
            assert torch.equal(nearest_code(apart, codebook, impl="cpu").flatten(), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(x, before)


def test_compiles_in_one_graph_and_keeps_the_operator_rules(isa):
    x, codebook = draw(5, 7, 3)
    torch.library.opcheck(torch.ops.dalle_fast.nearest_code, (x, codebook, False, "cpu"))
    compiled = torch.compile(lambda x: nearest_code(x, codebook) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), nearest_code(x, codebook) + 1)
