"""Gumbel softmax over a codebook in C++ (csrc/cpu/gumbel_codebook*): launchers for 32- and 16-bit floats on the CPU.

The structures repeat those of csrc/cpu/gumbel_codebook.h. Tensors are read and written where they lie, whatever their
strides; weight, bias and codebook are made contiguous first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dalle_fast import _extension, rng

_STATISTICS = 7
_DIVERGENCE = 6  # the row of statistics that holds each row's KL divergence
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHOICES = {"soft": 0, "straight_through": 1, "reinmax": 2}

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Maps(ctypes.Structure):
    _fields_ = [("data", _POINTER), *((name, _I64) for name in ("stride_b", "stride_c", "stride_y", "stride_x"))]

    @classmethod
    def of(cls, maps: Tensor) -> _Maps:
        return cls(maps.data_ptr(), *maps.stride())


class _CodeGradient(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("lower", _POINTER)]  # lower: the extension's own


class _GumbelCodebook(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("batch", "height", "width", "features", "codes", "dim")),
        *(("element", _I32), ("choice", _I32), ("with_kl", _I32), ("temperature", ctypes.c_double)),
        *(("x", _Maps), ("weight", _POINTER), ("bias", _POINTER), ("codebook", _POINTER)),
        *(("noise", _Maps), ("seed", ctypes.c_uint64), ("first_row", _I64), ("stream", ctypes.c_uint32)),
        *(("embeds", _Maps), ("nearest", _POINTER), ("noisy", _POINTER), ("statistics", _POINTER)),
        *(("dembeds", _Maps), ("dx", _Maps), ("dkl", ctypes.c_float)),
        *((name, _CodeGradient) for name in ("dweight", "dbias", "dcodebook")),
        ("threads", _I64),
    ]


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    *,
    first_row: int,
    temperature: float,
    mode: str,
    with_kl: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of noisily chosen codes, and what the backward pass needs to make the softmax again.

    Args: as `dalle_fast.ops.gumbel_codebook`, checked there; at least one row; `mode` one of `_CHOICES`.
    Returns: embeds [B, D, h, w], contiguous; codes and noisy_codes int64 [B, h, w]; kl, float32 []; float32 statistics
        [_STATISTICS, B h w], named in csrc/cpu/gumbel_codebook.h.
    """
    batch, _, height, width = features.shape
    embeds = features.new_empty(batch, codebook.shape[1], height, width)
    codes, noisy_codes = (torch.empty(batch, height, width, dtype=torch.int64) for _ in range(2))
    statistics = torch.empty(_STATISTICS, batch * height * width, dtype=torch.float32)
    call = _Call(features, weight, bias, codebook, noise, seed, first_row, temperature, mode)
    call.arguments.with_kl = with_kl
    call.results(embeds, codes, noisy_codes, statistics)
    _extension.check(_extension.library().dalle_fast_gumbel_codebook_forward(call.pointer()), "gumbel_codebook")
    kl = statistics[_DIVERGENCE].sum(dtype=torch.float64).float() if with_kl else torch.zeros(())
    return embeds, codes, noisy_codes, kl, statistics


def backward(
    dembeds: Tensor,
    dkl: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    embeds: Tensor,
    noisy_codes: Tensor,
    statistics: Tensor,
    *,
    first_row: int,
    temperature: float,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features (contiguous), weight, bias ([0] where there is none) and codebook."""
    dfeatures = torch.empty(features.shape, dtype=features.dtype)
    dweight, dbias, dcodebook = (weight.new_empty(shape) for shape in (weight.shape, len(weight), codebook.shape))
    call = _Call(features, weight, bias, codebook, noise, seed, first_row, temperature, mode)
    call.results(embeds, None, noisy_codes, statistics)
    call.arguments.dembeds, call.arguments.dx = _Maps.of(dembeds), _Maps.of(dfeatures)
    call.arguments.dkl = 0.0 if dkl is None else float(dkl)
    for name, tensor in (("dweight", dweight), ("dbias", dbias), ("dcodebook", dcodebook)):
        setattr(call.arguments, name, _CodeGradient(tensor.data_ptr()))
    _extension.check(_extension.library().dalle_fast_gumbel_codebook_backward(call.pointer()), "gumbel_codebook")
    return dfeatures, dweight, weight.new_empty(0) if bias is None else dbias, dcodebook


def codes(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """int64 [B, h, w]: arguments as `dalle_fast.ops.codebook_indices`, checked there; at least one row."""
    batch, _, height, width = features.shape
    nearest = torch.empty(batch, height, width, dtype=torch.int64)
    call = _Call(features, weight, bias, weight, None, None, 0, 1.0, "soft")
    call.arguments.nearest = nearest.data_ptr()
    _extension.check(_extension.library().dalle_fast_gumbel_codebook_nearest(call.pointer()), "codebook_indices")
    return nearest


class _Call:
    """The arguments of one call, and the tensors they point into."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codebook: Tensor,
        noise: Tensor | None,
        seed: Tensor | None,
        first_row: int,
        temperature: float,
        mode: str,
    ) -> None:
        batch, n_features, height, width = features.shape
        self.kept = [features, weight.contiguous(), codebook.contiguous()]
        self.arguments = _GumbelCodebook(
            *(batch, height, width, n_features, *codebook.shape),
            *(_ELEMENTS[features.dtype], _CHOICES[mode], False, temperature),
        )
        arguments = self.arguments
        arguments.x = _Maps.of(features)
        arguments.weight, arguments.codebook = (tensor.data_ptr() for tensor in self.kept[1:3])
        if bias is not None:
            self.kept.append(bias.contiguous())
            arguments.bias = self.kept[-1].data_ptr()
        if noise is not None:
            self.kept.append(noise.float())
            arguments.noise = _Maps.of(self.kept[-1])
        elif seed is not None:
            arguments.seed = int(seed) % rng.SEEDS  # the same 64 bits, unsigned
        arguments.first_row, arguments.stream = first_row, int(rng.Stream.VAE)
        arguments.threads = torch.get_num_threads()

    def results(self, embeds: Tensor, codes: Tensor | None, noisy_codes: Tensor, statistics: Tensor) -> None:
        """What forward writes and backward reads."""
        self.kept += [noisy_codes.contiguous(), statistics.contiguous()]
        arguments = self.arguments
        arguments.embeds = _Maps.of(embeds)
        arguments.nearest = None if codes is None else codes.data_ptr()
        arguments.noisy, arguments.statistics = (tensor.data_ptr() for tensor in self.kept[-2:])

    def pointer(self) -> int:
        return ctypes.addressof(self.arguments)
