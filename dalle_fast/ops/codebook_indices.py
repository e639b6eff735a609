"""Codes of a discrete VAE's features: the contract of its arguments and the choice of implementation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dalle_fast import dispatch
from dalle_fast.ops.checks import check_one_device, check_one_dtype
from dalle_fast.ops.gumbel_codebook import check_convolution, check_features, launchers
from dalle_fast.ops.support import auto_avoids_triton, in_autocast_dtype, supports_cpu, supports_triton
from dalle_fast.reference import codebook_indices as reference

OP = "codebook_indices"


def _reference(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.compiler.is_compiling():
        check_features(OP, features)
    return reference.codebook_indices(features, weight, bias)


@torch.library.custom_op("dalle_fast::codebook_indices", mutates_args=())
def _codes(features: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    batch, _, height, width = features.shape
    if not features.numel():
        return features.new_empty(batch, height, width, dtype=torch.int64)
    check_features(OP, features)
    return launchers(impl).codes(features, weight, bias)


@_codes.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    batch, _, height, width = features.shape
    return features.new_empty(batch, height, width, dtype=torch.int64)


dispatch.register(OP, "reference", _reference)
dispatch.register(OP, "cpu", partial(_codes, impl="cpu"), supports=supports_cpu, rank=1)
dispatch.register(
    OP, "triton", partial(_codes, impl="triton"), supports=supports_triton, avoid=auto_avoids_triton, rank=2
)


def codebook_indices(features: Tensor, weight: Tensor, bias: Tensor | None, *, impl: str = "auto") -> Tensor:
    """The code of each position of a discrete VAE: that of the largest logit, without noise.

    Args:
        features: [B, F, h, w], what the last 1x1 convolution of the encoder reads; finite.
        weight: [K, F] and bias: [K] or None, that convolution.   One floating dtype, one device; under torch.autocast
            all are cast to its dtype (float64 stays).
        impl: "auto", or the name of one implementation.
    Returns: int64 [B, h, w]; ties go to the lowest code. No gradient passes.
    Raises: TypeError (dtype), ValueError (shape, device, a feature that is not finite), NotImplementedError (impl lacks
        it), RuntimeError (no GPU, no extension).
    Numerics: logits in float32, or in float64 for float64 inputs; the kernels store none of them.
    Source: DALLE-pytorch DiscreteVAE.get_codebook_indices.
    """
    check_one_device(OP, features=features, weight=weight, bias=bias)
    features, weight, bias = in_autocast_dtype(features), in_autocast_dtype(weight), in_autocast_dtype(bias)
    check_one_dtype(OP, features=features, weight=weight, bias=bias)
    check_convolution(OP, features, weight, bias)
    return dispatch.choose(OP, impl, **facts(features, weight)).function(features, weight, bias)


def facts(features: Tensor, weight: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("codebook_indices", **facts(features, weight))`."""
    return {
        "device": features.device.type,
        "dtype": features.dtype,
        "n_features": features.shape[1],
        "n_codes": weight.shape[0],
    }
