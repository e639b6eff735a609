"""Gumbel softmax over a codebook with its KL divergence, beside the original's lines, eager and under torch.compile.

Cases: a discrete VAE of 256x256 pictures (32x32 positions, 8192 codes of 512 channels) at batch 1, 8 and 64, soft and
straight-through, float32 and bfloat16, and two odd shapes. The lines of others store logits, noise and probabilities:
where these do not fit into the memory of a machine, the command says so.

Ours draws its noise by seed and is verified with the noise of that seed written out; peers draw torch's own noise, and
are verified with given noise (codebook_peers.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.codebook import BOTH, FORWARD, Inputs, Oracle, Results, call_in, cost, make_inputs, ours
from benchmarks.codebook_peers import codebook_peers, too_large
from benchmarks.harness import Benchmark, Case, Provider
from benchmarks.providers import implementations
from dalle_fast.ops import gumbel_codebook as op

STANDARD: dict[str, Any] = {"batch": 1, "grid": (32, 32), "features": 64, "codes": 8192, "dim": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "b1": STANDARD,
    "b8": STANDARD | {"batch": 8},
    "b64": STANDARD | {"batch": 64},
    "odd_17x23": {"batch": 3, "grid": (17, 23), "features": 48, "codes": 1001, "dim": 77},
    "odd_16x16": {"batch": 2, "grid": (16, 16), "features": 130, "codes": 16385, "dim": 256},
    "toy": {"batch": 2, "grid": (3, 5), "features": 6, "codes": 33, "dim": 7},
}
MEASURED_BATCH = 8  # of the oracle and of all that is judged by it in seconds
F32, BF16 = torch.float32, torch.bfloat16


def _family(
    device: str | None, shape: str, kinds: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
) -> tuple[Case, ...]:
    # both modes of a kind one after the other: the oracle keeps what it has computed last
    return tuple(
        Case(
            f"{shape}_{kind}", SHAPES[shape] | {"straight_through": kind == "hard"}, dtype, shape == "toy", mode, device
        )
        for kind in kinds
        for dtype in dtypes
        for mode in (BOTH, FORWARD)
    )


CASES = (
    *_family("cpu", "b1", ("soft", "hard"), (F32, BF16)),
    *_family("cpu", "b8", ("soft",), (F32, BF16)),
    *_family("cpu", "odd_17x23", ("soft", "hard"), (F32,)),
    *_family("cpu", "odd_16x16", ("soft",), (F32, BF16)),
    *_family("cpu", "b8", ("hard",), (F32,)),
    *_family("cpu", "b64", ("soft",), (F32, BF16)),
    *_family("cuda", "b8", ("soft",), (BF16, F32)),
    *_family("cuda", "b64", ("soft",), (BF16,)),
    *_family("cuda", "b8", ("hard",), (BF16,)),
    *_family("cuda", "b1", ("soft",), (BF16,)),
    *_family("cuda", "odd_17x23", ("soft",), (F32,)),
    *_family("cuda", "odd_16x16", ("soft",), (BF16,)),
    *_family(None, "toy", ("soft", "hard"), (F32, BF16)),
)


def _call(case: Case, inputs: Inputs, impl: str) -> Results:
    return call_in(case.mode or FORWARD, ours(impl, hard=case.sizes["straight_through"]), inputs)


def _facts(case: Case, device: torch.device) -> dict[str, object]:
    features = torch.empty(1, case.sizes["features"], 1, 1, dtype=case.dtype, device=device)
    return op.facts(features, torch.empty(case.sizes["codes"], case.sizes["dim"], dtype=case.dtype, device="meta"))


def _missing_reference(case: Case, device: torch.device) -> str | None:
    if device.type == "cpu" and case.sizes["batch"] > MEASURED_BATCH:
        return "left out: a minute a call at this size."
    return too_large("reference", case, device)


def _ours() -> tuple[Provider, ...]:
    return tuple(
        replace(provider, missing=_missing_reference) if provider.name == "reference" else provider
        for provider in implementations(op.OP, _call, _facts)
    )


def _check(case: Case, got: Results, oracle: Oracle) -> str | None:
    return oracle.complaint(got)


BENCHMARK = Benchmark(
    op=op.OP,
    mode=FORWARD,
    cases=CASES,
    providers=(*_ours(), *codebook_peers()),
    inputs=make_inputs,
    expected=Oracle,
    check=_check,
    cost=cost,
    baseline="original_lines",
)
