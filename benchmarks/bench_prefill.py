"""Reading a prompt: the first logits of an image, and all that decoding needs of the text behind them.

The engines are made anew each time, so that no prompt is kept; weights are packed, kernels compiled. The original keeps
nothing of what it reads, as in `generate_images`, and computes its whole head at every position.

Cost: the matrices of the layers once, one row of image logits, the pairs that a causal text allows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import decoding, peers
from benchmarks.bench_sampler import DTYPES, ODD, TOY, cpu_missing
from benchmarks.decoding import CYCLE, D512, Inputs, check_logits
from benchmarks.decoding_peers import PEER_SLACK, original_missing, original_model, static_cache_missing
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.static_cache import StaticCacheDecoder, compiled
from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.eager import EagerEngine

MODE = "read"
CASES = (
    *(Case("d512", D512 | {"attn_types": CYCLE}, dtype, mode=MODE) for dtype in DTYPES),
    Case("odd", ODD | {"attn_types": CYCLE, "batch": 1}, mode=MODE),
    *(Case("toy", TOY | {"attn_types": CYCLE}, dtype, toy=True, mode=MODE) for dtype in DTYPES),
)


class Oracle:
    """What `decoding.check_logits` asks of one: logits float64 [1, 1, K] of the first image token, and a budget."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        whole = decoding.Oracle(case, inputs)
        self.exact, self.budget = whole.exact[:, :1], whole.budget


def _job(read: Callable[[], Tensor]) -> Job:
    def prompt() -> Tensor:
        with torch.no_grad():
            return read()

    return Job(result=lambda: {0: prompt()}, pieces={"prompt": prompt})


def _prepare_cpu(case: Case, inputs: Inputs, device: torch.device) -> Job:
    prompt = inputs.prompt
    return _job(lambda: CpuEngine(inputs.model).prefill(prompt))


def _prepare_eager(case: Case, inputs: Inputs, device: torch.device) -> Job:
    prompt = inputs.prompt
    return _job(lambda: EagerEngine(inputs.model).prefill(prompt))


def _prepare_static_cache(case: Case, inputs: Inputs, device: torch.device) -> Job:
    torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
    decoder, prompt = StaticCacheDecoder(inputs.model, 1, compile=compiled), inputs.prompt
    return _job(lambda: decoder.prefill(prompt))


def _prepare_original(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model = original_model(case, inputs, device)
    return _job(lambda: model(inputs.text)[:, -1, -case.sizes["codes"] :])


def cost(case: Case) -> Cost:
    """Of one prompt of text_seq_len + 1 tokens."""
    sizes = case.sizes
    n, layers = sizes["text_seq_len"] + 1, decoding.matrices_of(case)[:-1]
    head = sizes["codes"] * sizes["dim"]
    pairs = sizes["depth"] * n * (n + 1) // 2
    products = n * sum(depth * width for depth, width in layers) + head
    read_bytes = decoding.weight_bytes(case, case.dtype)
    return Cost(
        read_bytes=read_bytes,
        flops=2 * products + 4 * sizes["heads"] * sizes["dim_head"] * pairs,
        working_set=read_bytes,
        items=n,
        unit="tokens",
    )


BENCHMARK = Benchmark(
    op="prefill",
    mode=MODE,
    cases=CASES,
    providers=(
        Provider("ours_cpu", _prepare_cpu, cpu_missing),
        Provider("ours_eager", _prepare_eager),
        Provider(
            "static_cache_compiled",
            _prepare_static_cache,
            static_cache_missing,
            check=functools.partial(check_logits, slack=PEER_SLACK),
        ),
        Provider("original", _prepare_original, original_missing, packages=peers.PACKAGES),
    ),
    inputs=Inputs,
    expected=Oracle,
    check=check_logits,
    cost=cost,
    baseline="static_cache_compiled",
    cold=False,
)
