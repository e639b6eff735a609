"""What the benchmark of gumbel_codebook measures: inputs, the noise of a seed, the oracle, bytes and FLOPs of a call.

A call gives a dict: embeds and kl, from implementations of ours also codes and noisy_codes, and in the mode
"forward+backward" the gradients of features, weight, bias and codebook for given gradients of embeds and kl.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, Cost
from dalle_fast import rng
from dalle_fast.ops.gumbel_codebook import gumbel_codebook
from dalle_fast.reference import gumbel_noise as noise_reference
from tests.tolerance import budget

FORWARD, BOTH = "forward", "forward+backward"
SEED = 11  # of inputs and noise; no row of a straight-through case has two codes too near to tell apart with it
TEMPERATURE = 0.9
NOISE_ERROR = 2.0**-22  # what an implementation's noise n may be off by, over max(1, |n|)
GRADIENTS = ("dfeatures", "dweight", "dbias", "dcodebook")

Results = dict[str, Tensor]
Call = Callable[[Tensor, Tensor, Tensor, Tensor], Results]


class Inputs(NamedTuple):
    """features [B, F, h, w], weight [K, F], bias [K], codebook [K, D], dembeds [B, D, h, w] and the scalar dkl."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    codebook: Tensor
    dembeds: Tensor
    dkl: Tensor


class Sizes(NamedTuple):
    """B pictures of h x w positions, F features, K codes of D channels."""

    batch: int
    height: int
    width: int
    features: int
    codes: int
    dim: int

    @property
    def positions(self) -> int:
        """Rows of a picture."""
        return self.height * self.width


def sizes_of(case: Case) -> Sizes:
    """The sizes that a case names."""
    sizes = case.sizes
    height, width = sizes["grid"]
    return Sizes(sizes["batch"], height, width, sizes["features"], sizes["codes"], sizes["dim"])


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Logits that spread over some units, and gradients of embeds and kl that matter alike."""
    return _draw(sizes_of(case), case.dtype, device)


def _draw(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    batch, height, width, n_features, n_codes, dim = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        normal(batch, n_features, height, width).relu_().to(device, dtype),
        normal(n_codes, n_features).mul_(2 * n_features**-0.5).to(device, dtype),
        normal(n_codes).to(device, dtype),
        normal(n_codes, dim).to(device, dtype),
        normal(batch, dim, height, width).mul_(dim**-0.5).to(device, dtype),
        torch.ones((), device=device),
    )


def noise_of(sizes: Sizes, picture: int, device: torch.device) -> Tensor:
    """The exact noise of SEED for one picture of the batch, float64 [1, K, h, w]."""
    rows = torch.arange(picture * sizes.positions, (picture + 1) * sizes.positions, device=device)
    words = noise_reference.words(rng.seeds_to_tensor(SEED, device), rows, int(rng.Stream.VAE), sizes.codes)
    noise = -torch.log(-torch.log(rng.uniform(words).double()))
    return noise.view(1, sizes.height, sizes.width, sizes.codes).permute(0, 3, 1, 2)


def as_drawn(noise: Tensor) -> Tensor:
    """The exact noise, off by what an implementation that draws it may be off by, up or down at random."""
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(2, noise.shape, generator=generator, dtype=torch.int8).to(noise.device) * 2 - 1
    return noise + NOISE_ERROR * signs * noise.abs().clamp_min(1.0)


def call_in(mode: str, call: Call, inputs: Inputs) -> Results:
    """What `call` gives, in the mode "forward+backward" with the gradients behind it."""
    if mode == FORWARD:
        with torch.no_grad():
            return call(*inputs[:4])
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    found = call(*leaves)
    dkl = inputs.dkl.to(found["kl"].dtype)
    gradients = torch.autograd.grad((found["embeds"], found["kl"]), leaves, (inputs.dembeds, dkl))
    return {name: x.detach() for name, x in found.items()} | dict(zip(GRADIENTS, gradients, strict=True))


def ours(impl: str, *, hard: bool, noise: Tensor | None = None) -> Call:
    """An implementation as a call: its noise is that of SEED, or given, [B, K, h, w]."""

    def call(features: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor) -> Results:
        embeds, codes, noisy_codes, kl = gumbel_codebook(
            features,
            weight,
            bias,
            codebook,
            temperature=TEMPERATURE,
            seed=SEED if noise is None else None,
            gumbel_noise=noise,
            straight_through=hard,
            with_kl=True,
            impl=impl,
        )
        assert kl is not None
        return {"embeds": embeds, "codes": codes, "noisy_codes": noisy_codes, "kl": kl}

    return call


# ------------------------------------------------------------------------------------------------ the oracle


class Right(NamedTuple):
    """What is right: results in float64 and the error allowed to each, from that of the oracle on noise `as_drawn`.

    Codes are judged by their scores: those of every code, one picture at a time, and how far below the largest the
    score of a chosen one may be.
    """

    exact: Results
    budgets: dict[str, float]
    score_budgets: dict[str, float]  # codes, noisy_codes


class Oracle:
    """Judges results of a case; what is right is computed when first asked for, a picture at a time."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.mode = case.mode or FORWARD
        self._question = sizes_of(case), case.dtype, case.sizes["straight_through"], inputs.features.device

    def complaint(
        self, got: Results, *, slack: float = 1.0, rounded_to: torch.dtype | None = None, codes: bool = True
    ) -> str | None:
        """None where `got` is right; otherwise in words which result is wrong, and by how much.

        Args:
            slack: multiplies every budget.   codes: they must be there, too.
            rounded_to: every number may also be off by `slack` roundings to this dtype.
        """
        right = _right(*self._question)
        names = ("embeds", "kl", *(GRADIENTS if self.mode == BOTH else ()))
        wanted = {*names, *(right.score_budgets if codes else ())}
        if set(got) != wanted:
            return f"must give {', '.join(sorted(wanted))}, gave {', '.join(sorted(got))}."
        for name in names:
            exact, allowed = right.exact[name], right.budgets[name]
            if got[name].shape != exact.shape:
                return f"{name} must be {list(exact.shape)}, is {list(got[name].shape)}."
            if rounded_to is not None:
                allowed += torch.finfo(rounded_to).eps * exact.abs().max().item()
            error = (got[name].double() - exact).abs().max().item()
            if not error <= slack * allowed:  # NaN is not
                return f"{name} must be within {slack * allowed:.3g} of float64, is off by {error:.3g}."
        return self._complaint_of_codes(got, right) if codes else None

    def _complaint_of_codes(self, got: Results, right: Right) -> str | None:
        sizes, dtype, _, device = self._question
        inputs = _draw(sizes, dtype, device)
        for picture in range(sizes.batch):
            scores = _scores(inputs, picture, noise_of(sizes, picture, device), torch.float64)
            for name, allowed in right.score_budgets.items():
                chosen = scores[name].gather(1, got[name][picture : picture + 1, None]).squeeze(1)
                worst = (scores[name].amax(dim=1) - chosen).max().item()
                if not worst <= allowed:
                    return f"{name} must score within {allowed:.3g} of the largest, one is {worst:.3g} below it."
        return None


def _scores(inputs: Inputs, picture: int, noise: Tensor, dtype: torch.dtype) -> Results:
    """Logits without and with noise, [1, K, h, w], of one picture, computed in `dtype`."""
    features = inputs.features[picture : picture + 1].to(dtype)
    weight, bias = inputs.weight.to(dtype)[:, :, None, None], inputs.bias.to(dtype)
    logits = torch.nn.functional.conv2d(features, weight, bias)
    return {"codes": logits, "noisy_codes": logits + noise.to(dtype)}


# Forward and backward cases of one shape follow each other; a large batch takes a minute and 300 MB.
@functools.lru_cache(maxsize=1)
def _right(sizes: Sizes, dtype: torch.dtype, hard: bool, device: torch.device) -> Right:
    inputs = _draw(sizes, dtype, device)
    sums = {at: dict[str, Tensor]() for at in (torch.float64, dtype)}
    pictures: dict[str, list[Tensor]] = {"embeds": [], "dfeatures": []}
    budgets, score_budgets = dict.fromkeys(pictures, 0.0), {"codes": 0.0, "noisy_codes": 0.0}
    kl_budget = 0.0
    for picture in range(sizes.batch):
        noise = noise_of(sizes, picture, device)
        exact = _by_reference(inputs, picture, noise, hard, torch.float64)
        own = _by_reference(inputs, picture, as_drawn(noise), hard, dtype)
        for name, parts in pictures.items():
            parts.append(exact[name])
            budgets[name] = max(budgets[name], budget(exact[name], own[name]))
        for at, found in ((torch.float64, exact), (dtype, own)):
            for name in ("kl", "dweight", "dbias", "dcodebook"):
                term = found[name].to(torch.promote_types(at, torch.float32))
                sums[at][name] = sums[at][name] + term if picture else term
        exact, own = (_scores(inputs, picture, noise, at) for at in (torch.float64, torch.float32))
        allowed = _score_budgets(exact, own, noise, must_differ=hard)
        score_budgets = {name: max(score_budgets[name], allowed[name]) for name in allowed}
        # the sum may be right by luck, its terms are not
        kl_budget += sizes.positions * budget(_divergences(exact["codes"]), _divergences(own["codes"]))
    budgets |= {name: budget(total, sums[dtype][name].to(dtype)) for name, total in sums[torch.float64].items()}
    budgets["kl"] = kl_budget
    whole = {name: torch.cat(parts) for name, parts in pictures.items()}
    return Right(whole | sums[torch.float64], budgets, score_budgets)


def _by_reference(inputs: Inputs, picture: int, noise: Tensor, hard: bool, dtype: torch.dtype) -> Results:
    features, dembeds = (x[picture : picture + 1].to(dtype) for x in (inputs.features, inputs.dembeds))
    weight, bias, codebook = (x.to(dtype) for x in inputs[1:4])
    given = Inputs(features, weight, bias, codebook, dembeds, inputs.dkl)
    noise = noise.to(torch.promote_types(dtype, torch.float32))
    return call_in(BOTH, ours("reference", hard=hard, noise=noise), given)


def _score_budgets(exact: Results, own: Results, noise: Tensor, *, must_differ: bool) -> dict[str, float]:
    """How far below the largest score a chosen one may be, from the scores in float64 and float32.

    Raises: RuntimeError (`must_differ`, and two codes are nearer than that: results then may differ by a whole code).
    """
    allowed = {name: budget(exact[name], own[name]) for name in exact}
    allowed["noisy_codes"] += 2 * NOISE_ERROR * max(1.0, noise.abs().max().item())
    if must_differ:
        first, second = exact["noisy_codes"].topk(2, dim=1).values.unbind(1)
        if not (first - second).min().item() > allowed["noisy_codes"]:
            raise RuntimeError("codebook: the best two codes of a straight-through case must differ. Change SEED.")
    return allowed


def _divergences(logits: Tensor) -> Tensor:
    """The KL divergence of each position's codes from the uniform distribution, [1, h, w], from logits [1, K, h, w]."""
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=1)


# ------------------------------------------------------------------------------------------------ the cost


def cost(case: Case) -> Cost:
    """The least work of a case, for M = B h w rows: its matrix products, and each tensor through memory once a pass.

    Forward, soft: 2 M K (F + D) FLOPs (logits, mixture); straight-through 2 M K F (its codes are looked up). Backward:
    2 M K (3 F + 2 D) (logits again, gradients of probabilities, features, weight, codebook); straight-through
    2 M K (3 F + D). Not counted: a Philox word, two logarithms and some exponentials a logit.
    Forward reads features, weight, bias, codebook and writes embeds, codes, noisy codes; backward reads these inputs,
    embeds (soft) and their gradient, and writes four gradients.
    """
    sizes, hard, itemsize = sizes_of(case), case.sizes["straight_through"], case.dtype.itemsize
    rows = sizes.batch * sizes.positions
    inputs = itemsize * (rows * sizes.features + sizes.codes * (sizes.features + 1 + sizes.dim))
    embeds = itemsize * rows * sizes.dim
    results = embeds + 2 * rows * torch.int64.itemsize + torch.float32.itemsize
    products = sizes.features + (0 if hard else sizes.dim)
    read = inputs
    if case.mode == BOTH:
        products += 3 * sizes.features + (1 if hard else 2) * sizes.dim
        read += inputs + (1 if hard else 2) * embeds
        results += inputs  # as large as their gradients
    return Cost(
        read_bytes=read,
        write_bytes=results,
        flops=2 * rows * sizes.codes * products,
        items=sizes.batch,
        unit="pictures",
        result_bytes=results,
    )
