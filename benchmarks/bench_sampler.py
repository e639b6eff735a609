"""One image, token by token: ours with and without its cache beside the original as it is and with its cache mended.

Ours with its cache is timed whole. The others take minutes an image, so they are timed at sampled image positions and
the whole is the sum of the times interpolated linearly between them, pixels included; their rows say so.

Verified first: the logits drawn from against a float64 forward of the same weights, every greedy token of a whole
cached image against that forward's argmax, and a sampled first row against the uncached one, token for token. Weights
are random, with LayerScale large enough that every layer matters.

Cost: a step reads the weights and the keys and values its patterns allow; that sum over the image, divided by the read
bandwidth measured at the same working set, is 100 %.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from dalle_fast import patterns
from dalle_fast.compat import upstream_names
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.sampling.eager import UncachedEngine
from tests.tolerance import budget

SEED = 7
LAYER_SCALE = (0.3, 0.8)
TEXT_VOCABULARY = 10_000
CYCLE = ("full", "axial_row", "axial_col", "conv_like")
POSITIONS = 5  # sampled image positions, the first and the last among them
D512 = {"dim": 512, "depth": 8, "heads": 8, "dim_head": 64, "text_seq_len": 256, "grid": 32, "codes": 8192}
DEMO = {"dim": 256, "depth": 6, "heads": 4, "dim_head": 64, "text_seq_len": 16, "grid": 16, "codes": 256}
ODD = {"dim": 120, "depth": 5, "heads": 3, "dim_head": 40, "text_seq_len": 77, "grid": 8, "codes": 1001}
TOY = {"dim": 32, "depth": 4, "heads": 2, "dim_head": 16, "text_seq_len": 5, "grid": 4, "codes": 24}

CASES = (
    Case("d512", D512 | {"attn_types": CYCLE}),
    Case("d512_full", D512 | {"attn_types": ("full",)}),
    Case("demo", DEMO | {"attn_types": CYCLE}),
    Case("odd", ODD | {"attn_types": CYCLE}),
    Case("toy", TOY | {"attn_types": CYCLE}, toy=True),
)


class Inputs:
    """Our model, one prompt, and image tokens to put before the sampled positions."""

    def __init__(self, case: Case, device: torch.device) -> None:
        sizes = case.sizes
        torch.manual_seed(SEED)
        model = DALLE(vae=_vae(DiscreteVAE, case), **_arguments(case))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".scale"):
                    parameter.uniform_(*LAYER_SCALE)
        self.model = model.to(device, case.dtype).eval()
        self.text = torch.randint(1, TEXT_VOCABULARY, (1, sizes["text_seq_len"]), device=device)
        self.text[:, sizes["text_seq_len"] // 2 :] = 0  # padding, as in most prompts
        self.tokens = torch.randint(sizes["codes"], (1, _n_image(case)), device=device)


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
        """float64 [n_image, codes]: what predicts image token i, given `tokens` [1, n_image] before it."""
        return _image_logits(self._model, self._inputs, tokens, self._codes)

    @functools.cached_property
    def first_row(self) -> Tensor:
        """The first row drawn without a cache."""
        return _first_row(self._inputs, use_cache=False)


def _arguments(case: Case) -> dict[str, Any]:
    """Constructor arguments that ours and the original share."""
    names = ("dim", "depth", "heads", "dim_head", "text_seq_len", "attn_types")
    return {name: case.sizes[name] for name in names} | {"num_text_tokens": TEXT_VOCABULARY}


def _vae(cls: Callable[..., nn.Module], case: Case) -> nn.Module:
    return cls(image_size=8 * case.sizes["grid"], num_layers=3, num_tokens=case.sizes["codes"])


def _n_image(case: Case) -> int:
    return case.sizes["grid"] ** 2


def _image_logits(model: nn.Module, inputs: Inputs, tokens: Tensor, codes: int) -> Tensor:
    """[n_image, codes] of one uncached forward; the last token is dropped, nothing is predicted from it."""
    with torch.no_grad():
        return model(inputs.text, tokens[:, :-1])[0, inputs.text.shape[1] :, -codes:]


# ------------------------------------------------------------------------------------------------ ours


class _RowDone(Exception):
    """Ends a generation after the row it carries."""


def _first_row(inputs: Inputs, *, use_cache: bool) -> Tensor:
    def stop(start: int, tokens: Tensor) -> None:
        raise _RowDone(tokens)

    try:
        inputs.model.generate_images(inputs.text, seed=SEED, use_cache=use_cache, on_tokens=stop)
    except _RowDone as done:
        return done.args[0]
    raise RuntimeError("bench_sampler: generate_images must call on_tokens once a row, it did not.")


def _prepare_cached(case: Case, inputs: Inputs, device: torch.device) -> Job:
    def result() -> dict[str, Tensor]:
        greedy = inputs.model.generate_images(inputs.text, temperature=0.0, seed=SEED, return_tokens=True)[-1]
        return {"greedy": greedy, "first_row": _first_row(inputs, use_cache=True)}

    def whole() -> object:
        return inputs.model.generate_images(inputs.text, seed=SEED)

    return Job(result=result, pieces={"image": whole})


def _check_tokens(case: Case, got: dict[str, Tensor], oracle: Oracle) -> str | None:
    if not torch.equal(got["first_row"], oracle.first_row):
        wrong = int((got["first_row"] != oracle.first_row).sum())
        return f"cached tokens must equal uncached ones, {wrong} of the first row differ."
    exact = oracle.logits(got["greedy"])
    lost = exact.amax(dim=-1) - exact.gather(1, got["greedy"].view(-1, 1))[:, 0]
    worst = int(lost.argmax())
    # Two logits are compared, each may be off by the budget.
    if lost[worst] <= 2 * oracle.budget:
        return None
    return f"greedy tokens must have the largest logit, token {worst}'s is {lost[worst]:.3g} below it."


def _prepare_uncached(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model, prompt = inputs.model, inputs.model.padded_text(inputs.text)

    def step(position: int) -> Tensor:
        with torch.no_grad():
            return UncachedEngine(model).prefill(prompt, inputs.tokens[:, :position])[0]

    return _sampled_job(case, step, {"pixels": _pixels(model, inputs)}, first=0)


# ------------------------------------------------------------------------------------------------ the original


def _original_missing(case: Case, device: torch.device) -> str | None:
    return peers.missing()


def _original_model(case: Case, inputs: Inputs, device: torch.device, **options: Any) -> Any:
    """The original's DALLE with the weights of ours."""
    module = peers.original()
    model = module.DALLE(vae=_vae(module.DiscreteVAE, case), **_arguments(case), **options)
    names = upstream_names(inputs.model)
    state = {names[name]: tensor for name, tensor in inputs.model.state_dict().items()}
    rest = model.load_state_dict(state, strict=False)
    weights = {name for name, _ in model.named_parameters()}
    left_out = [name for name in rest.missing_keys if name in weights]
    if left_out or rest.unexpected_keys:
        raise RuntimeError(f"bench_sampler: weights must map one to one, differ in {left_out + rest.unexpected_keys}.")
    return model.to(device, case.dtype).eval()


def _original_step(model: nn.Module, text: Tensor, image: Tensor, codes: int, run: Callable[..., Tensor]) -> Tensor:
    """One token as `generate_images` of the original draws it; returns the image logits it was drawn from."""
    module = peers.original()
    with torch.no_grad():
        logits = run(text, image)[:, -1]
        kept = logits.clone()
        module.gumbel_sample(module.top_k(logits, thres=0.5), temperature=1.0, dim=-1)
    return kept[0, -codes:]


def _prepare_original(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model = _original_model(case, inputs, device)

    def step(position: int) -> Tensor:
        run = functools.partial(model.forward_with_cond_scale, cond_scale=1.0, cache={})
        return _original_step(model, inputs.text, inputs.tokens[:, :position], case.sizes["codes"], run)

    return _sampled_job(case, step, {"pixels": _pixels(model, inputs)}, first=0)


def _masks_missing(case: Case, device: torch.device) -> str | None:
    if any(name.startswith("axial") for name in case.sizes["attn_types"]):
        return peers.missing()
    return "optimize_for_inference changes axial layers only, this case has none: see original_mended."


def _prepare_mended(case: Case, inputs: Inputs, device: torch.device, *, optimize_for_inference: bool) -> Job:
    model = _original_model(case, inputs, device, optimize_for_inference=optimize_for_inference)
    peers.mend_cache(model)
    codes = case.sizes["codes"]
    primed: dict[int, dict] = {}

    def cache_before(position: int) -> dict:
        """The cache just before image token `position` is drawn: all tokens but the last one are in it."""
        if position not in primed:
            primed[position] = {}
            with torch.no_grad():
                model(inputs.text, inputs.tokens[:, : position - 1], cache=primed[position])
        return peers.copy_cache(primed[position])

    def prompt() -> Tensor:
        return _original_step(model, inputs.text, inputs.tokens[:, :0], codes, functools.partial(model, cache={}))

    def step(position: int) -> Tensor:
        run = functools.partial(model, cache=cache_before(position))
        return _original_step(model, inputs.text, inputs.tokens[:, :position], codes, run)

    # The primed caches lie in memory beside the steps: their peak would not be that of drawing one image.
    job = _sampled_job(case, step, {"pixels": _pixels(model, inputs), "prompt": prompt}, first=1)
    return replace(job, measure_memory=False)


# ------------------------------------------------------------------------------------------------ sampled positions


def _pixels(model: Any, inputs: Inputs) -> Callable[[], Tensor]:
    def decode() -> Tensor:
        with torch.no_grad():
            return model.vae.decode(inputs.tokens)

    return decode


def _sampled_job(
    case: Case, step: Callable[[int], Tensor], others: Mapping[str, Callable[[], Tensor]], *, first: int
) -> Job:
    """A job timed at some image positions from `first` on; `step(p)` draws token p and returns its logits [codes]."""
    last = _n_image(case) - 1
    positions = sorted({first + round(i * (last - first) / (POSITIONS - 1)) for i in range(POSITIONS)})

    def combine(seconds: Mapping[str, float]) -> float:
        steps = sum_interpolated([(p, seconds[f"token {p}"]) for p in positions])
        return steps + sum(seconds[other] for other in others)

    return Job(
        result=lambda: {p: step(p) for p in positions},
        pieces={f"token {p}": functools.partial(step, p) for p in positions} | dict(others),
        combine=combine,
        extrapolated=f"from image tokens {', '.join(map(str, positions))} of {last + 1}, linearly between them",
    )


def sum_interpolated(points: list[tuple[int, float]]) -> float:
    """Sum over every whole number from the first point to the last of the line through `points` (ascending)."""
    total = points[-1][1]
    for (begin, at_begin), (end, at_end) in itertools.pairwise(points):
        steps = end - begin  # begin, ..., end - 1
        total += steps * at_begin + (at_end - at_begin) * (steps - 1) / 2
    return total


def _check_logits(case: Case, got: dict[int, Tensor], oracle: Oracle) -> str | None:
    for position, logits in got.items():
        worst = (logits.double() - oracle.exact[position]).abs().max().item()
        if not worst <= oracle.budget:
            return f"logits of token {position} must be within {oracle.budget:.3g} of float64, are off by {worst:.3g}."
    return None


# ------------------------------------------------------------------------------------------------ cost


def _cost(case: Case) -> Cost:
    sizes = case.sizes
    dim, inner, codes, n_image = sizes["dim"], sizes["heads"] * sizes["dim_head"], sizes["codes"], _n_image(case)
    text_len, n_bytes = sizes["text_seq_len"] + 1, case.dtype.itemsize
    # queries, keys, values, output; the gated feed-forward is 4 times as wide as the model
    weights = sizes["depth"] * (4 * dim * inner + 12 * dim * dim)
    pairs = steps = 0  # of query and key: in all, and in decoding alone
    for layer in range(sizes["depth"]):
        name = sizes["attn_types"][layer % len(sizes["attn_types"])]
        of_layer = _allowed_keys(name, text_len, sizes["grid"])
        pairs += int(of_layer.sum())
        steps += int(of_layer[text_len:].sum())
    read_weights = n_bytes * n_image * (weights + codes * dim)
    read_cache = n_bytes * steps * 2 * inner
    return Cost(
        read_bytes=read_weights + read_cache,
        flops=2 * weights * (text_len + n_image - 1) + 2 * codes * dim * n_image + 4 * inner * pairs,
        working_set=(read_weights + read_cache) // n_image,
        items=n_image,
        unit="tokens",
    )


@functools.cache
def _allowed_keys(name: str, text_len: int, grid: int) -> Tensor:
    """int64 [positions]: how many keys each input attends to."""
    pattern = patterns.make(name, text_len=text_len, grid=(grid, grid))
    return pattern.dense(pattern.layout.max_inputs).sum(dim=-1)


def _original(
    name: str,
    prepare: Callable[[Case, Inputs, torch.device], Job],
    missing: Callable[[Case, torch.device], str | None] = _original_missing,
) -> Provider:
    return Provider(name, prepare, missing, packages=peers.PACKAGES)


BENCHMARK = Benchmark(
    op="sampler",
    mode="decode",
    cases=CASES,
    providers=(
        Provider("ours_cached", _prepare_cached, check=_check_tokens),
        Provider("ours_uncached", _prepare_uncached),
        _original("original", _prepare_original),
        _original("original_mended", functools.partial(_prepare_mended, optimize_for_inference=False)),
        _original(
            "original_mended_masks", functools.partial(_prepare_mended, optimize_for_inference=True), _masks_missing
        ),
    ),
    inputs=Inputs,
    expected=Oracle,
    check=_check_logits,
    cost=_cost,
    baseline="original",
    cold=False,
)
