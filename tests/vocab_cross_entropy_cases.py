"""Inputs of vocab_cross_entropy, and the comparison of an implementation with the oracle, for every test of that op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tolerance import check_against_oracle
from torch import Tensor

from dalle_fast.functional import vocab_cross_entropy
from dalle_fast.layout import TokenLayout

NAMES = ("hidden", "norm_weight", "norm_bias", "weight", "bias")


class Inputs(NamedTuple):
    """hidden [B, N, C], norm weight and bias [C], weight [V, C], bias [V] or None, labels [B, N]."""

    hidden: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor


@dataclass(frozen=True)
class Case:
    """Sizes and arguments of some calls: `problems` independent ones, so that no maximum is luck.

    Attributes:
        codes: rows of the weight, text and image.   n_text: positions that predict text.   n: positions in all, None:
            as many as the layout allows.   ignored: every so many labels do not count.
    """

    codes: tuple[int, int] = (9, 5)
    width: int = 6
    dtype: torch.dtype = torch.float32
    divide_max: bool = False
    bias: bool = True
    batch: int = 2
    n_text: int = 7
    grid: tuple[int, int] = (3, 5)
    n: int | None = None
    ignored: int = 5
    problems: int = 8

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.n_text + 1, self.grid)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        rows = self.batch * (self.layout.max_inputs if self.n is None else self.n)
        words = [dtype, f"V{self.codes[0]}+{self.codes[1]}", f"C{self.width}", f"rows{rows}"]
        words += [name for name in ("divide_max", "bias") if getattr(self, name)]
        return "-".join(words)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Logits of standard deviation 2, so that the softmax is not flat; rows whose maximum is negative, too.

    Numbers are 0.85 to 1.15 with a random sign: of normal ones a few large rows alone decide a comparison of maxima.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        size, sign = torch.rand(2, *shape, generator=generator)
        return (0.85 + 0.3 * size) * (2 * sign.round() - 1)

    n, (text, image), width = case.layout.max_inputs if case.n is None else case.n, case.codes, case.width
    n_text = min(case.n_text, n)
    offset = torch.tensor([0.5, -3.0])[torch.arange(n) % 2]
    labels = torch.cat(
        [
            torch.randint(max(codes, 1), (case.batch, count), generator=generator)
            for codes, count in ((text, n_text), (image, n - n_text))
        ],
        dim=1,
    )
    if case.ignored:
        labels.view(-1)[3 :: case.ignored] = -100
    return Inputs(
        (draw(case.batch, n, width) + offset[:, None]).to(case.dtype),
        (1 + draw(width) / 4).to(case.dtype),
        (draw(width) / 4).to(case.dtype),
        (draw(text + image, width) * 2 / width**0.5).to(case.dtype),
        draw(text + image).to(case.dtype) if case.bias else None,
        labels,
    )


def losses_of(
    impl: str, case: Case, inputs: Inputs, *, function: Callable[..., tuple[Tensor, Tensor]] = vocab_cross_entropy
) -> tuple[Tensor, Tensor]:
    """loss_text and loss_image of one call, of `function` where the op is wrapped."""
    return function(
        inputs.hidden,
        (inputs.norm_weight, inputs.norm_bias),
        inputs.weight,
        inputs.bias,
        inputs.labels,
        case.layout,
        case.codes[0],
        divide_max=case.divide_max,
        impl=impl,
    )


def results(
    impl: str, case: Case, inputs: Inputs, *, needed: Sequence[str] = NAMES, rates: tuple[float, float] = (0.7, 1.9)
) -> tuple[Tensor | None, ...]:
    """loss_text and loss_image of one call, and the gradients of `needed`.

    Args: rates: gradients of the two losses; of 0 the loss is left out.
    """
    given = {name: t for name in NAMES if (t := getattr(inputs, name)) is not None}
    leaves = inputs._replace(**{name: t.detach().requires_grad_(name in needed) for name, t in given.items()})
    losses = losses_of(impl, case, leaves)
    roots = sum(rate * loss for rate, loss in zip(rates, losses, strict=True) if rate)
    wanted = [getattr(leaves, name) for name in needed if name in given]
    return (*(loss.detach() for loss in losses), *torch.autograd.grad(roots, wanted))


def same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether two lists of results have equal bits."""
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_case(impl: str, case: Case) -> None:
    """Losses and every gradient of `impl` are within the oracle's budget."""
    check_problems(impl, case, [make_inputs(case, seed=i) for i in range(case.problems)])


def check_problems(impl: str, case: Case, problems: Sequence[Inputs]) -> None:
    """`check_case` on given inputs."""
    *stacked, labels = (None if tensors[0] is None else torch.stack(tensors) for tensors in zip(*problems, strict=True))

    def run(name: str) -> Callable[..., list[Tensor]]:
        def call(*tensors: Tensor | None) -> list[Tensor]:
            calls = [Inputs(*(None if t is None else t[i] for t in (*tensors, labels))) for i in range(len(labels))]
            found = [losses_of(name, case, inputs) for inputs in calls]
            return [torch.stack(losses) for losses in zip(*found, strict=True)]

        return call

    check_against_oracle(run(impl), run("reference"), stacked, case.dtype)
