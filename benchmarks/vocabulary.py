"""What the benchmark of vocab_cross_entropy measures: inputs, the oracle, bytes and FLOPs of a call.

A call gives a dict: `losses` (text and image), and in the mode "forward+backward" the gradients of hidden, the norm's
weight and bias, weight and bias, of the losses weighted as DALLE weights them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Cost
from dalle_fast.layout import TokenLayout
from dalle_fast.ops.vocab_cross_entropy import vocab_cross_entropy
from tests.tolerance import budget

FORWARD, BOTH = "forward", "forward+backward"
SEED = 11
RATES = (1 / 8, 7 / 8)  # of the losses: DALLE's, with its image loss weighted 7
GRADIENTS = ("dhidden", "dnorm_weight", "dnorm_bias", "dweight", "dbias")

Results = dict[str, Tensor]
Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Inputs(NamedTuple):
    """hidden [B, N, C], norm weight and bias [C], weight [V, C], bias [V], int64 labels [B, N]."""

    hidden: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """On a device, numbers in a dtype."""
        *floating, labels = self
        return Inputs._make([*(t.to(device, dtype) for t in floating), labels.to(device)])


class Sizes(NamedTuple):
    """B samples of positions that predict text and image codes, rows of the weight for each, C channels."""

    batch: int
    n_text: int
    grid: tuple[int, int]
    text_codes: int
    image_codes: int
    width: int

    @property
    def layout(self) -> TokenLayout:
        """Where text ends."""
        return TokenLayout(self.n_text + 1, self.grid)

    @property
    def logits(self) -> int:
        """Logits that a loss is computed of, of a sample."""
        return self.n_text * self.text_codes + self.layout.n_image * self.image_codes


def sizes_of(case: Case) -> Sizes:
    """The sizes that a case names."""
    text_codes, image_codes = case.sizes["codes"]
    return Sizes(
        case.sizes["batch"], case.sizes["n_text"], case.sizes["grid"], text_codes, image_codes, case.sizes["width"]
    )


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits that spread over some units."""
    return _draw(sizes_of(case), case.dtype, device)


def _draw(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    n, width, n_codes = sizes.layout.max_inputs, sizes.width, sizes.text_codes + sizes.image_codes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    labels = [
        torch.randint(codes, (sizes.batch, count), generator=generator)
        for codes, count in ((sizes.text_codes, sizes.n_text), (sizes.image_codes, n - sizes.n_text))
    ]
    floating = (
        normal(sizes.batch, n, width),
        normal(width).mul_(0.1).add_(1),
        normal(width).mul_(0.1),
        normal(n_codes, width).mul_(2 * width**-0.5),
        normal(n_codes),
    )
    return Inputs(*floating, torch.cat(labels, dim=1)).to(device, dtype)


def call_in(mode: str, call: Call, inputs: Inputs) -> Results:
    """What `call` gives, in the mode "forward+backward" with the gradients behind it."""
    if mode == FORWARD:
        with torch.no_grad():
            return {"losses": torch.stack(call(*inputs))}
    leaves = Inputs._make([*(t.detach().requires_grad_() for t in inputs[:5]), inputs.labels])
    losses = call(*leaves)
    gradients = torch.autograd.grad(
        losses, leaves[:5], [torch.full_like(x, r) for x, r in zip(losses, RATES, strict=True)]
    )
    return {"losses": torch.stack(losses).detach()} | dict(zip(GRADIENTS, gradients, strict=True))


def ours(impl: str, sizes: Sizes) -> Call:
    """An implementation as a call."""

    def call(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm = (norm_weight, norm_bias)
        return vocab_cross_entropy(hidden, norm, weight, bias, labels, sizes.layout, sizes.text_codes, impl=impl)

    return call


# ------------------------------------------------------------------------------------------------ the oracle


class Oracle:
    """Judges results of a case; what is right is computed when first asked for."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.mode = case.mode or FORWARD
        self._question = sizes_of(case), case.dtype, inputs.hidden.device

    def complaint(self, got: Results, *, slack: float = 1.0, rounded_to: torch.dtype | None = None) -> str | None:
        """None where `got` is right; otherwise in words which result is wrong, and by how much.

        Args:
            slack: multiplies every budget.   rounded_to: every number may also be off by `slack` roundings to it.
        """
        exact_results, budgets = _right(*self._question)
        names = ("losses", *(GRADIENTS if self.mode == BOTH else ()))
        if set(got) != set(names):
            return f"must give {', '.join(names)}, gave {', '.join(got)}."
        for name in names:
            exact, allowed = exact_results[name], budgets[name]
            if got[name].shape != exact.shape:
                return f"{name} must be {list(exact.shape)}, is {list(got[name].shape)}."
            if rounded_to is not None:
                allowed += torch.finfo(rounded_to).eps * exact.abs().max().item()
            error = (got[name].double() - exact).abs().max().item()
            if not error <= slack * allowed:  # NaN is not
                return f"{name} must be within {slack * allowed:.3g} of float64, is off by {error:.3g}."
        return None


# Forward and backward cases of one shape follow each other.
@functools.lru_cache(maxsize=1)
def _right(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Results, dict[str, float]]:
    """Results in float64, and the error allowed to each."""
    inputs = _draw(sizes, dtype, device)
    wide = inputs.to(device, torch.float64)
    exact, own = (call_in(BOTH, ours("reference", sizes), given) for given in (wide, inputs))
    budgets = {name: budget(exact[name], own[name]) for name in GRADIENTS}
    # a mean may be right by luck, its terms are not
    budgets["losses"] = budget(*(_row_losses(sizes, given) for given in (wide, inputs)))
    return exact, budgets


def _row_losses(sizes: Sizes, inputs: Inputs) -> Tensor:
    """Every row's loss, in the precision of the inputs as the oracle has it."""
    dtype = torch.promote_types(inputs.hidden.dtype, torch.float32)
    norm_weight, norm_bias = inputs.norm_weight.to(dtype), inputs.norm_bias.to(dtype)
    normed = F.layer_norm(inputs.hidden.to(dtype), (sizes.width,), norm_weight, norm_bias)
    normed = normed.to(inputs.hidden.dtype).to(dtype)
    n, v = sizes.n_text, sizes.text_codes
    losses = []
    for positions, codes in ((slice(0, n), slice(0, v)), (slice(n, None), slice(v, None))):
        logits = F.linear(normed[:, positions], inputs.weight[codes].to(dtype), inputs.bias[codes].to(dtype))
        labels = inputs.labels[:, positions].flatten()
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels, reduction="none"))
    return torch.cat(losses)


# ------------------------------------------------------------------------------------------------ the cost


def cost(case: Case) -> Cost:
    """The least work of a case: its matrix products, and each tensor through memory once a pass.

    With P logits that count and C channels, forward 2 C P FLOPs, backward 4 C P (gradients of normed rows and weight):
    what computes logits again in its backward pass, as ours does, spends 2 C P more, and so at most 75 % of its time on
    this. Forward reads all inputs and writes two losses; backward reads the inputs and writes a gradient of each.
    """
    sizes, itemsize = sizes_of(case), case.dtype.itemsize
    rows, n_codes = sizes.batch * sizes.layout.max_inputs, sizes.text_codes + sizes.image_codes
    floating = itemsize * (rows * sizes.width + 2 * sizes.width + n_codes * (sizes.width + 1))
    inputs = floating + rows * torch.int64.itemsize
    both = case.mode == BOTH
    results = 2 * torch.float32.itemsize + (floating if both else 0)
    return Cost(
        read_bytes=inputs * (2 if both else 1),
        write_bytes=results,
        flops=2 * sizes.width * sizes.batch * sizes.logits * (3 if both else 1),
        items=sizes.batch,
        unit="samples",
        result_bytes=results,
    )
