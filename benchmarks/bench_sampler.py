"""Drawing pictures token by token: our engines beside a static-cache decoder and the original.

Cases: batches of one prompt (`d512_b32`), all layers of one pattern (`d512_full`), growing grids (`grid64_sweep_row`).
What is timed is `generate_images`, pixels included, warm: weights are packed, nothing of the prompt is kept. Whole
images where that takes seconds; the others are timed at sampled positions, and the whole is the sum of the times
interpolated linearly between them; their rows say so.

Verified first: the logits drawn from against a float64 forward of the same weights; of the C++ engine, which chooses in
the same call, every token of a greedy image and of two sampled ones against that forward's argmax with the noise that
each is drawn with. For weights of 8 bits the forward is that of the weights they hold.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding import (
    CYCLE,
    D512,
    SEED,
    Inputs,
    Oracle,
    Places,
    check_logits,
    cost,
    noise_of,
    pixels_of,
    sampled_job,
)
from benchmarks.decoding_peers import RUN, decoding_peers
from benchmarks.harness import Benchmark, Case, Job, Provider
from dalle_fast import _extension, rng
from dalle_fast.sampling.eager import EagerEngine, UncachedEngine
from dalle_fast.sampling.filters import Filters

MODE = "decode"
EAGER_BATCH = 32  # the largest that the eager engine is measured with
JUDGED = 2  # samples of a drawn batch, the first and the last
GREEDY_BATCH = 1  # the largest of which a greedy image is judged too

DEMO = {"dim": 256, "depth": 6, "heads": 4, "dim_head": 64, "text_seq_len": 16, "grid": 16, "codes": 256, "batch": 1}
ODD = {"dim": 120, "depth": 5, "heads": 3, "dim_head": 40, "text_seq_len": 77, "grid": 8, "codes": 1001, "batch": 2}
TOY = {"dim": 32, "depth": 4, "heads": 2, "dim_head": 16, "text_seq_len": 5, "grid": 4, "codes": 24, "batch": 1}
PATTERNS = {"cycle": CYCLE, "full": ("full",), "row": ("axial_row",)}
DTYPES = (torch.float32, torch.bfloat16)


def _cases() -> list[Case]:
    d512: dict[str, dict[str, Any]] = {"d512": {"attn_types": CYCLE}}
    d512 |= {f"d512_b{batch}": {"attn_types": CYCLE, "batch": batch} for batch in (4, 32, 128)}
    d512 |= {f"d512_{name}": {"attn_types": PATTERNS[name]} for name in ("full", "row")}
    cases = [Case(name, D512 | changed, dtype, mode=MODE) for name, changed in d512.items() for dtype in DTYPES]
    cases += [
        Case("demo", DEMO | {"attn_types": CYCLE}, mode=MODE),
        Case("odd", ODD | {"attn_types": CYCLE}, mode=MODE),
    ]
    for grid in (16, 32, 64):  # a VAE has pictures of a power of two
        for name, attn_types in PATTERNS.items():
            swept = {"grid": grid, "attn_types": attn_types, "pattern": name, "sweep": "grid"}
            cases.append(Case(f"grid{grid}_sweep_{name}", D512 | swept, torch.bfloat16, mode=MODE))
    return cases + [Case("toy", TOY | {"attn_types": CYCLE}, dtype, toy=True, mode=MODE) for dtype in DTYPES]


# ------------------------------------------------------------------------------------------------ the C++ engine


def cpu_missing(case: Case, device: torch.device) -> str | None:
    """None, or in words why the C++ engine does not run."""
    if device.type != "cpu":
        return "it runs on the CPU."
    reason = _extension.missing()
    return None if reason is None else reason.removeprefix("missing: ")


def _int8_missing(case: Case, device: torch.device) -> str | None:
    if case.dtype == torch.float32:
        return "weights of 8 bits are measured beside bfloat16: their keys and values are."
    return cpu_missing(case, device)


def _prepare_cpu(case: Case, inputs: Inputs, device: torch.device, *, weight_dtype: torch.dtype | None) -> Job:
    # A model's weights are packed once: two providers of one model would pack them again in every round.
    model = copy.deepcopy(inputs.model)
    settings: dict[str, Any] = {"engine": "cpu", "weight_dtype": weight_dtype, "seed": SEED, "return_tokens": True}
    text = inputs.text.expand(inputs.batch, -1)

    def draw() -> Any:
        return model.generate_images(text, **settings)

    def result() -> dict[str, Tensor]:
        drawn = {"sampled": draw()[-1]}
        if inputs.batch <= GREEDY_BATCH:
            drawn["greedy"] = model.generate_images(inputs.text, temperature=0.0, **settings)[-1]
        return drawn

    return Job(result=result, pieces={"image": draw})


def _check_tokens(case: Case, got: dict[str, Tensor], oracle: Oracle, *, int8: bool = False) -> str | None:
    judge = oracle.of_int8 if int8 else oracle
    complaint = judge.complaint_of_tokens(got["greedy"], 0.0, "greedy") if "greedy" in got else None
    samples = sorted({0, len(got["sampled"]) - 1})[:JUDGED]
    noise = torch.stack([noise_of(case, sample, got["sampled"].device) for sample in samples])
    return complaint or judge.complaint_of_tokens(got["sampled"][samples], noise, "sampled")


# ------------------------------------------------------------------------------------------------ in plain torch


def _eager_missing(case: Case, device: torch.device) -> str | None:
    if "sweep" in case.sizes:
        return "left out of the sweep over grids."
    if case.sizes["batch"] > EAGER_BATCH:
        return f"measured up to batch {EAGER_BATCH}."
    return None


def _prepare_eager(case: Case, inputs: Inputs, device: torch.device) -> Job:
    """A primed engine a position: after each run of tokens it is rolled back."""
    prompt, tokens = inputs.prompt.expand(inputs.batch, -1), inputs.tokens_of_all()
    filters, seeds = Filters(), rng.seeds_to_tensor(range(SEED, SEED + inputs.batch), device)
    engines: dict[int, EagerEngine] = {}

    def prompt_read() -> Tensor:
        with torch.no_grad():
            return EagerEngine(inputs.model).prefill(prompt, tokens[:, :0])

    def draw(position: int, n: int) -> Tensor:
        with torch.no_grad():
            if position not in engines:
                engines[position] = EagerEngine(inputs.model, max_rollback=RUN)
                engines[position].prefill(prompt, tokens[:, : position - 1])
            logits = []
            for place in range(position - 1, position - 1 + n):
                logits.append(engines[position].step(tokens[:, place : place + 1])[:, 0])
                filters.token(logits[-1], seeds, place + 1, rng.Stream.IMAGE_SAMPLING)
            engines[position].rollback(n)
        return logits[0]

    others = {"pixels": pixels_of(inputs.model, tokens), "prompt": prompt_read}
    places = Places(first=1, run=min(RUN, tokens.shape[1] - 1), count=3)
    return sampled_job(case, draw, others, places, measure_memory=False)


def _uncached_missing(case: Case, device: torch.device) -> str | None:
    if case.sizes["batch"] > 1 or case.dtype != torch.float32:
        return "measured with one picture in float32."
    return _eager_missing(case, device)


def _prepare_uncached(case: Case, inputs: Inputs, device: torch.device) -> Job:
    def draw(position: int, n: int) -> Tensor:
        with torch.no_grad():
            return UncachedEngine(inputs.model).prefill(inputs.prompt, inputs.tokens[:, :position])

    return sampled_job(case, draw, {"pixels": pixels_of(inputs.model, inputs.tokens)}, Places(first=0))


BENCHMARK = Benchmark(
    op="sampler",
    mode=MODE,
    cases=tuple(_cases()),
    providers=(
        Provider(
            "ours_cpu",
            functools.partial(_prepare_cpu, weight_dtype=None),
            cpu_missing,
            check=_check_tokens,
        ),
        Provider(
            "ours_cpu_int8",
            functools.partial(_prepare_cpu, weight_dtype=torch.int8),
            _int8_missing,
            check=functools.partial(_check_tokens, int8=True),
            cost=functools.partial(cost, weight_dtype=torch.int8),
        ),
        Provider("ours_eager", _prepare_eager, _eager_missing),
        Provider("ours_uncached", _prepare_uncached, _uncached_missing),
        *decoding_peers(),
    ),
    inputs=Inputs,
    expected=Oracle,
    check=check_logits,
    cost=cost,
    baseline="static_cache_compiled",
    cold=False,
)
