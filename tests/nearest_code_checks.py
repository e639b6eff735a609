"""Inputs of nearest_code, and the comparison of an implementation with the oracle, for every test of that op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tolerance import assert_within_budget
from torch import Tensor

from dalle_fast.functional import nearest_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def draw(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """x [n, d] and codebook [k, d], normal."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def draw_small_integers(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """x [n, d] and codebook [k, d] whose distances are exact in float32, and often tie."""
    generator = torch.Generator().manual_seed(1)
    x, codebook = (torch.randint(-2, 3, (rows, d), generator=generator).float() for rows in (n, k))
    return x, codebook


def check_as_near_as_the_oracle(
    search: Callable[..., Tensor], x: Tensor, codebook: Tensor, *, normalised: bool
) -> None:
    """The codes that `search` finds are as near as those of the oracle, within its budget.

    Args: search: called as (x, codebook, normalised=...).
    """
    got, own = (
        search(x, codebook, normalised=normalised),
        nearest_code(x, codebook, normalised=normalised, impl="reference"),
    )
    x, codebook = x.double(), codebook.double()
    if normalised:
        x, codebook = (torch.nn.functional.normalize(t, dim=-1) for t in (x, codebook))
    distance = torch.cdist(x, codebook).square()
    of_got, of_own = (distance.gather(1, codes[:, None]).float() for codes in (got, own))
    assert_within_budget(of_got, distance.amin(dim=1, keepdim=True), of_own)
