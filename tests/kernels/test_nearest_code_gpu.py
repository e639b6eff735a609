"""nearest_code with impl="triton" on a GPU: against the oracle at real sizes, exact ties, opcheck, memory."""

import pytest
import torch
from tolerance import assert_within_budget

from dalle_fast.functional import nearest_code

pytestmark = pytest.mark.gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def draw(n, k, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, d, generator=generator).to("cuda", dtype) for rows in (n, k))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", [(1024, 8192, 256), (1, 1, 1), (77, 1001, 33)], ids=str)
def test_the_code_is_as_near_as_the_oracles(sizes, dtype, normalised):
    x, codebook = draw(*sizes, dtype)
    got, own = (nearest_code(x, codebook, normalised=normalised, impl=impl) for impl in ("triton", "reference"))
    x, codebook = x.double(), codebook.double()
    if normalised:
        x, codebook = (torch.nn.functional.normalize(t, dim=-1) for t in (x, codebook))
    distance = torch.cdist(x, codebook).square()
    of_got, of_own = (distance.gather(1, codes[:, None]).float() for codes in (got, own))
    assert_within_budget(of_got, distance.amin(dim=1, keepdim=True), of_own)


def test_equal_codes_give_the_first_of_them_in_every_place():
    x, codebook = draw(500, 37, 65)
    assert torch.equal(
        nearest_code(x, codebook.repeat(200, 1), impl="triton"), nearest_code(x, codebook, impl="triton")
    )


def test_what_is_no_number_takes_what_argmin_takes():
    x, codebook = draw(70, 2000, 8)
    x[3] = torch.nan
    assert nearest_code(x, codebook, impl="triton")[3] == 0
    codebook[[1500, 1900], 1] = torch.nan
    assert (nearest_code(x[4:], codebook, impl="triton") == 1500).all()


def test_auto_takes_the_kernels_and_keeps_the_operator_rules():
    x, codebook = draw(77, 1001, 33)
    assert torch.equal(nearest_code(x, codebook), nearest_code(x, codebook, impl="triton"))
    torch.library.opcheck(torch.ops.dalle_fast.nearest_code, (x, codebook, False, "triton"))


def test_no_matrix_of_distances():
    x, codebook = draw(65536, 8192, 16)
    nearest_code(x, codebook, impl="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_code(x, codebook, impl="triton")
    shares = 8  # of 1024 codes; 8 bytes a row each
    assert torch.cuda.max_memory_allocated() - before <= 65536 * 8 * (1 + shares) + 2**20
