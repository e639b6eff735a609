"""A training step of the discrete VAE, forward and backward without an optimiser, beside the original with its weights.

Cases: pictures of 256x256, 8192 codes 512 wide, three layers of 64 channels, a KL weight above 0, at batch 8 and 1.
`statistics` is ours as `auto` runs it, collecting what a training log says of the codebook besides; its hard error is
measured on few pictures, so a round is as many steps as that takes, read out once, and its time that of one step.

Ours draws its noise by seed, the original torch's own; the original is verified with given noise. Judged are the loss
and every gradient, against our model in float64 on the oracle, a picture at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import codebook, codebook_peers, peers
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.providers import implementations
from dalle_fast.models import dvae
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.ops import gumbel_codebook as op
from dalle_fast.training.codebook_usage import TrainingStatistics

OP, MODE = "dvae_step", codebook.BOTH
KL_WEIGHT = 1e-5
SHARPEN = 20.0  # times the initial weight of the last convolution: codes differ, as they do once a model has learnt
KERNEL = 4 * 4  # of a convolution that halves or doubles a picture's side

STANDARD: dict[str, Any] = {"image": 256, "codes": 8192, "dim": 512, "layers": 3, "hidden": 64}
CASES = (
    Case("b8", STANDARD | {"batch": 8}),
    Case("b1", STANDARD | {"batch": 1}),
    Case("toy", {"image": 16, "codes": 33, "dim": 7, "layers": 2, "hidden": 6, "batch": 2}, toy=True),
)

Results = dict[str, Tensor]
Step = Callable[[], Results]


class Inputs:
    """Pictures in 0..1 and a model with its weights, of which others are copies."""

    def __init__(self, case: Case, device: torch.device) -> None:
        sizes, generator = case.sizes, torch.Generator().manual_seed(codebook.SEED)
        shape = sizes["batch"], 3, sizes["image"], sizes["image"]
        self.images = torch.rand(shape, generator=generator).to(device)
        self.options = {
            "image_size": sizes["image"],
            "num_tokens": sizes["codes"],
            "codebook_dim": sizes["dim"],
            "num_layers": sizes["layers"],
            "hidden_dim": sizes["hidden"],
            "kl_div_loss_weight": KL_WEIGHT,
            "temperature": codebook.TEMPERATURE,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(codebook.SEED)
            self.model = DiscreteVAE(**self.options)
        with torch.no_grad():
            to_logits = self.model.encoder[-1].weight
            assert isinstance(to_logits, Tensor)
            to_logits.mul_(SHARPEN)
        self.model.to(device)


def bottleneck(case: Case, *, toy: bool = False) -> Case:
    """The case of gumbel_codebook that is in this step."""
    sizes, side = case.sizes, case.sizes["image"] >> case.sizes["layers"]
    inner = {"batch": sizes["batch"], "grid": (side, side), "features": sizes["hidden"], "codes": sizes["codes"]}
    return Case(case.name, inner | {"dim": sizes["dim"], "straight_through": False}, case.dtype, toy, MODE)


def _gradients(model: nn.Module, loss: Tensor) -> Results:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach()} | {f"gradient of {name}": g for name, g in zip(names, found, strict=True)}


def _on(impl: str) -> Any:
    """Within it a DiscreteVAE computes its bottleneck on this implementation."""
    return mock.patch.object(dvae, "gumbel_codebook", functools.partial(op.gumbel_codebook, impl=impl))


def _step(case: Case, inputs: Inputs, impl: str) -> Results:
    with _on(impl):
        loss = inputs.model(inputs.images, return_loss=True, seed=codebook.SEED, first_row=0)
    return _gradients(inputs.model, loss)


# ------------------------------------------------------------------------------------------------ what is right


class Expected:
    """Loss and gradients in float64, and how far off they may be, over the largest of each; computed when asked for."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._question = case, inputs

    @functools.cached_property
    def right(self) -> tuple[Results, float]:
        """The exact results; the oracle's own largest relative error in float32, twice, and one rounding."""
        exact, own = (_by_reference(*self._question, dtype) for dtype in (torch.float64, torch.float32))
        worst = max(_off(own[name], exact[name]) for name in exact)
        return exact, 2 * worst + torch.finfo(torch.float32).eps / 2

    def complaint(self, got: Results, *, slack: float = 1.0) -> str | None:
        """None where `got` is right, or in words which result is wrong, and by how much."""
        exact, allowed = self.right
        if set(got) != set(exact):
            return f"must give {len(exact)} results, gave {len(got)}."
        for name, value in got.items():
            error = _off(value, exact[name])
            if not error <= slack * allowed:  # NaN is not
                return f"{name} must be within {slack * allowed:.3g} of its largest value, is off by {error:.3g}."
        return None


def _off(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def _by_reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Results:
    """The step in `dtype` on the oracle, picture by picture: the loss is a mean, its KL divergence a sum."""
    batch, sizes = case.sizes["batch"], codebook.sizes_of(bottleneck(case))
    model = DiscreteVAE(**inputs.options | {"kl_div_loss_weight": batch * KL_WEIGHT}).to(inputs.images.device, dtype)
    model.load_state_dict(inputs.model.state_dict())
    total: Results = {}
    for picture in range(batch):
        image = inputs.images[picture : picture + 1].to(dtype)
        noise = codebook.noise_of(sizes, picture, image.device)
        noise = noise if dtype == torch.float64 else codebook.as_drawn(noise).to(dtype)
        with _on("reference"):
            loss = model(image, return_loss=True, gumbel_noise=noise) / batch
        found = _gradients(model, loss)
        total = {name: total[name] + value if total else value for name, value in found.items()}
    return total


def _check(case: Case, got: Results, expected: Expected) -> str | None:
    return expected.complaint(got)


# ------------------------------------------------------------------------------------------------ the original


def _original_missing(case: Case, device: torch.device) -> str | None:
    return peers.missing() or codebook_peers.too_large("original_lines", bottleneck(case), device)


def _prepare_original(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model = peers.original().DiscreteVAE(**inputs.options)
    model.load_state_dict(inputs.model.state_dict())
    model.to(device)

    def step() -> Results:
        return _gradients(model, model(inputs.images, return_loss=True))

    def result() -> Results:
        sizes = codebook.sizes_of(bottleneck(case))
        noise = torch.cat([codebook.noise_of(sizes, picture, device).float() for picture in range(sizes.batch)])

        def given(logits: Tensor, *, tau: float, dim: int, hard: bool) -> Tensor:
            return ((logits + noise) / tau).softmax(dim=dim)

        with mock.patch.object(torch.nn.functional, "gumbel_softmax", given):
            return step()

    return Job(result=result, pieces={"step": step})


def _check_original(case: Case, got: Results, expected: Expected) -> str | None:
    return expected.complaint(got, slack=codebook_peers.PEER_SLACK)


# ------------------------------------------------------------------------------------------------ the statistics


def _prepare_statistics(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model, statistics = inputs.model, TrainingStatistics(inputs.model)
    steps = max(1, statistics.pictures_per_hard_one // case.sizes["batch"])

    def step() -> Results:
        loss, found = model(inputs.images, return_loss=True, return_statistics=True, seed=codebook.SEED, first_row=0)
        results = _gradients(model, loss)
        statistics.add(inputs.images, found)
        return results

    def round_of_steps() -> None:
        for _ in range(steps):
            step()
        statistics.row()

    return Job(result=step, pieces={"steps": round_of_steps}, combine=lambda seconds: seconds["steps"] / steps)


# ------------------------------------------------------------------------------------------------ the cost


def cost(case: Case) -> Cost:
    """The least work of a step: its convolutions (twice more backward, but for the pictures' gradient) and bottleneck.

    Bytes: pictures, and the parameters twice; the gradients. Activations are not counted.
    """
    sizes = case.sizes
    batch, side, hidden, n_layers = (sizes[name] for name in ("batch", "image", "hidden", "layers"))
    first = KERNEL * 3 * hidden * (side // 2) ** 2
    encoder = sum(KERNEL * hidden * hidden * (side >> layer) ** 2 for layer in range(2, n_layers + 1))
    widths = [sizes["dim"], *[hidden] * (n_layers - 1)]
    decoder = sum(KERNEL * width * hidden * (side >> n_layers - i) ** 2 for i, width in enumerate(widths))
    last = hidden * 3 * side**2
    inner = codebook.cost(bottleneck(case))
    parameters = KERNEL * hidden * (3 + hidden * (n_layers - 1) + sum(widths)) + 2 * n_layers * hidden
    parameters += 3 * hidden + 3 + sizes["codes"] * (hidden + 1 + sizes["dim"])
    gradients = 4 * parameters
    return Cost(
        read_bytes=4 * batch * 3 * side**2 + 2 * gradients,
        write_bytes=gradients,
        flops=2 * batch * (2 * first + 3 * (encoder + decoder + last)) + inner.flops,
        items=batch,
        unit="pictures",
        result_bytes=gradients,
    )


BENCHMARK = Benchmark(
    op=OP,
    mode=MODE,
    cases=CASES,
    providers=(
        *implementations(
            op.OP,
            _step,
            lambda case, device: {
                "device": device.type,
                "n_features": case.sizes["hidden"],
                "n_codes": case.sizes["codes"],
                "codebook_dim": case.sizes["dim"],
            },
        ),
        Provider("statistics", _prepare_statistics),
        Provider("original", _prepare_original, _original_missing, check=_check_original, packages=peers.PACKAGES),
    ),
    inputs=Inputs,
    expected=Expected,
    check=_check,
    cost=cost,
    baseline="original",
)
