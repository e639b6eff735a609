"""What every provider of attention is given, asked for and judged by: inputs, the two modes, the oracle, the cost.

q, k and v are views of packed [B, N, 3, H, D] memory, as the models pass them. `forward` is the output without
autograd; `forward+backward` is the output and the gradients of q, k and v.

The oracle is the op's reference in float64, and its error at the dtype of the case is what a provider may err twice
(tests/tolerance.py). Heads are independent of each other, so large cases are judged on some (sample, head) slices, the
last among them; the tests of the op judge every one.
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
JUDGED_SCORES = 20_000_000  # query-key pairs that the oracle computes a case: seconds
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
    return _draw(_shape(case), case.dtype, device)


def _shape(case: Case) -> tuple[int, int, int, int]:
    """(B, N, H, D)"""
    sizes = case.sizes
    return sizes["batch"], sizes["n"], sizes["heads"], sizes["head_dim"]


def _draw(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    packed = torch.randn(*shape[:2], 3, *shape[2:], generator=generator).to(device, dtype)
    dout = torch.randn(shape, generator=generator).to(device, dtype)
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


class Right(NamedTuple):
    """What is right, on some slices: results in float64 [slices, N, D], and the error allowed to each."""

    slices: tuple[int, ...]
    exact: tuple[Tensor, ...]
    budgets: tuple[float, ...]


class Oracle:
    """Judges results of a case; what it needs for a pattern is computed when first asked for."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._question = _shape(case), case.dtype, inputs.q.device, case.mode or FORWARD

    def complaint(self, got: tuple[Tensor, ...], pattern: AttentionPattern, slack: float = 1.0) -> str | None:
        """None where `got` (out and, in the mode with a backward, dq, dk, dv) is attention over `pattern`.

        Otherwise in words which of them is wrong, and by how much. The budget is multiplied by `slack`.
        """
        right = _right(pattern, *self._question)
        judged = [_slices_of(x, right.slices) for x in got]
        return judge(NAMES, judged, right.exact, tuple(slack * one for one in right.budgets))


# Cases of one shape follow each other, and causal peers owe the same in all of them.
@functools.lru_cache(maxsize=2)
def _right(
    pattern: AttentionPattern,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    mode: str,
) -> Right:
    batch, n, heads, _ = shape
    step = max(1, -(-batch * heads * n * n // JUDGED_SCORES))
    slices = tuple(range(batch * heads - 1, -1, -step))
    inputs = [_slices_of(x, slices) for x in _draw(shape, dtype, device)]
    attend = functools.partial(sparse_attention, pattern=pattern, impl="reference")

    def by_reference(at: torch.dtype) -> tuple[Tensor, ...]:
        # slice by slice: in float64 the scores of one head of a large grid are most of a gigabyte
        found = [
            attend_in(mode, attend, Inputs(*(x[None, i : i + 1].to(at) for x in inputs))) for i in range(len(slices))
        ]
        return tuple(torch.cat([part[0] for part in parts]) for parts in zip(*found, strict=True))

    exact, own = by_reference(torch.float64), by_reference(dtype)
    reference.dense_mask.cache_clear()  # gigabytes at a large grid
    return Right(slices, exact, tuple(budget(e, o) for e, o in zip(exact, own, strict=True)))


def _slices_of(x: Tensor, slices: tuple[int, ...]) -> Tensor:
    """[slices, N, D] of [B, H, N, D]."""
    heads = x.shape[1]
    return torch.stack([x[i // heads, i % heads] for i in slices])


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
