"""One token a row from 8192 logits: filters and the draw, beside the lines of plain torch, eager and compiled.

The peers keep the k largest by topk and the nucleus by a sort, and draw by an exponential of torch's own generator;
what is verified is computed by the same lines from given noise. Warm: logits come straight from the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.providers import implementations
from dalle_fast import rng
from dalle_fast.ops import choose_token as op
from dalle_fast.ops.gumbel_noise import gumbel_noise
from dalle_fast.reference import choose_token as reference

SEED, POSITION, SPREAD = 2**40 + 3, 517, 3.0
STREAM = rng.Stream.IMAGE_SAMPLING
PLAIN: dict[str, Any] = {"top_k": None, "temperature": 1.0, "top_p": None}
FILTERS = {
    "": PLAIN,
    "_top_k": PLAIN | {"top_k": 256, "temperature": 0.9},
    "_top_p": PLAIN | {"top_p": 0.9},
}

CASES = (
    *(Case(f"b{batch}{name}", f | {"batch": batch, "codes": 8192}) for batch in (1, 32) for name, f in FILTERS.items()),
    Case("odd_b3", PLAIN | {"top_k": 50, "top_p": 0.8, "batch": 3, "codes": 1001}),
    Case("toy", PLAIN | {"top_k": 20, "top_p": 0.8, "batch": 2, "codes": 33}, toy=True),
)


class Inputs(NamedTuple):
    """logits [B, K], seeds and positions [B], and the noise [B, K] that they mean."""

    logits: Tensor
    seeds: Tensor
    positions: Tensor
    noise: Tensor


def _inputs(case: Case, device: torch.device) -> Inputs:
    batch, codes = case.sizes["batch"], case.sizes["codes"]
    generator = torch.Generator().manual_seed(7)
    logits = (SPREAD * torch.randn(batch, codes, generator=generator)).to(device)
    seeds = rng.seeds_to_tensor(range(SEED, SEED + batch), device)
    positions = torch.full((batch,), POSITION, device=device)
    return Inputs(logits, seeds, positions, gumbel_noise(seeds, positions, STREAM, codes))


def _filters(case: Case) -> dict[str, Any]:
    return {name: case.sizes[name] for name in PLAIN}


def _expected(case: Case, inputs: Inputs) -> Tensor:
    return reference.choose_token(inputs.logits.double(), inputs.noise.double(), **_filters(case))


def _check(case: Case, got: Tensor, expected: Tensor) -> str | None:
    return None if torch.equal(got, expected) else f"tokens must be {expected.tolist()}, got {got.tolist()}."


def torch_lines(
    logits: Tensor, noise: Tensor | None, top_k: int | None, temperature: float, top_p: float | None
) -> Tensor:
    """Tokens [B] as a sampler in plain torch takes them; `noise` None: drawn here."""
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    logits = logits / temperature
    if top_p is not None:
        ordered = logits.sort(descending=True).values
        shares = ordered.softmax(dim=-1)
        kept = (shares.cumsum(dim=-1) - shares < top_p).sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < ordered.gather(1, kept - 1), -torch.inf)
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).argmax(dim=-1)


def _prepare_lines(case: Case, inputs: Inputs, device: torch.device, *, compiled: bool) -> Job:
    lines: Callable[..., Tensor] = torch_lines
    if compiled:
        torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
        lines = torch.compile(torch_lines, dynamic=False, fullgraph=True)
    call = functools.partial(lines, inputs.logits, **_filters(case))
    return Job(result=lambda: call(noise=inputs.noise), pieces={"whole": lambda: call(noise=None)})


def _compiled_missing(case: Case, device: torch.device) -> str | None:
    return "compiles for ten seconds: left out at toy sizes." if case.toy else None


def _call(case: Case, inputs: Inputs, impl: str) -> Tensor:
    return op.choose_token(
        inputs.logits, seeds=inputs.seeds, positions=inputs.positions, stream=STREAM, **_filters(case), impl=impl
    )


def _cost(case: Case) -> Cost:
    read_bytes = 4 * case.sizes["batch"] * case.sizes["codes"]
    return Cost(read_bytes=read_bytes, working_set=read_bytes, items=case.sizes["batch"], unit="tokens")


BENCHMARK = Benchmark(
    op=op.OP,
    mode="draw",
    cases=CASES,
    providers=(
        *implementations(op.OP, _call, lambda case, device: {"device": device.type, "dtype": case.dtype}),
        Provider("torch_lines", functools.partial(_prepare_lines, compiled=False)),
        Provider("torch_compiled", functools.partial(_prepare_lines, compiled=True), _compiled_missing),
    ),
    inputs=_inputs,
    expected=_expected,
    check=_check,
    cost=_cost,
    baseline="torch_lines",
    cold=False,
)
