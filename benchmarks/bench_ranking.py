"""What comes behind the codes of 32 pictures of one prompt: their pixels, and their ranks by CLIP.

`codes` is what `generate_images` does before; the share of both in the time of drawing is read off the ratio. CLIP is
this package's own, of its default size: 512 wide, six blocks each for 256 text tokens and 64 patches of 32x32.

Judged are pixels and scores, against float64. Cost: the products of the decoder's convolutions and of CLIP, whose text
is read once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoding
from benchmarks.bench_sampler import DTYPES, TOY, cpu_missing
from benchmarks.decoding import CYCLE, D512, SEED, Inputs
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from dalle_fast.models.clip import CLIP
from tests.tolerance import budget

MODE = "pixels and ranks"
PATCH = 32
CASES = (
    *(Case("d512_b32", D512 | {"attn_types": CYCLE, "batch": 32, "clip_dim": 512}, dtype) for dtype in DTYPES),
    Case("toy", TOY | {"attn_types": CYCLE, "batch": 3, "clip_dim": 64}, toy=True),
)
Results = dict[str, Tensor]


class Models(Inputs):
    """Those of the sampler, and a CLIP that sees pictures and reads texts of their size."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.side, self.width = 8 * case.sizes["grid"], case.sizes["clip_dim"]
        clip = CLIP(
            **dict.fromkeys(("dim_text", "dim_image", "dim_latent"), self.width),
            text_seq_len=case.sizes["text_seq_len"],
            visual_image_size=self.side,
            visual_patch_size=min(PATCH, self.side),
        )
        self.clip = clip.to(device, case.dtype).eval()
        self.texts = self.text.expand(self.batch, -1)

    def pixels(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.vae.decode(tokens)

    def ranks(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.clip(self.texts, images)


class Expected:
    """Pixels of the two histories and their scores in float64, and how far off each may be."""

    def __init__(self, case: Case, inputs: Models) -> None:
        exact, own = copy.deepcopy(inputs), inputs
        for model in (exact.model, exact.clip):
            model.double()
        found = []
        for models, images in ((exact, None), (own, None)):
            images = models.pixels(inputs.tokens)
            models.texts = inputs.text.expand(len(images), -1)
            found.append({"pixels": images, "ranks": models.ranks(images)})
        inputs.texts = inputs.text.expand(inputs.batch, -1)
        self.exact = found[0]
        self.budgets = {name: budget(found[0][name], found[1][name]) for name in found[0]}

    def complaint(self, got: Results) -> str | None:
        for name, exact in self.exact.items():
            repeated = exact[torch.arange(len(got[name]), device=exact.device) % len(exact)]
            worst = (got[name].double() - repeated).abs().max().item()
            if not worst <= self.budgets[name]:
                return f"{name} must be within {self.budgets[name]:.3g} of float64, are off by {worst:.3g}."
        return None


def _prepare(case: Case, inputs: Models, device: torch.device) -> Job:
    tokens = inputs.tokens_of_all()
    images = inputs.pixels(tokens)

    def result() -> Results:
        return {"pixels": inputs.pixels(tokens), "ranks": inputs.ranks(images)}

    calls: dict[str, Callable[[], object]] = {
        "pixels": lambda: inputs.pixels(tokens),
        "ranks": lambda: inputs.ranks(images),
    }
    return Job(result=result, pieces=calls)


def _prepare_codes(case: Case, inputs: Models, device: torch.device) -> Job:
    """The codes alone: a VAE that makes no pixels in its place."""
    model = copy.deepcopy(inputs.model)
    model.vae.decode = lambda codes: codes
    settings: dict[str, Any] = {"engine": "cpu", "seed": SEED}

    def draw() -> Any:
        return model.generate_images(inputs.texts, **settings)

    return Job(result=lambda: draw().shape, pieces={"codes": draw})


def _check(case: Case, got: Results, expected: Expected) -> str | None:
    return expected.complaint(got)


def _check_codes(case: Case, got: object, expected: Expected) -> str | None:
    """The codes themselves are the sampler's to judge."""
    wanted = torch.Size((case.sizes["batch"], decoding.n_image(case)))
    return None if got == wanted else f"codes must be {list(wanted)}, got {got}."


def cost(case: Case) -> Cost:
    """Two products a weight and place; of the decoder the transposed convolutions, of CLIP all but attention's."""
    sizes, batch = case.sizes, case.sizes["batch"]
    side, hidden, width = 8 * sizes["grid"], 64, sizes["clip_dim"]
    # kernels of 4x4 that double the side three times, from the codebook's 512 channels; then 1x1 to three
    decoder = sum(16 * n_in * hidden * (side >> i) ** 2 for i, n_in in ((3, 512), (2, hidden), (1, hidden)))
    decoder += hidden * 3 * side**2
    patch = min(PATCH, side)
    patches = (side // patch) ** 2
    block = 4 * width * 512 + 12 * width**2  # eight heads of 64
    encoders = 6 * block * (sizes["text_seq_len"] + batch * patches) + batch * patches * 3 * patch**2 * width
    return Cost(flops=2 * (batch * decoder + encoders), items=batch, unit="images")


BENCHMARK = Benchmark(
    op="ranking",
    mode=MODE,
    cases=CASES,
    providers=(
        Provider("pixels_and_ranks", _prepare),
        Provider("codes", _prepare_codes, cpu_missing, check=_check_codes, cost=decoding.cost),
    ),
    inputs=Models,
    expected=Expected,
    check=_check,
    cost=cost,
    baseline="codes",
    cold=False,
)
