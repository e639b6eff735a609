"""The nearest code of a codebook beside torch.cdist and argmin, which store the matrix of all distances.

Exact ties cost two operations a number (a difference, and its square fused with the sum), where cdist's matrix product
costs one and cancels. Both are judged by how much farther than the nearest their code is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.providers import implementations
from dalle_fast.ops import nearest_code as op

CASES = (
    Case("image_8192x256", {"rows": 1024, "codes": 8192, "width": 256}),
    Case("vqgan_16384x256", {"rows": 256, "codes": 16384, "width": 256}),
    Case("batch8_1024x64", {"rows": 8192, "codes": 1024, "width": 64}),
    Case("odd_77x1001x33", {"rows": 77, "codes": 1001, "width": 33}),
    Case("toy", {"rows": 5, "codes": 33, "width": 7}, toy=True),
)


class Inputs(NamedTuple):
    """x [rows, D] and codebook [K, D], float32, on the device of the run."""

    x: Tensor
    codebook: Tensor


def _inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = ((case.sizes[name], case.sizes["width"]) for name in ("rows", "codes"))
    return Inputs(*(torch.randn(shape, generator=generator).to(device) for shape in shapes))


def _expected(case: Case, inputs: Inputs) -> Tensor:
    """Squared distances, float64 [rows, K] on the CPU."""
    return torch.cdist(inputs.x.cpu().double(), inputs.codebook.cpu().double()).square_()


def _check(case: Case, got: Tensor, expected: Tensor) -> str | None:
    nearest = expected.amin(dim=1)
    excess = (expected.gather(1, got.cpu()[:, None]).squeeze(1) - nearest) / nearest
    # D differences, squares and additions in either of two distances, each rounded once
    budget = 4 * case.sizes["width"] * torch.finfo(torch.float32).eps
    worst = excess.max().item()
    return None if worst <= budget else f"must be within {budget:.2g} of the smallest distance, is off by {worst:.2g}."


def _by_cdist(case: Case, inputs: Inputs, device: torch.device) -> Job:
    def whole() -> Tensor:
        return torch.cdist(inputs.x, inputs.codebook).argmin(dim=-1)

    return Job(result=whole, pieces={"whole": whole})


def _cost(case: Case) -> Cost:
    rows, codes, width = (case.sizes[name] for name in ("rows", "codes", "width"))
    return Cost(
        read_bytes=4 * width * (rows + codes),
        write_bytes=8 * rows,
        flops=2 * rows * codes * width,
        result_bytes=8 * rows,
    )


BENCHMARK = Benchmark(
    op=op.OP,
    mode="search",
    cases=CASES,
    providers=(
        *implementations(
            op.OP,
            lambda case, inputs, impl: op.nearest_code(*inputs, impl=impl),
            lambda case, device: {"device": device.type, "dtype": case.dtype},
        ),
        Provider("torch_cdist", _by_cdist),
    ),
    inputs=_inputs,
    expected=_expected,
    check=_check,
    cost=_cost,
    baseline="torch_cdist",
)
