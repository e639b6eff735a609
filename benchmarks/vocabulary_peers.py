"""Fused heads of others as peers of vocab_cross_entropy on GPUs, where they are installed.

Each half of the head by itself, behind torch's LayerNorm, in the dtype of the case:

* `liger_halves`: Liger-Kernel's linear cross entropy, which takes rows in chunks, sums gradients in float32 here, and
  computes them in its forward pass already.
* `cce_halves`: Apple's cut cross-entropy without its filter, which leaves small gradients out; 16-bit cases only. Its
  release on PyPI takes no bias.

A peer may err PEER_SLACK times what ours may, and in 16 bits by as many roundings besides.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Job, Provider
from benchmarks.vocabulary import FORWARD, Call, Inputs, Oracle, Results, Sizes, call_in, sizes_of

PEER_SLACK = 8.0
CCE_SOURCE = "pip install git+https://github.com/apple/ml-cross-entropy"
Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # rows [M, C], weight, bias, labels [M] -> mean loss


def fused_heads() -> tuple[Provider, ...]:
    """The peers, in the order of the tables."""
    return (
        _provider("liger_halves", "liger-kernel", _liger, _liger_missing),
        _provider("cce_halves", "cut-cross-entropy", _cce, _cce_missing),
    )


def halves_by(head: Head, sizes: Sizes) -> Call:
    """Both losses by a fused head: text codes for text positions, image codes for the others."""
    n, v = sizes.n_text, sizes.text_codes

    def call(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed = F.layer_norm(hidden, (sizes.width,), norm_weight, norm_bias)
        text = head(normed[:, :n].flatten(0, 1), weight[:v], bias[:v], labels[:, :n].flatten())
        return text, head(normed[:, n:].flatten(0, 1), weight[v:], bias[v:], labels[:, n:].flatten())

    return call


def _provider(
    name: str, package: str, head: Callable[[], Head], missing: Callable[[Case, torch.device], str | None]
) -> Provider:
    return Provider(name, functools.partial(_prepare, head=head), missing, check=_check, packages=(package,))


def _prepare(case: Case, inputs: Inputs, device: torch.device, *, head: Callable[[], Head]) -> Job:
    call = halves_by(head(), sizes_of(case))

    def whole() -> Results:
        return call_in(case.mode or FORWARD, call, inputs)

    return Job(result=whole, pieces={"whole": whole})


def _check(case: Case, got: Results, oracle: Oracle) -> str | None:
    rounded_to = case.dtype if case.dtype.itemsize == 2 else None
    return oracle.complaint(got, slack=PEER_SLACK, rounded_to=rounded_to)


# ------------------------------------------------------------------------------------------------ the libraries


def _liger() -> Head:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    function = loss(accum_dtype=torch.float32)
    return lambda rows, weight, bias, labels: function(weight, rows, labels, bias)


def _liger_missing(_: Case, device: torch.device) -> str | None:
    return _not_here(device, "liger_kernel", "pip install liger-kernel")


def _cce() -> Head:
    function = _linear_cross_entropy()
    return lambda rows, weight, bias, labels: function(rows, weight, labels, bias=bias, impl="cce_exact")


def _linear_cross_entropy() -> Any:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def _cce_missing(case: Case, device: torch.device) -> str | None:
    if case.dtype.itemsize > 2:
        return "it is for 16-bit cases."
    reason = _not_here(device, "cut_cross_entropy", CCE_SOURCE)
    if reason is None and "bias" not in inspect.signature(_linear_cross_entropy()).parameters:
        return f"the cut-cross-entropy that is installed takes no bias: {CCE_SOURCE}."
    return reason


def _not_here(device: torch.device, module: str, install: str) -> str | None:
    if device.type != "cuda":
        return "its kernels run on GPUs."
    if importlib.util.find_spec(module) is None:
        return f"needs {module.replace('_', '-')}, which is not installed: {install}."
    return None
