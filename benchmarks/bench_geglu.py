"""GEGLU, forward and backward, beside plain torch, eager (`reference`) and under torch.compile.

Cases: what feed-forwards of 512 channels hold at 1280 positions, one and eight samples, and an odd shape. 16-bit inputs
are judged in their dtype. A peer may err PEER_SLACK times what ours may: torch rounds every 16-bit step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.providers import implementations
from dalle_fast.ops import geglu as op
from dalle_fast.reference import geglu as reference
from tests.tolerance import budget

PEER_SLACK = 8.0
F32, BF16 = torch.float32, torch.bfloat16
CASES = (
    *(Case("b1", {"rows": 1280, "width": 2048}, dtype) for dtype in (F32, BF16)),
    Case("b8", {"rows": 10240, "width": 2048}),
    Case("odd", {"rows": 507, "width": 481}),
    *(Case("toy", {"rows": 3, "width": 21}, dtype, toy=True) for dtype in (F32, BF16)),
)

Results = dict[str, Tensor]


class Inputs(NamedTuple):
    """x [rows, 2 width] and the gradient of the result [rows, width]."""

    x: Tensor
    dout: Tensor


def _inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, width = case.sizes["rows"], case.sizes["width"]
    x, dout = (torch.randn(rows, n, generator=generator) for n in (2 * width, width))
    return Inputs(x.to(device, case.dtype), dout.to(device, case.dtype))


def _call(case: Case, inputs: Inputs, impl: str) -> Results:
    return _with_gradient(inputs, lambda x: op.geglu(x, impl=impl))


def _with_gradient(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Results:
    x = inputs.x.detach().requires_grad_()
    out = function(x)
    return {"out": out.detach(), "dx": torch.autograd.grad(out, x, inputs.dout)[0]}


def _expected(case: Case, inputs: Inputs) -> tuple[Results, Results]:
    """By the oracle: in float64, and in the dtype of the case."""
    wide = Inputs(inputs.x.double(), inputs.dout.double())
    return _with_gradient(wide, reference.geglu), _with_gradient(inputs, reference.geglu)


def _check(case: Case, got: Results, expected: tuple[Results, Results], slack: float = 1.0) -> str | None:
    exact, own = expected
    for name, value in got.items():
        allowed = slack * budget(exact[name], own[name])
        error = (value.double() - exact[name]).abs().max().item()
        if not error <= allowed:  # NaN is not
            return f"{name} must be within {allowed:.3g} of float64, is off by {error:.3g}."
    return None


def _check_peer(case: Case, got: Results, expected: tuple[Results, Results]) -> str | None:
    return _check(case, got, expected, PEER_SLACK)


def _prepare_compiled(case: Case, inputs: Inputs, device: torch.device) -> Job:
    torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
    compiled = torch.compile(reference.geglu, fullgraph=True, dynamic=False)

    def whole() -> Results:
        return _with_gradient(inputs, compiled)

    return Job(result=whole, pieces={"whole": whole})


def _compiled_missing(case: Case, device: torch.device) -> str | None:
    return "compiles for ten seconds: left out at toy sizes." if case.toy else None


def cost(case: Case) -> Cost:
    """Forward reads two numbers and writes one for each of the result, backward reads three and writes two."""
    number = case.sizes["rows"] * case.sizes["width"] * case.dtype.itemsize
    return Cost(read_bytes=5 * number, write_bytes=3 * number, result_bytes=3 * number)


BENCHMARK = Benchmark(
    op=op.OP,
    mode="forward+backward",
    cases=CASES,
    providers=(
        *implementations(op.OP, _call, lambda case, device: {"device": device.type, "dtype": case.dtype}),
        Provider("compiled", _prepare_compiled, _compiled_missing, check=_check_peer),
    ),
    inputs=_inputs,
    expected=_expected,
    check=_check,
    cost=cost,
    baseline="compiled",
)
