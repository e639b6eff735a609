"""Nearest code of a codebook: the contract of its arguments and the choice of implementation."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor

from dalle_fast import dispatch
from dalle_fast.ops.checks import check_one_device, check_one_dtype
from dalle_fast.ops.support import auto_avoids_triton, supports_cpu, supports_triton
from dalle_fast.reference import nearest_code as reference

OP = "nearest_code"
_LAUNCHERS = {"cpu": "dalle_fast.native.nearest_code", "triton": "dalle_fast.kernels.nearest_code"}


@torch.library.custom_op("dalle_fast::nearest_code", mutates_args=())
def _search(x: Tensor, codebook: Tensor, normalised: bool, impl: str) -> Tensor:
    if not x.shape[:-1].numel():
        return x.new_empty(x.shape[:-1], dtype=torch.int64)
    return importlib.import_module(_LAUNCHERS[impl]).nearest_code(x, codebook, normalised=normalised)


@_search.register_fake
def _(x: Tensor, codebook: Tensor, normalised: bool, impl: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


dispatch.register(OP, "reference", reference.nearest_code)
dispatch.register(OP, "cpu", partial(_search, impl="cpu"), supports=supports_cpu, rank=1)
dispatch.register(
    OP, "triton", partial(_search, impl="triton"), supports=supports_triton, avoid=auto_avoids_triton, rank=2
)


def nearest_code(x: Tensor, codebook: Tensor, *, normalised: bool = False, impl: str = "auto") -> Tensor:
    """The quantiser of VQ-VAE and VQGAN: for each vector the index of the code at the smallest L2 distance.

    Args:
        x: [..., D], any strides.   codebook: [K, D], both at least 1.   One floating dtype, one device.
        normalised: scale both to length 1 first: the largest cosine wins. A vector of zeros stays one.
        impl: "auto", or the name of one implementation.
    Returns: int64 [...]; ties go to the lowest index. No gradient passes.
    Raises: TypeError (dtype), ValueError (shape, device), NotImplementedError (impl lacks it), RuntimeError (no GPU, no
        extension).
    Numerics: distances in float32, or in float64 for float64 inputs.
    Source: VQ-VAE, arXiv 1711.00937; normalised: ViT-VQGAN, arXiv 2110.04627.
    """
    check_one_dtype(OP, x=x, codebook=codebook)
    check_one_device(OP, x=x, codebook=codebook)
    if codebook.dim() != 2 or not codebook.numel():
        raise ValueError(
            f"{OP}: codebook must be [K, D] with K and D at least 1, got {list(codebook.shape)}."
            " Give the embedding's weight."
        )
    if x.dim() < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{OP}: x must be [..., D={codebook.shape[1]}], got {list(x.shape)}. Move the channels of maps to the end."
        )
    return dispatch.choose(OP, impl, **facts(x, codebook)).function(x, codebook, normalised=normalised)


def facts(x: Tensor, codebook: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("nearest_code", **facts(x, codebook))`."""
    return {"device": x.device.type, "dtype": x.dtype, "n_codes": codebook.shape[0], "codebook_dim": codebook.shape[1]}
