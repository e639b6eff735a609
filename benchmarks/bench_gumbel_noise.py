"""Gumbel noise from counters beside torch's own generators, which are sequential and depend on the batch.

The work writes 4 bytes a value and reads nothing; ten Philox rounds a 4 values and two logarithms a value stand between
it and the write ceiling. torch's two ways draw other numbers of the same distribution and owe just that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.providers import implementations
from dalle_fast import rng
from dalle_fast.ops import gumbel_noise as op
from dalle_fast.reference import gumbel_noise as reference

SEED = 2**40 + 3
STREAM = rng.Stream.VAE
ULPS = 2  # what the op promises, see dalle_fast/ops/gumbel_noise.py
# Kolmogorov-Smirnov: sqrt(n) * D stays below this with probability 1 - 1e-9 when the distribution is right.
KS_BOUND = math.sqrt(-math.log(1e-9 / 2) / 2)

CASES = (
    Case("token", {"positions": 1, "codes": 8192}),
    Case("tokens32", {"positions": 32, "codes": 8192}),
    Case("vae_image", {"positions": 1024, "codes": 8192}),
    Case("odd_77x1001", {"positions": 77, "codes": 1001}),
    Case("odd_3x16385", {"positions": 3, "codes": 16385}),
    Case("toy", {"positions": 5, "codes": 33}, toy=True),
)


class Inputs(NamedTuple):
    """positions int64 [n] on the device of the run, and how many codes."""

    positions: Tensor
    n_codes: int


def _inputs(case: Case, device: torch.device) -> Inputs:
    return Inputs(torch.arange(case.sizes["positions"], device=device), case.sizes["codes"])


def _expected(case: Case, inputs: Inputs) -> Tensor:
    """The exact noise, float64 on the CPU."""
    seeds = rng.seeds_to_tensor(SEED, torch.device("cpu"))
    words = reference.words(seeds, inputs.positions.cpu(), int(STREAM), inputs.n_codes)
    return -torch.log(-torch.log(rng.uniform(words).double()))


def _check(case: Case, got: Tensor, expected: Tensor) -> str | None:
    nearest = expected.to(torch.float32)
    ulp = (torch.nextafter(nearest, torch.full_like(nearest, math.inf)) - nearest).double()
    worst = ((got.cpu().double() - expected).abs() / ulp).max().item()
    return None if worst <= ULPS else f"must be within {ULPS} ulp of the exact noise, is off by {worst:.3g}."


def _check_distribution(case: Case, got: Tensor, expected: Tensor) -> str | None:
    ordered = got.cpu().double().flatten().sort().values
    n = ordered.numel()
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    below = torch.exp(-torch.exp(-ordered))
    distance = torch.maximum((below - ranks).abs(), (below - ranks + 1 / n).abs()).max().item()
    score = math.sqrt(n) * distance
    return None if score <= KS_BOUND else f"must be Gumbel distributed, Kolmogorov-Smirnov score is {score:.3g}."


def _by_exponential(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(shape, device=device).exponential_().log_().neg_()


def _by_uniform(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(shape, device=device).uniform_().log_().neg_().log_().neg_()


def _torch_provider(name: str, draw: Callable[[tuple[int, int], torch.device], Tensor]) -> Provider:
    def prepare(case: Case, inputs: Inputs, device: torch.device) -> Job:
        torch.manual_seed(SEED)
        shape = inputs.positions.shape[0], inputs.n_codes

        def whole() -> Tensor:
            return draw(shape, device)

        return Job(result=whole, pieces={"whole": whole})

    return Provider(name, prepare, check=_check_distribution)


def _cost(case: Case) -> Cost:
    values = case.sizes["positions"] * case.sizes["codes"]
    return Cost(write_bytes=4 * values, items=values, unit="values")


BENCHMARK = Benchmark(
    op=op.OP,
    mode="fill",
    cases=CASES,
    providers=(
        *implementations(
            op.OP,
            lambda case, inputs, impl: op.gumbel_noise(SEED, inputs.positions, STREAM, inputs.n_codes, impl=impl),
            lambda case, device: {"device": device.type},
        ),
        _torch_provider("torch_exponential", _by_exponential),
        _torch_provider("torch_uniform", _by_uniform),
    ),
    inputs=_inputs,
    expected=_expected,
    check=_check,
    cost=_cost,
    baseline="torch_exponential",
)
