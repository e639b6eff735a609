"""nearest_code with impl="triton" on a GPU: against the oracle at real sizes, exact ties, opcheck, memory."""

from functools import partial

import pytest
import torch
from nearest_code_checks import DTYPES, check_as_near_as_the_oracle, draw

from dalle_fast.functional import nearest_code

pytestmark = pytest.mark.gpu


def draw_on_gpu(*sizes, dtype=torch.float32):
    return tuple(t.to("cuda", dtype) for t in draw(*sizes))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", [(1024, 8192, 256), (1, 1, 1), (77, 1001, 33)], ids=str)
def test_the_code_is_as_near_as_the_oracles(sizes, dtype, normalised):
    x, codebook = draw_on_gpu(*sizes, dtype=dtype)
    check_as_near_as_the_oracle(partial(nearest_code, impl="triton"), x, codebook, normalised=normalised)


def test_equal_codes_give_the_first_of_them_in_every_place():
    x, codebook = draw_on_gpu(500, 37, 65)
    assert torch.equal(
        nearest_code(x, codebook.repeat(200, 1), impl="triton"), nearest_code(x, codebook, impl="triton")
    )


def test_what_is_no_number_takes_what_argmin_takes():
    x, codebook = draw_on_gpu(70, 2000, 8)
    x[3] = torch.nan
    assert nearest_code(x, codebook, impl="triton")[3] == 0
    codebook[[1500, 1900], 1] = torch.nan
    assert (nearest_code(x[4:], codebook, impl="triton") == 1500).all()


def test_auto_takes_the_kernels_and_keeps_the_operator_rules():
    x, codebook = draw_on_gpu(77, 1001, 33)
    assert torch.equal(nearest_code(x, codebook), nearest_code(x, codebook, impl="triton"))
    torch.library.opcheck(torch.ops.dalle_fast.nearest_code, (x, codebook, False, "triton"))


def test_no_matrix_of_distances():
    x, codebook = draw_on_gpu(65536, 8192, 16)
    nearest_code(x, codebook, impl="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_code(x, codebook, impl="triton")
    shares = 8  # of 1024 codes; 8 bytes a row each
    assert torch.cuda.max_memory_allocated() - before <= 65536 * 8 * (1 + shares) + 2**20
