"""Inputs of gumbel_codebook, and the comparison of an implementation with the oracle, for every test of that op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tolerance import assert_argmax_within_budget, check_against_oracle
from torch import Tensor

from dalle_fast import rng
from dalle_fast.functional import gumbel_codebook, gumbel_noise
from dalle_fast.reference.gumbel_codebook import code_logits

MODES: dict[str, dict[str, bool]] = {
    "soft": {},
    "straight_through": {"straight_through": True},
    "reinmax": {"straight_through": True, "reinmax": True},
}
NAMES = ("features", "weight", "bias", "codebook")
SEED = 2**63 + 5  # one whose 64 bits read as a negative int64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and arguments of some calls: `problems` independent ones, and rows enough, that no maximum is luck."""

    n_codes: int
    dim: int
    n_features: int
    mode: str = "soft"
    dtype: torch.dtype = torch.float32
    temperature: float = 0.9
    with_kl: bool = True
    seeded: bool = False
    first_row: int = 0
    bias: bool = True
    batch: int = 4
    grid: tuple[int, int] = (5, 7)
    problems: int = 4

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [self.mode, dtype, f"K{self.n_codes}", f"D{self.dim}", f"F{self.n_features}", f"tau{self.temperature}"]
        words += [name for name in ("seeded", "with_kl") if getattr(self, name)]
        return "-".join(words)


def make_inputs(
    batch: int = 2,
    n_features: int = 3,
    grid: tuple[int, int] = (2, 3),
    n_codes: int = 7,
    dim: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """features, weight, bias, codebook, noise: logits of standard deviation 2, so that the softmax is not flat.

    Numbers are 0.85 to 1.15 with a random sign: of normal ones a few large rows alone decide a comparison of maxima.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        size, sign = torch.rand(2, *shape, generator=generator)
        return ((0.85 + 0.3 * size) * (2 * sign.round() - 1)).to(dtype)

    noise = rng.gumbel(torch.randint(2**32, (batch, n_codes, *grid), generator=generator))
    return (
        draw(batch, n_features, *grid),
        (draw(n_codes, n_features) * 2 / n_features**0.5).to(dtype),
        draw(n_codes),
        draw(n_codes, dim),
        noise.to(dtype),
    )


def named(inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
    """What make_inputs returns by name, and the noise apart."""
    return dict(zip(NAMES, inputs[:4], strict=True)), inputs[4]


def same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether two lists of results have equal bits."""
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def results(
    impl: str,
    inputs: dict[str, Tensor | None],
    *,
    mode: str = "soft",
    with_kl: bool = True,
    needed: Sequence[str] = NAMES,
    dembeds: Tensor | None = None,
    **noise: object,
) -> tuple[Tensor | None, ...]:
    """embeds, codes, noisy codes, KL of one call at temperature 0.7, and the gradients of `needed`.

    Args: dembeds: gradient of embeds, default ones; that of the KL is 0.3.   noise: seed and first_row or gumbel_noise.
    """
    leaves = {name: None if t is None else t.detach().requires_grad_(name in needed) for name, t in inputs.items()}
    embeds, codes, noisy_codes, kl = gumbel_codebook(
        **leaves, temperature=0.7, with_kl=with_kl, impl=impl, **MODES[mode], **noise
    )
    roots = [embeds, kl] if with_kl else [embeds]
    weights = [torch.ones_like(embeds) if dembeds is None else dembeds, torch.tensor(0.3)]
    wanted = [leaves[name] for name in needed if leaves[name] is not None]
    return (embeds, codes, noisy_codes, kl, *torch.autograd.grad(roots, wanted, weights[: len(roots)]))


def written_noise(
    seed: int, batch: int, n_codes: int, grid: tuple[int, int], first_row: int = 0, impl: str = "reference"
) -> Tensor:
    """The noise that a seed stands for, float32 [B, K, h, w]."""
    rows = first_row + torch.arange(batch * grid[0] * grid[1])
    drawn = gumbel_noise(seed, rows, rng.Stream.VAE, n_codes, impl=impl)
    return drawn.unflatten(0, (batch, *grid)).permute(0, 3, 1, 2)


def check_case(impl: str, case: Case) -> None:
    """Embeddings, KL and every gradient of `impl` are within the oracle's budget, its codes where they are clear."""
    made = [
        make_inputs(case.batch, case.n_features, case.grid, case.n_codes, case.dim, dtype=case.dtype, seed=i)
        for i in range(case.problems)
    ]
    stacked = [torch.stack(tensors) for tensors in zip(*made, strict=True)]
    if case.seeded:
        # float32 at every dtype, as inside a kernel
        sizes = (case.batch, case.n_codes, case.grid)
        stacked[4] = torch.stack([written_noise(SEED + i, *sizes, case.first_row) for i in range(case.problems)])
    check_problems(impl, case, stacked)


def check_problems(impl: str, case: Case, stacked: list[Tensor]) -> None:
    """`check_case` on given tensors, those of make_inputs with one more axis in front."""
    *inputs, noise = stacked
    if not case.bias:
        inputs[2] = None
    codes: dict[str, Tensor] = {}

    def run(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
        def call(features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor) -> tuple:
            results = [
                gumbel_codebook(
                    features[i],
                    weight[i],
                    None if bias is None else bias[i],
                    codebook[i],
                    temperature=case.temperature,
                    with_kl=case.with_kl,
                    impl=name,
                    **MODES[case.mode],
                    **_noise(case, noise, i, written=name == "reference"),
                )
                for i in range(len(features))
            ]
            embeds, codes["codes"], codes["noisy_codes"] = (
                torch.stack(x) for x in list(zip(*results, strict=True))[:3]
            )
            return embeds, torch.stack([result[3] for result in results]) if case.with_kl else None

        return call

    check_against_oracle(run(impl), run("reference"), inputs, case.dtype)
    _check_codes(codes, inputs, noise)


def _noise(case: Case, noise: Tensor, problem: int, *, written: bool) -> dict[str, object]:
    if case.seeded and not written:
        return {"seed": SEED + problem, "first_row": case.first_row}
    return {"gumbel_noise": noise[problem]}


def _check_codes(codes: dict[str, Tensor], inputs: list[Tensor | None], noise: Tensor) -> None:
    """The codes of the call that ran last are those of the largest logits, without and with noise."""
    exact, own = (_scores([None if x is None else x.to(dtype) for x in inputs]) for dtype in (torch.float64, None))
    rows = noise.permute(0, 1, 3, 4, 2)  # [problems, B, h, w, K]
    assert_argmax_within_budget(codes["codes"], exact, own, "codes")
    assert_argmax_within_budget(codes["noisy_codes"], exact + rows.double(), own + rows.float(), "noisy_codes")


def _scores(inputs: list[Tensor | None]) -> Tensor:
    """The logits of each problem, [problems, B, h, w, K]."""
    features, weight, bias, _ = inputs
    biases = [None] * len(features) if bias is None else bias
    logits = [code_logits(*given) for given in zip(features, weight, biases, strict=True)]
    batch, _, height, width = features.shape[1:]
    return torch.stack(logits).unflatten(1, (batch, height, width))
