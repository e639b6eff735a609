"""What the benchmarks of decoding share: a model, what its weights mean in float64, sampled positions, the cost.

Weights are random, with LayerScale large enough that every layer matters. Samples of a batch are of one prompt; behind
it they have one of two histories, so that whole batches can be judged.

Cost: a step reads the weights, the text's keys and values once a prompt, and the image keys and values that the
patterns allow once a sample; that sum over the image, divided by the read bandwidth measured at the same working set,
is 100 %, or what its products need at the measured matrix product, where that is more.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Cost, Job
from dalle_fast import patterns, rng
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.ops.gumbel_noise import gumbel_noise
from tests.tolerance import budget

SEED = 7
LAYER_SCALE = (0.3, 0.8)
TEXT_VOCABULARY = 10_000
HISTORIES = 2  # distinct rows of image tokens in a batch
POSITIONS = 5  # sampled image positions, the first and the last among them
INT8_CHUNK = 128  # weights of a column that share a scale
INT8_MOST = 127

D512: dict[str, Any] = {
    "dim": 512, "depth": 8, "heads": 8, "dim_head": 64, "text_seq_len": 256, "grid": 32, "codes": 8192, "batch": 1,
}  # fmt: skip
CYCLE = ("full", "axial_row", "axial_col", "conv_like")


class Inputs:
    """Our model, one prompt [1, text_seq_len], and image tokens [histories, n] to put before sampled positions."""

    def __init__(self, case: Case, device: torch.device) -> None:
        sizes = case.sizes
        torch.manual_seed(SEED)
        model = DALLE(vae=vae_of(DiscreteVAE, case), **arguments(case))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".scale"):
                    parameter.uniform_(*LAYER_SCALE)
        self.model = model.to(device, case.dtype).eval()
        self.text = torch.randint(1, TEXT_VOCABULARY, (1, sizes["text_seq_len"]), device=device)
        self.text[:, sizes["text_seq_len"] // 2 :] = 0  # padding, as in most prompts
        self.tokens = torch.randint(sizes["codes"], (min(sizes["batch"], HISTORIES), n_image(case)), device=device)
        self.batch = sizes["batch"]

    @property
    def prompt(self) -> Tensor:
        """[1, T], padding unique."""
        return self.model.padded_text(self.text)

    def tokens_of_all(self) -> Tensor:
        """[B, n]."""
        return self.tokens[torch.arange(self.batch, device=self.tokens.device) % len(self.tokens)]


def arguments(case: Case) -> dict[str, Any]:
    """Constructor arguments that ours and the original share."""
    names = ("dim", "depth", "heads", "dim_head", "text_seq_len", "attn_types")
    return {name: case.sizes[name] for name in names} | {"num_text_tokens": TEXT_VOCABULARY}


def vae_of(cls: Callable[..., nn.Module], case: Case) -> nn.Module:
    """A discrete VAE whose grid and codes are those of the case."""
    return cls(image_size=8 * case.sizes["grid"], num_layers=3, num_tokens=case.sizes["codes"])


def n_image(case: Case) -> int:
    """Image tokens of a picture."""
    return case.sizes["grid"] ** 2


@torch.no_grad()
def rounded_to_int8(model: DALLE) -> DALLE:
    """A float32 copy whose matrices are what 8 bits hold: of each row, 128 weights share a scale.

    What the packed weights of csrc/cpu/packed_product.h mean, written down a second time.
    """
    copied = copy.deepcopy(model).float()
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("vae."):
            width = module.weight.shape[1]
            chunks = F.pad(module.weight, (0, -width % INT8_CHUNK)).unflatten(1, (-1, INT8_CHUNK))
            scales = chunks.abs().amax(dim=2, keepdim=True) / INT8_MOST
            whole = (chunks / scales.clamp_min(torch.finfo(torch.float32).tiny)).round()
            module.weight.copy_((whole * scales).flatten(1)[:, :width])
    return copied


# ------------------------------------------------------------------------------------------------ what is right


class Oracle:
    """The logits that the weights mean: our uncached forward in float64, and the error it has in the case's dtype."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._inputs = inputs
        self._codes = case.sizes["codes"]
        self._model = copy.deepcopy(inputs.model).double()
        self.exact = self.logits(inputs.tokens)
        own = _image_logits(inputs.model, inputs, inputs.tokens, self._codes)
        self.budget = budget(self.exact, own)

    def logits(self, tokens: Tensor) -> Tensor:
        """float64 [b, n, codes]: what predicts image token i, given `tokens` [b, n] before it."""
        return _image_logits(self._model, self._inputs, tokens, self._codes)

    @functools.cached_property
    def of_int8(self) -> Oracle:
        """Of the weights that 8 bits hold; errors are budgeted as before."""
        rounded = copy.copy(self)
        rounded._model = rounded_to_int8(self._inputs.model).double()
        rounded.exact = rounded.logits(self._inputs.tokens)
        return rounded

    def complaint_of_tokens(self, tokens: Tensor, noise: Tensor | float, what: str) -> str | None:
        """None where each of `tokens` [b, n] has the largest logit + noise [b, n, codes], as far as can be told."""
        exact = self.logits(tokens) + noise
        lost = exact.amax(dim=-1) - exact.gather(-1, tokens[..., None])[..., 0]
        # Two logits are compared, each may be off by the budget.
        if bool((lost <= 2 * self.budget).all()):
            return None
        row, worst = divmod(int(lost.argmax()), lost.shape[1])
        return f"{what} tokens must lead, token {worst} of sample {row} is {lost.max():.3g} below the best."


def _image_logits(model: DALLE, inputs: Inputs, tokens: Tensor, codes: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(inputs.text, row[None])[:, -len(row) :, -codes:] for row in tokens])


def noise_of(case: Case, sample: int, device: torch.device) -> Tensor:
    """Gumbel noise [n, codes] that sample `sample` of a batch is drawn with."""
    positions = torch.arange(n_image(case), device=device)
    return gumbel_noise(SEED + sample, positions, rng.Stream.IMAGE_SAMPLING, case.sizes["codes"])


def check_logits(case: Case, got: Mapping[int, Tensor], oracle: Oracle, slack: float = 1.0) -> str | None:
    """Of logits {position: [B, codes]}, whose samples have the histories of `Inputs` in turn."""
    allowed = slack * oracle.budget
    for position, logits in got.items():
        exact = oracle.exact[:, position]
        exact = exact[torch.arange(len(logits), device=exact.device) % len(exact)]
        worst = (logits.double() - exact).abs().max().item()
        if not worst <= allowed:
            return f"logits of token {position} must be within {allowed:.3g} of float64, are off by {worst:.3g}."
    return None


# ------------------------------------------------------------------------------------------------ sampled positions


@dataclass(frozen=True)
class Places:
    """Image positions from which a whole image is computed: `count` of them from `first` on, `run` tokens at each."""

    first: int
    run: int = 1
    count: int = POSITIONS

    def of(self, case: Case) -> list[int]:
        last = n_image(case) - self.run
        return sorted({self.first + round(i * (last - self.first) / (self.count - 1)) for i in range(self.count)})


def sampled_job(
    case: Case,
    draw: Callable[[int, int], Tensor],
    others: Mapping[str, Callable[[], object]],
    places: Places,
    *,
    measure_memory: bool = True,
) -> Job:
    """A job timed at some image positions.

    Args:
        draw: (position, n) draws n tokens from `position` on and returns the logits [B, codes] of the first.
        others: what else a picture needs, each timed once.
    """
    positions, total, run = places.of(case), n_image(case), places.run

    def combine(seconds: Mapping[str, float]) -> float:
        points = [(p, seconds[f"token {p}"] / run) for p in positions]
        if points[-1][0] < total - 1:
            points.append((total - 1, points[-1][1]))
        return sum_interpolated(points) + sum(seconds[other] for other in others)

    runs = f"{run} tokens from each of" if run > 1 else "image tokens"
    return Job(
        result=lambda: {p: draw(p, 1) for p in positions},
        pieces={f"token {p}": functools.partial(draw, p, run) for p in positions} | dict(others),
        combine=combine,
        extrapolated=f"from {runs} {', '.join(map(str, positions))} of {total}, linearly between them",
        measure_memory=measure_memory,
    )


def sum_interpolated(points: list[tuple[int, float]]) -> float:
    """Sum over every whole number from the first point to the last of the line through `points` (ascending)."""
    total = points[-1][1]
    for (begin, at_begin), (end, at_end) in itertools.pairwise(points):
        steps = end - begin  # begin, ..., end - 1
        total += steps * at_begin + (at_end - at_begin) * (steps - 1) / 2
    return total


def pixels_of(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """What decodes the tokens [B, n]."""

    def decode() -> Tensor:
        with torch.no_grad():
            return model.vae.decode(tokens)

    return decode


# ------------------------------------------------------------------------------------------------ cost


def cost(case: Case, weight_dtype: torch.dtype | None = None) -> Cost:
    """Of drawing the case's batch, the prompt read once; weights of `weight_dtype`, default the case's."""
    sizes, n = case.sizes, n_image(case)
    batch, text_len = sizes["batch"], sizes["text_seq_len"] + 1
    inner = sizes["heads"] * sizes["dim_head"]
    text_pairs = text_keys = image_keys = 0  # pairs of the prompt; keys that the steps of one sample see
    for layer in range(sizes["depth"]):
        keys = _allowed_keys(sizes["attn_types"][layer % len(sizes["attn_types"])], text_len, sizes["grid"])
        steps = keys[text_len:]
        text_pairs += int(keys[:text_len].sum())
        text_keys += text_len * len(steps)
        image_keys += int(steps.sum()) - text_len * len(steps)
    matrices = matrices_of(case)
    of_layers, head = sum(depth * width for depth, width in matrices[:-1]), sizes["codes"] * sizes["dim"]
    cache_bytes = 2 * inner * case.dtype.itemsize * (text_keys + batch * image_keys)
    read_bytes = n * weight_bytes(case, weight_dtype or case.dtype) + cache_bytes
    products = of_layers * (text_len + batch * (n - 1)) + batch * n * head
    return Cost(
        read_bytes=read_bytes,
        flops=2 * products + 4 * inner * (text_pairs + batch * (text_keys + image_keys)),
        working_set=read_bytes // n,
        items=batch,
        unit="images",
        steps=n,
    )


def matrices_of(case: Case) -> list[tuple[int, int]]:
    """(depth, width) of every matrix a step multiplies with, the image half of the head last."""
    sizes = case.sizes
    dim, inner = sizes["dim"], sizes["heads"] * sizes["dim_head"]
    # the gated feed-forward is 4 times as wide as the model
    block = [(dim, 3 * inner), (inner, dim), (dim, 8 * dim), (4 * dim, dim)]
    return [*block * sizes["depth"], (dim, sizes["codes"])]


def weight_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of the matrices, with 8 bits of their scales in float32 too."""
    scales = 4 if dtype == torch.int8 else 0
    return sum(
        width * (depth * dtype.itemsize + scales * -(-depth // INT8_CHUNK)) for depth, width in matrices_of(case)
    )


@functools.cache
def _allowed_keys(name: str, text_len: int, grid: int) -> Tensor:
    """int64 [positions]: how many keys each input attends to."""
    pattern = patterns.make(name, text_len=text_len, grid=(grid, grid))
    return pattern.dense(pattern.layout.max_inputs).sum(dim=-1)
