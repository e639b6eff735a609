"""DALLE's output head with its two losses, beside plain torch, eager and under torch.compile.

Cases: heads of 512 and 1024 channels (256 text positions by 10256 ids, 32x32 image positions by 8192 codes) at
batch 1 and 8, and two odd shapes, in float32 and bfloat16.

Peers: `original_...` computes all logits and masks the half that a position does not predict, as dalle_pytorch does;
`halves_compiled` computes what is needed alone (its eager form is `reference`). In 16-bit cases they run in float32 on
the same numbers, as the original trains, and under autocast (`autocast_...`) where the processor multiplies bfloat16.
On GPUs also the fused heads of others (`vocabulary_peers.py`). A peer may err PEER_SLACK times what ours may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Case, Job, Provider
from benchmarks.machine import has_bfloat16_products
from benchmarks.providers import implementations
from benchmarks.vocabulary import (
    BOTH,
    FORWARD,
    Call,
    Inputs,
    Oracle,
    Results,
    Sizes,
    call_in,
    cost,
    make_inputs,
    sizes_of,
)
from benchmarks.vocabulary import ours as call_of
from benchmarks.vocabulary_peers import PEER_SLACK, fused_heads
from dalle_fast.ops import vocab_cross_entropy as op

D512: dict[str, Any] = {"batch": 1, "n_text": 256, "grid": (32, 32), "codes": (10256, 8192), "width": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "b1": D512,
    "b1_d1024": D512 | {"width": 1024},
    "b8": D512 | {"batch": 8},
    "odd_17x23": {"batch": 3, "n_text": 77, "grid": (17, 23), "codes": (1001, 4097), "width": 200},
    "odd_8x8": {"batch": 2, "n_text": 80, "grid": (8, 8), "codes": (49408, 1024), "width": 260},
    "toy": {"batch": 2, "n_text": 5, "grid": (3, 5), "codes": (33, 20), "width": 24},
}
F32, BF16 = torch.float32, torch.bfloat16
CUDA_COMPILED = ("b8", BOTH, BF16)


def _family(shape: str, dtypes: tuple[torch.dtype, ...]) -> tuple[Case, ...]:
    # both modes one after the other: the oracle keeps what it has computed last
    return tuple(
        Case(shape, SHAPES[shape], dtype, shape == "toy", mode) for dtype in dtypes for mode in (BOTH, FORWARD)
    )


CASES = (
    *_family("b1", (F32, BF16)),
    *_family("b8", (F32,)),
    *_family("b1_d1024", (F32,)),
    *_family("odd_17x23", (F32, BF16)),
    *_family("odd_8x8", (F32,)),
    *_family("b8", (BF16,)),
    *_family("toy", (F32, BF16)),
)


def _call(case: Case, inputs: Inputs, impl: str) -> Results:
    return call_in(case.mode or FORWARD, call_of(impl, sizes_of(case)), inputs)


def _facts(case: Case, device: torch.device) -> dict[str, object]:
    sizes = sizes_of(case)
    hidden = torch.empty(1, 1, sizes.width, dtype=case.dtype, device=device)
    weight = torch.empty(sizes.text_codes + sizes.image_codes, sizes.width, dtype=case.dtype, device="meta")
    return op.facts(hidden, weight)


# ------------------------------------------------------------------------------------------------ the peers


def original_lines(sizes: Sizes, device: torch.device) -> Call:
    """All logits, the half that a position does not predict set to -finfo.max, two cross entropies over all of them.

    The mask is a buffer of the original's, and not in its time.
    """
    n, v, width = sizes.n_text, sizes.text_codes, sizes.width
    predicts_image = torch.arange(sizes.layout.max_inputs, device=device)[:, None] >= n
    mask = predicts_image != (torch.arange(v + sizes.image_codes, device=device) >= v)

    def lines(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(F.layer_norm(hidden, (width,), norm_weight, norm_bias), weight, bias)
        logits = logits.masked_fill(mask, -torch.finfo(logits.dtype).max).transpose(1, 2)
        loss_text = F.cross_entropy(logits[:, :, :n], labels[:, :n])
        return loss_text, F.cross_entropy(logits[:, :, n:], labels[:, n:] + v)

    return lines


def halves_lines(sizes: Sizes, device: torch.device) -> Call:
    """Text logits of text positions, image logits of the others."""
    n, v, width = sizes.n_text, sizes.text_codes, sizes.width

    def lines(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed = F.layer_norm(hidden, (width,), norm_weight, norm_bias)
        text = F.linear(normed[:, :n], weight[:v], bias[:v]).flatten(0, 1)
        image = F.linear(normed[:, n:], weight[v:], bias[v:]).flatten(0, 1)
        return F.cross_entropy(text, labels[:, :n].flatten()), F.cross_entropy(image, labels[:, n:].flatten())

    return lines


def _prepare(
    case: Case,
    inputs: Inputs,
    device: torch.device,
    *,
    lines: Callable[[Sizes, torch.device], Call],
    autocast: bool,
    compiled: bool,
) -> Job:
    call = lines(sizes_of(case), device)
    if compiled:
        torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
        call = torch.compile(call, dynamic=False, fullgraph=True)
    wide = inputs.to(device, torch.float32)
    if autocast:  # the transformer's output is of 16 bits, parameters are not
        wide = wide._replace(hidden=inputs.hidden)

    def whole() -> Results:
        with torch.autocast(device.type, case.dtype, enabled=autocast):
            return call_in(case.mode or FORWARD, call, wide)

    return Job(result=whole, pieces={"whole": whole})


def _missing(case: Case, device: torch.device, *, autocast: bool, compiled: bool) -> str | None:
    if compiled and case.toy:
        return "compiles for ten seconds: left out at toy sizes."
    if autocast and case.dtype.itemsize > 2:
        return "autocast is for 16-bit cases."
    if compiled and device.type == "cuda" and (case.name, case.mode, case.dtype) != CUDA_COMPILED:
        return "compiles for long: on a GPU it is measured in bfloat16 at batch 8, with its backward."
    if autocast and device.type == "cpu" and not has_bfloat16_products():
        return "this processor has no bfloat16 products: autocast is no faster than float32."
    return None


def _check(case: Case, got: Results, oracle: Oracle) -> str | None:
    return oracle.complaint(got)


def _check_peer(case: Case, got: Results, oracle: Oracle, *, autocast: bool) -> str | None:
    return oracle.complaint(got, slack=PEER_SLACK, rounded_to=case.dtype if autocast else None)


def _peer(name: str, lines: Callable[[Sizes, torch.device], Call], *, autocast: bool, compiled: bool) -> Provider:
    return Provider(
        name,
        functools.partial(_prepare, lines=lines, autocast=autocast, compiled=compiled),
        functools.partial(_missing, autocast=autocast, compiled=compiled),
        check=functools.partial(_check_peer, autocast=autocast),
    )


BENCHMARK = Benchmark(
    op=op.OP,
    mode=FORWARD,
    cases=CASES,
    providers=(
        *implementations(op.OP, _call, _facts),
        _peer("original_lines", original_lines, autocast=False, compiled=False),
        _peer("original_compiled", original_lines, autocast=False, compiled=True),
        _peer("halves_compiled", halves_lines, autocast=False, compiled=True),
        _peer("autocast_lines", original_lines, autocast=True, compiled=False),
        _peer("autocast_halves_compiled", halves_lines, autocast=True, compiled=True),
        *fused_heads(),
    ),
    inputs=make_inputs,
    expected=Oracle,
    check=_check,
    cost=cost,
    baseline="original_lines",
)
