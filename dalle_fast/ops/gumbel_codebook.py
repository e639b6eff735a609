"""Gumbel softmax over a codebook: the contract of its arguments, the choice of implementation, the registration.

    l = x . weight^T + bias      p = softmax((l + noise) / temperature)      embeds = p . codebook

"reference" is plain torch and differentiates itself. The others are pairs of launchers, `forward` and `backward`, in
`dalle_fast.native` and `dalle_fast.kernels`, behind one custom op: saved are the inputs, the seed or the noise, embeds,
the noisy codes and a few numbers a row from which logits and softmax are made again; nothing with an axis of codes.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dalle_fast import dispatch, rng
from dalle_fast.ops.checks import check_finite, check_one_device, check_one_dtype, check_shape, dtype_name
from dalle_fast.ops.gumbel_noise import gumbel_noise as draw_noise
from dalle_fast.ops.support import (
    auto_avoids_triton,
    in_autocast_dtype,
    refuse_second_derivative,
    seed_tensor,
    supports_cpu,
    supports_triton,
)
from dalle_fast.reference import gumbel_codebook as reference

OP = "gumbel_codebook"
_LAUNCHERS = {"cpu": "dalle_fast.native.gumbel_codebook", "triton": "dalle_fast.kernels.gumbel_codebook"}
_STATISTICS = 7  # float32 [this many, B h w], for the backward


def gumbel_codebook(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    *,
    temperature: float,
    seed: int | Tensor | None = None,
    first_row: int = 0,
    straight_through: bool = False,
    reinmax: bool = False,
    with_kl: bool = False,
    gumbel_noise: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The bottleneck of a discrete VAE: logits of every code, gumbel noise, softmax, mean of the codebook under it.

    Args:
        features: [B, F, h, w], what the last 1x1 convolution of the encoder reads; finite.
        weight: [K, F] and bias: [K] or None, that convolution.   codebook: [K, D].   One floating dtype, one device;
            under torch.autocast all are cast to its dtype (float64 stays).
        temperature: divides logits + noise; a finite number above 0.
        seed: 64-bit seed of the noise; default drawn from torch's default generator, so that a second call differs. As
            int64 [1] on the CPU or the device (`rng.seeds_to_tensor`) it is data: another one compiles nothing anew.
        first_row: number of the first of these B h w rows in the global batch: row r draws at position first_row + r.
        straight_through: embeds are the rows of the codebook at noisy_codes, gradients those of the softmax.
        reinmax: the second-order gradient of arXiv 2304.08612; ignored without straight_through, as upstream.
        with_kl: also returns the KL divergence from the uniform distribution, summed over batch and positions.
        gumbel_noise: [B, K, h, w], any floating dtype, instead of a seed. A constant: it gets no gradient.
        impl: "auto", or the name of one implementation.
    Returns: embeds [B, D, h, w], dtype of features; codes (argmax without noise) and noisy_codes (argmax with noise),
        int64 [B, h, w]; kl, a scalar of at least float32, or None.
    Raises: TypeError (dtype), ValueError (shape, range, a feature that is not finite), NotImplementedError (impl lacks
        it), RuntimeError (no GPU, no extension, second derivative).
    Numerics: logits, noise and sums in float32, or in float64 for float64 inputs.
    Source: DALLE-pytorch DiscreteVAE.forward; DALL-E paper, section 2.1.
    """
    check_one_device(OP, features=features, weight=weight, bias=bias, codebook=codebook, gumbel_noise=gumbel_noise)
    features, weight, codebook = (in_autocast_dtype(t) for t in (features, weight, codebook))
    bias = in_autocast_dtype(bias)
    check_one_dtype(OP, features=features, weight=weight, bias=bias, codebook=codebook)
    check_convolution(OP, features, weight, bias)
    _check_codebook(weight, codebook)
    _check_temperature(temperature)
    _check_first_row(first_row, features)
    if gumbel_noise is None:
        noise, seeds = None, seed_tensor(OP, seed, features.device)
    else:
        noise, seeds = _check_noise(gumbel_noise, seed, features, codebook), None
    chosen = dispatch.choose(OP, impl, **facts(features, codebook))
    mode = "soft" if not straight_through else "reinmax" if reinmax else "straight_through"
    embeds, codes, noisy_codes, kl = chosen.function(
        features, weight, bias, codebook, noise, seeds, first_row, float(temperature), mode, with_kl
    )
    return embeds, codes, noisy_codes, kl if with_kl else None


def facts(features: Tensor, codebook: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("gumbel_codebook", **facts(features, codebook))`."""
    return {
        "device": features.device.type,
        "dtype": features.dtype,
        "n_features": features.shape[1],
        "n_codes": codebook.shape[0],
        "codebook_dim": codebook.shape[1],
    }


# ------------------------------------------------------------------------------------------------ implementations


def launchers(impl: str) -> ModuleType:
    """The module of `forward`, `backward` and `codes` of an implementation."""
    return importlib.import_module(_LAUNCHERS[impl])


def _reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    temperature: float,
    mode: str,
    with_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The oracle, with a seed's noise written out first by the fastest implementation of `gumbel_noise`."""
    if not torch.compiler.is_compiling():
        check_features(OP, features)
    if noise is None:
        assert seed is not None
        batch, _, height, width = features.shape
        rows = first_row + torch.arange(batch * height * width, device=features.device)
        drawn = draw_noise(seed, rows, rng.Stream.VAE, len(codebook))
        noise = drawn.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
    return reference.gumbel_codebook(
        features,
        weight,
        bias,
        codebook,
        noise=noise,
        temperature=temperature,
        straight_through=mode != "soft",
        reinmax=mode == "reinmax",
        with_kl=with_kl,
    )


def _fused(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    temperature: float,
    mode: str,
    with_kl: bool,
    *,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A tensor, for the same reason as the seed: torch.compile would compile anew for each float of a falling schedule.
    divisor = torch.full((), temperature, dtype=torch.float64, device="cpu")
    embeds, codes, noisy_codes, kl, _ = _forward(
        features, weight, bias, codebook, noise, seed, divisor, first_row, mode, with_kl, impl
    )
    return embeds, codes, noisy_codes, kl


dispatch.register(OP, "reference", _reference)
dispatch.register(OP, "cpu", partial(_fused, impl="cpu"), supports=supports_cpu, rank=1)
dispatch.register(
    OP, "triton", partial(_fused, impl="triton"), supports=supports_triton, avoid=auto_avoids_triton, rank=2
)


# ------------------------------------------------------------------------------------------------ registration


@torch.library.custom_op("dalle_fast::gumbel_codebook", mutates_args=())
def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor,
    first_row: int,
    mode: str,
    with_kl: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not features.numel():
        embeds, codes, noisy_codes, kl, statistics = _results_like(features, codebook, impl)
        return embeds, codes, noisy_codes, kl.zero_(), statistics
    check_features(OP, features)
    return launchers(impl).forward(
        features,
        weight,
        bias,
        codebook,
        noise,
        seed,
        first_row=first_row,
        temperature=temperature.item(),
        mode=mode,
        with_kl=with_kl,
    )


@torch.library.custom_op("dalle_fast::gumbel_codebook_backward", mutates_args=())
def _backward(
    dembeds: Tensor,
    dkl: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    temperature: Tensor,
    embeds: Tensor,
    noisy_codes: Tensor,
    statistics: Tensor,
    first_row: int,
    mode: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not features.numel():
        dfeatures, *parameters = _gradients_like(features, weight, bias, codebook, impl)
        dweight, dbias, dcodebook = (t.zero_() for t in parameters)
        return dfeatures, dweight, dbias, dcodebook
    return launchers(impl).backward(
        dembeds,
        dkl,
        features,
        weight,
        bias,
        codebook,
        noise,
        seed,
        embeds,
        noisy_codes,
        statistics,
        first_row=first_row,
        temperature=temperature.item(),
        mode=mode,
    )


@_forward.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _results_like(features, codebook, rest[-1])


@_backward.register_fake
def _(
    dembeds: Tensor,
    dkl: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _gradients_like(features, weight, bias, codebook, rest[-1])


def _results_like(features: Tensor, codebook: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """embeds, codes, noisy_codes, kl, statistics: allocated, not filled."""
    batch, _, height, width = features.shape
    codes, noisy_codes = (features.new_empty(batch, height, width, dtype=torch.int64) for _ in range(2))
    kl = features.new_empty((), dtype=torch.float32)
    statistics = features.new_empty(_STATISTICS, batch * height * width, dtype=torch.float32)
    return _maps_like(features, codebook.shape[1], impl), codes, noisy_codes, kl, statistics


def _gradients_like(
    features: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dfeatures, dweight, dbias, dcodebook: allocated, not filled."""
    dbias = features.new_empty(0 if bias is None else len(codebook))
    dfeatures = _maps_like(features, features.shape[1], impl)
    return dfeatures, weight.new_empty(weight.shape), dbias, codebook.new_empty(codebook.shape)


def _maps_like(features: Tensor, channels: int, impl: str) -> Tensor:
    """[B, channels, h, w], laid out in memory as the launchers of `impl` write it."""
    batch, _, height, width = features.shape
    if impl == "triton":
        return features.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return features.new_empty(batch, channels, height, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_row, mode, ctx.with_kl, impl = inputs
    embeds, codes, noisy_codes, _, statistics = output
    ctx.rest = first_row, mode, impl
    ctx.mark_non_differentiable(codes, noisy_codes, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, embeds, noisy_codes, statistics)


def _differentiate(ctx: Any, dembeds: Tensor | None, _: None, __: None, dkl: Tensor | None, ___: None) -> Any:
    gradients: tuple[Tensor | None, ...] = (None,) * 4
    dkl = dkl if ctx.with_kl else None
    needed = ctx.needs_input_grad[:4]
    if any(needed) and not (dembeds is None and dkl is None):
        *inputs, embeds, noisy_codes, statistics = ctx.saved_tensors
        dembeds = torch.zeros_like(embeds) if dembeds is None else dembeds
        given = _backward(dembeds, dkl, *inputs, embeds, noisy_codes, statistics, *ctx.rest)
        gradients = tuple(g if wanted else None for g, wanted in zip(given, needed, strict=True))
    return *gradients, *(None,) * 7


torch.library.register_autograd("dalle_fast::gumbel_codebook", _differentiate, setup_context=_save)
torch.library.register_autograd("dalle_fast::gumbel_codebook_backward", refuse_second_derivative(OP))


# ------------------------------------------------------------------------------------------------ checks


def check_convolution(op: str, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless features [B, F, h, w], weight [K, F] and bias [K] fit; K and F at least 1."""
    if features.dim() != 4:
        raise ValueError(
            f"{op}: features must be [B, F, h, w], got {list(features.shape)}. Give the encoder's maps, not rows."
        )
    if weight.dim() != 2 or weight.shape[1] != features.shape[1] or not weight.numel():
        raise ValueError(
            f"{op}: weight must be [K, F={features.shape[1]}] with K and F at least 1, got {list(weight.shape)}."
            " Flatten the weight of the 1x1 convolution."
        )
    if bias is not None:
        check_shape(op, "bias", bias, {"K": len(weight)}, "There is one bias a code.")


def check_features(op: str, features: Tensor) -> None:
    """Raises ValueError unless all features are finite: reads them, and a GPU's host waits for it."""
    advice = "Lower the learning rate, or compute the encoder in float32."
    check_finite(op, "features", features, "bfyx", advice)


def _check_codebook(weight: Tensor, codebook: Tensor) -> None:
    if codebook.dim() != 2 or len(codebook) != len(weight) or not codebook.numel():
        raise ValueError(
            f"{OP}: codebook must be [K={len(weight)}, D] with D at least 1, as weight has K rows, got"
            f" {list(codebook.shape)}. Give the embedding's weight."
        )


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < torch.inf:  # false for NaN
        raise ValueError(
            f"{OP}: temperature must be a finite number above 0, got {float(temperature)}."
            " For hard codes use straight_through."
        )


def _check_noise(noise: Tensor, seed: int | Tensor | None, features: Tensor, codebook: Tensor) -> Tensor:
    if seed is not None:
        given = "a tensor" if isinstance(seed, Tensor) else seed
        raise ValueError(f"{OP}: seed and gumbel_noise must not both be given, got seed={given}. Leave one out.")
    if not noise.dtype.is_floating_point:
        raise TypeError(f"{OP}: gumbel_noise must be floating, got {dtype_name(noise)}. Give -log(-log(u)).")
    batch, _, height, width = features.shape
    shape = {"B": batch, "K": len(codebook), "h": height, "w": width}
    check_shape(OP, "gumbel_noise", noise, shape, "There is one number a code and position.")
    return noise.detach()


def _check_first_row(first_row: int, features: Tensor) -> None:
    batch, _, height, width = features.shape
    if isinstance(first_row, bool) or not isinstance(first_row, int):
        raise TypeError(
            f"{OP}: first_row must be a whole number, got {first_row!r} ({type(first_row).__name__})."
            " It counts the rows of the global batch before these."
        )
    if first_row < 0 or first_row + batch * height * width > rng.POSITIONS:
        raise ValueError(
            f"{OP}: first_row must be 0 or more and leave its {batch * height * width} rows below 2**32, got"
            f" {first_row}. Positions of the noise are 32 bits wide."
        )
