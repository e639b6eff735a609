"""The original's lines between encoder and decoder as a peer: eager and under torch.compile.

A 1x1 convolution to the logits, torch's gumbel softmax, a product with the codebook, and the KL divergence from the
uniform distribution by log_softmax and kl_div: logits, noise, scores and probabilities are tensors [B, K, h, w].

In 16-bit cases they run in float32 on the same numbers (`original_lines`, `original_compiled`), as the original trains,
and under autocast (`autocast_...`), where logits are of 16 bits and results so far off. The noise is torch's own, drawn
in the time; what is verified is computed by the same function of given noise. A peer may err PEER_SLACK times what ours
may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.codebook import BOTH, FORWARD, TEMPERATURE, Inputs, Oracle, Results, call_in, noise_of, sizes_of
from benchmarks.harness import Case, Job, Provider
from benchmarks.machine import has_bfloat16_products

PEER_SLACK = 8.0
# Tensors of float32 [B, K, h, w] alive at the peak, seen at batch 8; given noise and a reserve come on top.
PEAK_LOGITS = {
    "original_lines": {FORWARD: 6, BOTH: 7},
    "original_compiled": {FORWARD: 3, BOTH: 4},
    "reference": {FORWARD: 7, BOTH: 9},
}
RESERVE = 1.2
MEMINFO = Path("/proc/meminfo")
CUDA_COMPILED_BATCH = 8


def codebook_peers() -> tuple[Provider, ...]:
    """The peers, in the order of the tables."""
    return tuple(
        Provider(
            f"{numbers}_{how}",
            functools.partial(_prepare, autocast=numbers == "autocast", compiled=how == "compiled"),
            functools.partial(_missing, autocast=numbers == "autocast", compiled=how == "compiled"),
            check=functools.partial(_check, autocast=numbers == "autocast"),
        )
        for numbers in ("original", "autocast")
        for how in ("lines", "compiled")
    )


def too_large(name: str, case: Case, device: torch.device) -> str | None:
    """None, or in words that logits, noise and probabilities of this case do not fit into the free memory."""
    sizes = sizes_of(case)
    logits = torch.float32.itemsize * sizes.batch * sizes.positions * sizes.codes
    needed = logits * PEAK_LOGITS[name][case.mode or FORWARD]
    free = _free_bytes(device)
    if free is None or RESERVE * (needed + logits) <= free:
        return None
    return (
        f"needs about {needed / 1e9:.0f} GB for logits, noise and probabilities and {logits / 1e9:.0f} GB of given"
        f" noise to be verified; {free / 1e9:.0f} GB are free, of which a sixth is left alone."
    )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = MEMINFO.read_text(encoding="utf-8").splitlines() if MEMINFO.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


# ------------------------------------------------------------------------------------------------ the lines


def original_lines(
    features: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, noise: Tensor | None, hard: bool
) -> tuple[Tensor, Tensor]:
    """embeds [B, D, h, w] and the summed KL; `noise` [B, K, h, w], None: drawn here."""
    logits = F.conv2d(features, weight[:, :, None, None], bias)
    if noise is None:
        shares = F.gumbel_softmax(logits, tau=TEMPERATURE, dim=1, hard=hard)
    else:
        shares = _gumbel_softmax(logits, noise, hard)
    embeds = torch.einsum("bkhw,kd->bdhw", shares, codebook)
    log_q = F.log_softmax(logits.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)
    log_uniform = torch.log(torch.tensor([1.0 / len(codebook)], device=logits.device))
    # the batch of `batchmean` is the one number of the uniform distribution: a sum
    return embeds, F.kl_div(log_uniform, log_q, reduction="batchmean", log_target=True)


def _gumbel_softmax(logits: Tensor, noise: Tensor, hard: bool) -> Tensor:
    """What F.gumbel_softmax computes once it has drawn its noise."""
    soft = ((logits + noise) / TEMPERATURE).softmax(dim=1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(logits).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


def _prepare(case: Case, inputs: Inputs, device: torch.device, *, autocast: bool, compiled: bool) -> Job:
    lines: Callable[..., Any] = original_lines
    if compiled:
        torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
        lines = torch.compile(original_lines, dynamic=False, fullgraph=True)
    wide = Inputs(*(x.float() for x in inputs))
    if autocast:  # the encoder's features and the decoder's gradient are of 16 bits, parameters are not
        wide = wide._replace(features=inputs.features, dembeds=inputs.dembeds)

    def run(noise: Tensor | None) -> Results:
        def call(*tensors: Tensor) -> Results:
            with torch.autocast(device.type, case.dtype, enabled=autocast):
                embeds, kl = lines(*tensors, noise, case.sizes["straight_through"])
            return {"embeds": embeds, "kl": kl}

        return call_in(case.mode or FORWARD, call, wide)

    def result() -> Results:
        sizes = sizes_of(case)
        return run(torch.cat([noise_of(sizes, picture, device).float() for picture in range(sizes.batch)]))

    return Job(result=result, pieces={"whole": lambda: run(None)})


def _missing(case: Case, device: torch.device, *, autocast: bool, compiled: bool) -> str | None:
    if compiled and case.toy:
        return "compiles for ten seconds: left out at toy sizes."
    if autocast and case.dtype.itemsize > 2:
        return "autocast is for 16-bit cases."
    if autocast and case.sizes["straight_through"]:
        return "logits of 16 bits choose other codes than the oracle: autocast is verified soft."
    if autocast and device.type == "cpu" and not has_bfloat16_products():
        return "this processor has no bfloat16 products: autocast is no faster than float32."
    measured = autocast and case.mode == BOTH and case.sizes["batch"] == CUDA_COMPILED_BATCH
    if compiled and device.type == "cuda" and not measured:
        return f"compiles for long: on a GPU it is measured under autocast, {BOTH}, at batch {CUDA_COMPILED_BATCH}."
    return too_large("original_compiled" if compiled else "original_lines", case, device)


def _check(case: Case, got: Results, oracle: Oracle, *, autocast: bool) -> str | None:
    return oracle.complaint(got, slack=PEER_SLACK, rounded_to=case.dtype if autocast else None, codes=False)
