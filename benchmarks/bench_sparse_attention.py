"""Sparse attention beside torch's SDPA, compiled flex_attention, the original's layers and the dense oracle.

Cases: the standard model (`b1`, `b4`), a 64x64 grid, a shorter text, two odd layouts, each pattern, float32 and 16
bits, forward and forward+backward; and a sweep over square grids, drawn as curves. They stand in order of importance:
`--within` leaves out the last ones.

Rates and shares of the ceilings count the pairs that the pattern allows, whoever computes more (attention.py), the peak
holds the results as well, and the last number of a row, the peak over the size of the results, is at least 1.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import BOTH, FORWARD, Inputs, Oracle, attend_in, cost, make_inputs, pattern_of
from benchmarks.attention_peers import heavy, missing_beyond_sweep, speed_peers
from benchmarks.harness import Benchmark, Case, Provider
from benchmarks.providers import implementations
from dalle_fast.ops import sparse_attention as op

STANDARD: dict[str, Any] = {"batch": 1, "heads": 8, "n": 1280, "head_dim": 64, "text_len": 257, "grid": (32, 32)}
SHAPES: dict[str, dict[str, Any]] = {
    "b1": STANDARD,
    "b4": STANDARD | {"batch": 4, "heads": 16},
    "grid64": STANDARD | {"n": 4353, "grid": (64, 64)},
    "t129": STANDARD | {"n": 1152, "text_len": 129},
    "odd_24x40": {"batch": 2, "heads": 3, "n": 1001, "head_dim": 64, "text_len": 77, "grid": (24, 40)},
    "odd_17x23": {"batch": 3, "heads": 5, "n": 437, "head_dim": 32, "text_len": 50, "grid": (17, 23)},
    "toy_square": {"batch": 1, "heads": 2, "n": 40, "head_dim": 16, "text_len": 5, "grid": (6, 6)},
    "toy": {"batch": 2, "heads": 3, "n": 56, "head_dim": 16, "text_len": 9, "grid": (6, 8)},
}
SPARSE = ("axial_row", "axial_col", "conv_like")  # conv_like: its default kernel, 5
EVERY = (*SPARSE, "full")
DENSE_SCORES = 60_000_000  # the dense oracle is measured up to this many a call
SIDES = (16, 24, 32, 48, 64, 80, 96)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _family(
    device: str | None,
    shape: str,
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    modes: tuple[str, ...] = (FORWARD, BOTH),
) -> tuple[Case, ...]:
    return tuple(
        Case(f"{shape}_{name}", SHAPES[shape] | {"pattern": name}, dtype, shape.startswith("toy"), mode, device)
        for mode in modes
        for dtype in dtypes
        for name in names
    )


def _sweep(device: str, dtype: torch.dtype) -> tuple[Case, ...]:
    cases = []
    for side in SIDES:
        n = STANDARD["text_len"] + side * side - 1
        for name in SPARSE:
            sizes = STANDARD | {"n": n, "grid": (side, side), "pattern": name, "sweep": "side", "side": side}
            cases.append(Case(f"grid{side}_sweep_{name}", sizes, dtype, mode=FORWARD, device=device))
    return tuple(cases)


CASES = (
    *_family("cpu", "b1", EVERY, (F32, BF16)),
    *_family("cpu", "grid64", EVERY, (F32,)),
    *_family("cpu", "grid64", SPARSE, (BF16,), (FORWARD,)),
    *_family("cpu", "b4", EVERY, (F32, BF16)),
    *_family("cpu", "t129", EVERY, (F32, BF16)),
    *_family("cpu", "odd_24x40", EVERY, (F32,)),
    *_family("cpu", "odd_17x23", EVERY, (F32,)),
    *_family("cpu", "odd_24x40", EVERY, (BF16,), (FORWARD,)),
    *_family("cpu", "odd_17x23", EVERY, (BF16,), (FORWARD,)),
    *_sweep("cpu", F32),
    *_family("cuda", "b1", SPARSE, (BF16,)),
    *_family("cuda", "grid64", SPARSE, (BF16,), (FORWARD,)),
    *_family("cuda", "b1", SPARSE, (F32, F16)),
    *_family("cuda", "odd_24x40", EVERY, (F16,)),
    *_family("cuda", "odd_17x23", EVERY, (F32,)),
    *_sweep("cuda", BF16),
    *_family("cuda", "grid64", SPARSE, (BF16,), (BOTH,)),
    *_family("cuda", "b4", SPARSE, (BF16,)),
    *_family("cuda", "b1", ("full",), (BF16,)),
    *_family("cuda", "t129", SPARSE, (BF16,)),
    *_family(None, "toy", EVERY, (F32, BF16)),
    *_family(None, "toy_square", EVERY, (F32,)),
)


def _attend(case: Case, inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    attend = functools.partial(op.sparse_attention, pattern=pattern_of(case), impl=impl)
    return attend_in(case.mode or FORWARD, attend, inputs)


def _facts(case: Case, device: torch.device) -> dict[str, object]:
    return op.facts(torch.empty(1, 1, 1, case.sizes["head_dim"], dtype=case.dtype, device=device), pattern_of(case))


def _ours() -> tuple[Provider, ...]:
    return tuple(
        replace(provider, missing=_missing_dense) if provider.name == "reference" else provider
        for provider in implementations(op.OP, _attend, _facts)
    )


def _missing_dense(case: Case, device: torch.device) -> str | None:
    return missing_beyond_sweep(case, device) or heavy(case, device, DENSE_SCORES)


def _check(case: Case, got: tuple[Tensor, ...], oracle: Oracle) -> str | None:
    return oracle.complaint(got, pattern_of(case))


BENCHMARK = Benchmark(
    op=op.OP,
    mode=FORWARD,
    cases=CASES,
    providers=(*_ours(), *speed_peers()),
    inputs=make_inputs,
    expected=Oracle,
    check=_check,
    cost=cost,
    baseline="sdpa_causal",
    budget_s=2.0,
)
