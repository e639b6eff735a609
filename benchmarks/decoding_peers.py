"""Peers of decoding: the original as it is and with its cache mended (`peers.py`), and the static-cache decoder.

The original takes minutes an image: it draws tokens at sampled positions. So does the static-cache decoder with a
batch, RUN tokens at each, because the first of them finds weights and cache cold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.decoding import (
    Inputs,
    Oracle,
    Places,
    arguments,
    check_logits,
    n_image,
    pixels_of,
    sampled_job,
    vae_of,
)
from benchmarks.harness import Case, Job, Provider
from benchmarks.static_cache import Compile, StaticCacheDecoder, as_it_is, compiled
from dalle_fast.compat import upstream_names

RUN = 8
PEER_SLACK = 8.0  # a peer may err so many times what ours may


def decoding_peers() -> tuple[Provider, ...]:
    """The peers, in the order of the tables."""
    return (
        Provider("static_cache_compiled", _prepare_compiled, static_cache_missing, check=_check_static_cache),
        _original("original", _prepare_original),
        _original("original_mended", functools.partial(_prepare_mended, optimize_for_inference=False)),
        _original(
            "original_mended_masks", functools.partial(_prepare_mended, optimize_for_inference=True), _masks_missing
        ),
    )


# ------------------------------------------------------------------------------------------------ the static cache


def static_cache_missing(case: Case, device: torch.device) -> str | None:
    """None, or in words why the compiled static-cache decoder does not run this case."""
    if case.toy:
        return "compiles for a minute: left out at toy sizes."
    if case.name == "odd":
        return "torch 2.13 compiles its frozen weights wrongly at these sizes: the logits of a prompt are off by 2.4."
    if "sweep" in case.sizes and len(case.sizes["attn_types"]) == 1:
        return "costs the same whatever the patterns: see the cycle."
    return None


def _prepare_compiled(case: Case, inputs: Inputs, device: torch.device) -> Job:
    torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
    return static_cache_job(case, inputs, compiled)


def static_cache_job(case: Case, inputs: Inputs, compile: Compile = as_it_is) -> Job:
    """One image whole, a batch from runs of tokens at three positions."""
    decoder = StaticCacheDecoder(inputs.model, inputs.batch, compile=compile)
    prompt, tokens = inputs.prompt, inputs.tokens_of_all()
    pixels = pixels_of(inputs.model, tokens)

    def draw(position: int, n: int) -> Tensor:
        """The history stays as it is: what is drawn is not read."""
        reads = torch.arange(position - 1, position - 1 + n)
        logits = [decoder.step(tokens[:, place], place)[1] for place in reads]
        return logits[0].float()

    def prefill() -> Tensor:
        return decoder.drawn(decoder.prefill(prompt).expand(inputs.batch, -1))

    def image() -> Tensor:
        drawn = [prefill()]
        for place in torch.arange(n_image(case) - 1):
            drawn.append(decoder.step(drawn[-1], place)[0])
        return pixels_of(inputs.model, torch.stack(drawn, dim=1))()

    decoder.fill(prompt, inputs.tokens)
    places = Places(first=1, run=min(RUN, n_image(case) - 1), count=3)
    job = sampled_job(case, draw, {"pixels": pixels, "prompt": prefill}, places, measure_memory=False)
    if inputs.batch > 1:
        return job
    return Job(result=job.result, pieces={"image": image}, measure_memory=False)


def _check_static_cache(case: Case, got: dict[int, Tensor], oracle: Oracle) -> str | None:
    return check_logits(case, got, oracle, PEER_SLACK)


# ------------------------------------------------------------------------------------------------ the original


def _original(
    name: str,
    prepare: Callable[[Case, Inputs, torch.device], Job],
    missing: Callable[[Case, torch.device], str | None] | None = None,
) -> Provider:
    return Provider(name, prepare, missing or original_missing, packages=peers.PACKAGES)


def original_missing(case: Case, device: torch.device) -> str | None:
    """None, or in words why the original does not run this case."""
    if case.dtype != torch.float32:
        return "the original is measured in float32: it rounds its rotary angles with its weights."
    if case.sizes["batch"] > 1 or "sweep" in case.sizes:
        return "the original is measured with one picture of 32x32 tokens at most."
    return peers.missing()


def _masks_missing(case: Case, device: torch.device) -> str | None:
    if any(name.startswith("axial") for name in case.sizes["attn_types"]):
        return original_missing(case, device)
    return "optimize_for_inference changes axial layers only, this case has none: see original_mended."


def original_model(case: Case, inputs: Inputs, device: torch.device, **options: Any) -> Any:
    """The original's DALLE with the weights of ours."""
    module = peers.original()
    model = module.DALLE(vae=vae_of(module.DiscreteVAE, case), **arguments(case), **options)
    names = upstream_names(inputs.model)
    state = {names[name]: tensor for name, tensor in inputs.model.state_dict().items()}
    rest = model.load_state_dict(state, strict=False)
    weights = {name for name, _ in model.named_parameters()}
    left_out = [name for name in rest.missing_keys if name in weights]
    if left_out or rest.unexpected_keys:
        raise RuntimeError(f"original: weights must map one to one, differ in {left_out + rest.unexpected_keys}.")
    return model.to(device, case.dtype).eval()


def _original_step(text: Tensor, image: Tensor, codes: int, run: Callable[..., Tensor]) -> Tensor:
    """One token as `generate_images` of the original draws it; returns the image logits it was drawn from."""
    module = peers.original()
    with torch.no_grad():
        logits = run(text, image)[:, -1]
        kept = logits.clone()
        module.gumbel_sample(module.top_k(logits, thres=0.5), temperature=1.0, dim=-1)
    return kept[:, -codes:]


def _prepare_original(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model = original_model(case, inputs, device)

    def draw(position: int, n: int) -> Tensor:
        run = functools.partial(model.forward_with_cond_scale, cond_scale=1.0, cache={})
        return _original_step(inputs.text, inputs.tokens[:, :position], case.sizes["codes"], run)

    return sampled_job(case, draw, {"pixels": pixels_of(model, inputs.tokens)}, Places(first=0))


def _prepare_mended(case: Case, inputs: Inputs, device: torch.device, *, optimize_for_inference: bool) -> Job:
    model = original_model(case, inputs, device, optimize_for_inference=optimize_for_inference)
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
        return _original_step(inputs.text, inputs.tokens[:, :0], codes, functools.partial(model, cache={}))

    def draw(position: int, n: int) -> Tensor:
        run = functools.partial(model, cache=cache_before(position))
        return _original_step(inputs.text, inputs.tokens[:, :position], codes, run)

    # The primed caches lie in memory beside the steps: their peak would not be that of drawing one image.
    others = {"pixels": pixels_of(model, inputs.tokens), "prompt": prompt}
    return sampled_job(case, draw, others, Places(first=1), measure_memory=False)
