"""The one tolerance of numerical tests: a budget measured on the oracle, not a number somebody chose.

An implementation may be wrong by twice what the oracle itself is wrong at that dtype, plus one rounding of the result:

    max |got - exact| <= 2 max |own - exact| + u max |exact|

exact: the oracle in float64 on the very same numbers.   own: the oracle at the dtype under test.   u: unit roundoff of
that dtype. Maxima are over one tensor. Exact things (masks, indices, tokens) are compared for equality instead; the
largest of several scores wherever it leads by more than the budget.

    check_against_oracle(kernel, oracle, (q, k, v), torch.bfloat16)

A scalar can be right by luck, which leaves nothing to measure: compare scalars of several samples as one tensor. For
two ways to one number in float64, where no better oracle exists, there is assert_same_in_float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | Sequence[Tensor | None] | None]


def budget(exact: Tensor, own: Tensor) -> float:
    """The largest error allowed to an implementation whose results are of the dtype of `own`."""
    return 2 * _max_error(own, exact) + torch.finfo(own.dtype).eps / 2 * _max(exact.abs())


def assert_within_budget(got: Tensor, exact: Tensor, own: Tensor, what: str = "result") -> None:
    """Fails unless `got` is of the dtype and shape of `own`, finite where `exact` is, and within the budget.

    Args: exact: float64, from the oracle.   own: from the oracle at the dtype under test.   what: for the message.
    """
    assert exact.dtype == torch.float64, f"{what}: exact must come from the oracle in float64, got {exact.dtype}"
    assert got.dtype == own.dtype, f"{what}: dtype {got.dtype}, the oracle's is {own.dtype}"
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, the oracle's is {list(exact.shape)}"
    error, allowed = _max_error(got, exact), budget(exact, own)
    # a NaN anywhere makes the comparison false
    assert error <= allowed, (
        f"{what}: error {error:.3g}, allowed {allowed:.3g} ({error / allowed if allowed else 0:.1f}x)"
    )


def assert_same_in_float64(got: Tensor, expected: Tensor, n_terms: int, what: str = "result") -> None:
    """Fails unless two float64 results agree to the roundings of sums of `n_terms` terms of about the largest size.

    Each of n_terms additions may be off by half a unit of the largest partial sum, in either result.
    """
    got, expected = got.detach(), expected.detach()
    assert got.dtype == expected.dtype == torch.float64, f"{what}: dtypes {got.dtype}, {expected.dtype}, not float64"
    assert got.shape == expected.shape, f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    error, allowed = _max_error(got, expected), n_terms * torch.finfo(torch.float64).eps * _max(expected.abs())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_argmax_within_budget(chosen: Tensor, exact: Tensor, own: Tensor, what: str = "codes") -> None:
    """Fails unless `chosen` [...] is the argmax of scores [..., K] wherever that leads by more than the budget.

    Elsewhere it must be one of those that the budget allows to lead: of two scores each may be wrong by it, so none
    further than twice the budget below the best.

    Args: exact: scores in float64, from the oracle.   own: the scores of the oracle at the dtype under test.
    """
    assert chosen.dtype == torch.int64, f"{what}: dtype {chosen.dtype}, not int64"
    assert chosen.shape == exact.shape[:-1], f"{what}: shape {list(chosen.shape)}, scores {list(exact.shape)}"
    lead = exact.amax(-1) - exact.gather(-1, chosen[..., None])[..., 0]
    allowed = 2 * budget(exact, own)
    assert bool((lead <= allowed).all()), (
        f"{what}: {int((lead > allowed).sum())} of {lead.numel()} are up to {_max(lead):.3g} below the best,"
        f" allowed {allowed:.3g}"
    )


def outputs_and_gradients(
    function: Function, inputs: Sequence[Tensor | None], dtype: torch.dtype, *, backward: bool = True
) -> dict[str, Tensor]:
    """What `function(*inputs)` returns at `dtype`, and the gradient of every input.

    Args:
        inputs: floating tensors are converted to dtype and differentiated, others and None are passed as they are.
        backward: False leaves the gradients out.
    Returns: {"output 0": ..., "gradient 0": ...}, numbered as returned and as given. It is the gradient of a sum of the
        floating outputs with fixed weights, the same at every dtype.
    """
    leaves = [
        x.detach().to(dtype).requires_grad_(backward) if x is not None and x.is_floating_point() else x for x in inputs
    ]
    returned = function(*leaves)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned or ())
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs) if y is not None}
    if not backward:
        return results
    roots = [y for y in outputs if y is not None and y.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y) for y in roots]
    wanted = {f"gradient {i}": x for i, x in enumerate(leaves) if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(roots, list(wanted.values()), weights, allow_unused=True)
    results.update((name, g) for name, g in zip(wanted, gradients, strict=True) if g is not None)
    return results


def check_against_oracle(
    function: Function,
    oracle: Function,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    backward: bool = True,
) -> None:
    """Every output and every gradient of `function` at `dtype` is within the budget of `oracle`; indices are equal.

    Args: inputs: positional tensors of both; rounded to dtype first, so that float64 sees the same numbers.
    """
    rounded = [x.detach().to(dtype) if x is not None and x.is_floating_point() else x for x in inputs]
    exact = outputs_and_gradients(oracle, rounded, torch.float64, backward=backward)
    own = outputs_and_gradients(oracle, rounded, dtype, backward=backward)
    got = outputs_and_gradients(function, rounded, dtype, backward=backward)
    assert got.keys() == exact.keys(), f"got {sorted(got)}, the oracle gives {sorted(exact)}"
    for name, value in got.items():
        if value.is_floating_point():
            assert_within_budget(value, exact[name], own[name], name)
        else:
            assert torch.equal(value, exact[name]), f"{name}: {(value != exact[name]).sum()} of {value.numel()} differ"


def _max(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _max_error(x: Tensor, exact: Tensor) -> float:
    # equal infinities are no error; NaN survives the subtraction
    difference = torch.where(x.double() == exact, 0.0, (x.double() - exact).abs())
    return _max(difference)
