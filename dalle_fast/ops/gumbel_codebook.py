"""Gumbel softmax over a codebook: the contract of its arguments and the choice of implementation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dalle_fast import dispatch, rng
from dalle_fast.ops.checks import check_one_device, check_one_dtype, check_shape, dtype_name
from dalle_fast.ops.gumbel_noise import gumbel_noise as draw_noise
from dalle_fast.reference import gumbel_codebook as reference

OP = "gumbel_codebook"


def _reference(
    features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, *, noise: Tensor | int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The oracle, with a seed's noise written out first by the fastest implementation of `gumbel_noise`."""
    if isinstance(noise, int):
        batch, _, height, width = features.shape
        rows = torch.arange(batch * height * width, device=features.device)
        drawn = draw_noise(noise, rows, rng.Stream.VAE, len(codebook))
        noise = drawn.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
    return reference.gumbel_codebook(features, weight, bias, codebook, noise=noise, **options)


dispatch.register(OP, "reference", _reference)


def gumbel_codebook(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    *,
    temperature: float,
    seed: int | None = None,
    straight_through: bool = False,
    reinmax: bool = False,
    with_kl: bool = False,
    gumbel_noise: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The bottleneck of a discrete VAE: logits of every code, gumbel noise, softmax, mean of the codebook under it.

    Args:
        features: [B, F, h, w], what the last 1x1 convolution of the encoder reads.
        weight: [K, F] and bias: [K] or None, that convolution.   codebook: [K, D].   One floating dtype, one device.
        temperature: divides logits + noise; a finite number above 0.
        seed: 64-bit seed of the noise; default drawn from torch's default generator, so that a second call differs.
        straight_through: embeds are the rows of the codebook at noisy_codes, gradients those of the softmax.
        reinmax: the second-order gradient of arXiv 2304.08612; ignored without straight_through, as upstream.
        with_kl: also returns the KL divergence from the uniform distribution, summed over batch and positions.
        gumbel_noise: [B, K, h, w], any floating dtype, instead of a seed. A constant: it gets no gradient.
        impl: "auto", or the name of one implementation.
    Returns: embeds [B, D, h, w], dtype of features; codes (argmax without noise) and noisy_codes (argmax with noise),
        int64 [B, h, w]; kl, a scalar of at least float32, or None.
    Raises: TypeError (dtype), ValueError (shape, range), NotImplementedError (impl lacks it), RuntimeError (no GPU, no
        extension).
    Numerics: logits, noise and sums in float32, or in float64 for float64 inputs.
    Source: DALLE-pytorch DiscreteVAE.forward; DALL-E paper, section 2.1.
    """
    _check(features, weight, bias, codebook, gumbel_noise)
    temperature = float(temperature)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"{OP}: temperature must be a finite number above 0, got {temperature}."
            " For hard codes use straight_through."
        )
    if seed is not None and gumbel_noise is not None:
        raise ValueError(f"{OP}: seed and gumbel_noise must not both be given, got seed={seed}. Leave one out.")
    noise = rng.resolve_seeds(seed, 1)[0] if gumbel_noise is None else gumbel_noise.detach()
    chosen = dispatch.choose(OP, impl, **facts(features, codebook))
    return chosen.function(
        features,
        weight,
        bias,
        codebook,
        temperature=temperature,
        noise=noise,
        straight_through=straight_through,
        reinmax=reinmax,
        with_kl=with_kl,
    )


def facts(features: Tensor, codebook: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("gumbel_codebook", **facts(features, codebook))`."""
    return {
        "device": features.device.type,
        "dtype": features.dtype,
        "n_features": features.shape[1],
        "n_codes": codebook.shape[0],
        "codebook_dim": codebook.shape[1],
    }


def _check(features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, noise: Tensor | None) -> None:
    check_one_dtype(OP, features=features, weight=weight, bias=bias, codebook=codebook)
    check_one_device(OP, features=features, weight=weight, bias=bias, codebook=codebook, gumbel_noise=noise)
    if features.dim() != 4:
        raise ValueError(
            f"{OP}: features must be [B, F, h, w], got {list(features.shape)}. Give the encoder's maps, not rows."
        )
    if codebook.dim() != 2 or not len(codebook):
        raise ValueError(
            f"{OP}: codebook must be [K, D] with K at least 1, got {list(codebook.shape)}. Give the embedding's weight."
        )
    batch, n_features, height, width = features.shape
    n_codes = len(codebook)
    check_shape(OP, "weight", weight, {"K": n_codes, "F": n_features}, "Flatten the weight of the 1x1 convolution.")
    if bias is not None:
        check_shape(OP, "bias", bias, {"K": n_codes}, "There is one bias a code.")
    if noise is not None:
        if not noise.dtype.is_floating_point:
            raise TypeError(f"{OP}: gumbel_noise must be floating, got {dtype_name(noise)}. Give -log(-log(u)).")
        shape = {"B": batch, "K": n_codes, "h": height, "w": width}
        check_shape(OP, "gumbel_noise", noise, shape, "There is one number a code and position.")
