"""What every provider of attention is given, asked for and judged by: inputs, the two modes, the oracle, the cost.

q, k and v are views of packed [B, N, 3, H, D] memory, as the models pass them. `forward` is the output without
autograd; `forward+backward` is the output and the gradients of q, k and v.

The oracle is the op's reference in float64, and its error at the dtype of the case is what a provider may err twice
(tests/tolerance.py). Heads are independent of each other, so large cases are judged on some (sample, head) slices, the
first and the last among them; the tests of the op judge every one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, Cost
from dalle_fast import patterns
from dalle_fast.ops.sparse_attention import sparse_attention
from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference import sparse_attention as reference
from tests.tolerance import budget

FORWARD, BOTH = "forward", "forward+backward"
SEED = 11
JUDGED_SCORES = 40_000_000  # query-key pairs that the oracle computes a case: seconds
ROWS = 1024  # queries at a time when pairs are counted
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # a channel of a pair: two products, then five
NAMES = ("out", "dq", "dk", "dv")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """q, k, v, dout: [B, H, N, D], dtype of the case."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normal q, k, v with the spread that makes a softmax neither flat nor one-hot, and a normal gradient."""
    reference.dense_mask.cache_clear()  # those of the last case: gigabytes at a large grid
    sizes = case.sizes
    generator = torch.Generator().manual_seed(SEED)
    shape = sizes["batch"], sizes["n"], sizes["heads"], sizes["head_dim"]
    packed = torch.randn(*shape[:2], 3, *shape[2:], generator=generator).to(device, case.dtype)
    dout = torch.randn(shape, generator=generator).to(device, case.dtype)
    return Inputs(*(x.transpose(1, 2) for x in (*packed.unbind(2), dout)))


def pattern_of(case: Case) -> AttentionPattern:
    """The pattern that a case names."""
    return _pattern(case.sizes["pattern"], case)


def causal_pattern(case: Case) -> AttentionPattern:
    """All keys up to the query, over the layout of the case: what causal peers compute."""
    return _pattern("full", case)


def _pattern(name: str, case: Case) -> AttentionPattern:
    return patterns.make(name, text_len=case.sizes["text_len"], grid=tuple(case.sizes["grid"]))


def attend_in(mode: str, attend: Attend, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output of `attend`, in the mode "forward+backward" with the gradients of q, k and v behind it."""
    if mode == FORWARD:
        with torch.no_grad():
            return (attend(inputs.q, inputs.k, inputs.v),)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)


# ------------------------------------------------------------------------------------------------ the oracle


class Oracle:
    """Judges results of a case; what it needs for a pattern is computed when first asked for."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case = case
        self._inputs = inputs
        batch, heads, n, _ = inputs.q.shape
        step = max(1, -(-batch * heads * n * n // JUDGED_SCORES))
        self._slices = sorted({*range(0, batch * heads, step), batch * heads - 1})
        self._known: dict[AttentionPattern, tuple[tuple[Tensor, ...], tuple[float, ...]]] = {}

    def complaint(self, got: tuple[Tensor, ...], pattern: AttentionPattern, slack: float = 1.0) -> str | None:
        """None where `got` (out and, in the mode with a backward, dq, dk, dv) is attention over `pattern`.

        Otherwise in words which of them is wrong, and by how much. The budget is multiplied by `slack`.
        """
        exact, budgets = self._expected(pattern)
        return judge(NAMES, [self._judged(x) for x in got], exact, tuple(slack * one for one in budgets))

    def _expected(self, pattern: AttentionPattern) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """What is right in float64, and the error allowed, for each result."""
        if pattern not in self._known:
            exact = self._by_reference(torch.float64, pattern)
            own = self._by_reference(self._case.dtype, pattern)
            self._known[pattern] = exact, tuple(budget(e, o) for e, o in zip(exact, own, strict=True))
        return self._known[pattern]

    def _by_reference(self, dtype: torch.dtype, pattern: AttentionPattern) -> tuple[Tensor, ...]:
        attend = functools.partial(sparse_attention, pattern=pattern, impl="reference")
        mode = self._case.mode or FORWARD
        parts = []
        for i in range(len(self._slices)):
            inputs = Inputs(*(self._judged(x)[None, i : i + 1].to(dtype) for x in self._inputs))
            parts.append(attend_in(mode, attend, inputs))
        return tuple(torch.cat([part[0] for part in results]) for results in zip(*parts, strict=True))

    def _judged(self, x: Tensor) -> Tensor:
        """[slices, N, D] of [B, H, N, D]."""
        heads = x.shape[1]
        return torch.stack([x[i // heads, i % heads] for i in self._slices])


def judge(
    names: tuple[str, ...], got: list[Tensor], exact: tuple[Tensor, ...], budgets: tuple[float, ...]
) -> str | None:
    """None where every result is within its budget of the float64 one, or in words what is wrong."""
    if len(got) != len(exact):
        return f"must give {len(exact)} results, gave {len(got)}."
    for name, value, right, allowed in zip(names, got, exact, budgets, strict=False):
        if value.shape != right.shape:
            return f"{name} must be {list(right.shape)}, is {list(value.shape)}."
        error = (value.double() - right).abs().max().item()
        if not error <= allowed:  # NaN is not
            return f"{name} must be within {allowed:.3g} of float64, is off by {error:.3g}."
    return None


# ------------------------------------------------------------------------------------------------ the cost


@functools.cache
def n_pairs(pattern: AttentionPattern, n: int) -> int:
    """Pairs of query and key that the pattern allows among the first n positions."""
    keys = torch.arange(n)
    blocks = (torch.arange(start, min(start + ROWS, n)) for start in range(0, n, ROWS))
    return sum(int(pattern.allowed(block[:, None], keys).sum()) for block in blocks)


def cost(case: Case) -> Cost:
    """The least work of a case: its allowed pairs, and each tensor through memory once a pass.

    Forward: 4 D FLOPs a pair (scores, weighted values); reads q, k, v, writes the output. Backward, 10 D more (scores
    again, dP, dV, dQ, dK); reads q, k, v, output, its gradient and the log-sum-exp, writes three gradients.
    """
    sizes = case.sizes
    n_heads, n, width = sizes["batch"] * sizes["heads"], sizes["n"], sizes["head_dim"]
    pairs = n_heads * n_pairs(pattern_of(case), n)
    tensor, lse = n_heads * n * width * case.dtype.itemsize, 4 * n_heads * n
    if case.mode == BOTH:
        return Cost(
            read_bytes=8 * tensor + lse,
            write_bytes=4 * tensor + lse,
            flops=(FORWARD_FLOPS + BACKWARD_FLOPS) * width * pairs,
            result_bytes=4 * tensor,
        )
    return Cost(read_bytes=3 * tensor, write_bytes=tensor, flops=FORWARD_FLOPS * width * pairs, result_bytes=tensor)
