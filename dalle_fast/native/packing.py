"""Weights as the decoding engine's products read them: csrc/cpu/packed_product.h, whose structures are repeated here.

A matrix [depth, width] (a Linear's weight transposed) lies in panels of 64 columns, each read from its first byte to
its last. All of a model's panels lie in one `Arena`, in the order in which a step reads them.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast import _extension

PANEL = 64  # columns
CHUNK = 128  # rows of a matrix that share a scale
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ALIGNMENT = 64  # bytes of a cache line
_INT8_MOST = 127

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
T = TypeVar("T")


class PackedMatrix(ctypes.Structure):
    """Pointers to a `Packed`; all null where there is none."""

    _fields_ = [*((name, _POINTER) for name in ("panels", "scales", "bias")), ("depth", _I64), ("width", _I64)]


class PackedProduct(ctypes.Structure):
    _fields_ = [
        *(("matrix", ctypes.POINTER(PackedMatrix)), ("element", _I32), ("epilogue", _I32), ("rows", _I64)),
        *(("x", _POINTER), ("x_stride", _I64), ("out", _POINTER), ("out_stride", _I64), ("scale", _POINTER)),
    ]


class Epilogue(enum.IntEnum):
    """What becomes of a product y: stored; value * gelu(gate); added to what is there, times a scale a column."""

    STORE = 0
    GATE = 1
    RESIDUAL = 2


class Arena:
    """One allocation, zeroed, on huge pages where there are, handed out in order on the bounds of cache lines.

    Args: nbytes: of all tensors, each rounded up to 64; None hands out tensors without memory and counts their bytes.
    """

    def __init__(self, nbytes: int | None) -> None:
        self._memory = None if nbytes is None else _huge_pages(nbytes)
        self.used = 0

    @property
    def counts(self) -> bool:
        """Whether it has no memory: what it hands out cannot be filled."""
        return self._memory is None

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Zeros of this shape; on the device "meta" where the arena only counts."""
        start, size = self.used, prod(shape) * dtype.itemsize
        self.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._memory[start : start + size].view(dtype).view(shape)

    def clear(self) -> None:
        """Zeros again, everywhere."""
        if self._memory is not None:
            self._memory.zero_()

    def put(self, values: Tensor) -> Tensor:
        """The values as float32."""
        taken = self.take(torch.float32, *values.shape)
        return taken if self.counts else taken.copy_(values.detach())


def in_arena(make: Callable[[Arena], T]) -> tuple[T, Arena]:
    """What `make` makes in an arena of just the size it needs; called twice, first with an arena that only counts."""
    counted = Arena(None)
    make(counted)
    arena = Arena(counted.used)
    return make(arena), arena


def _huge_pages(nbytes: int) -> Tensor:
    """Zeroed bytes that start on a cache line; pages of 2 MiB make reading them a tenth faster."""
    if nbytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class Packed:
    """A matrix in panels, and the tensors that its structure points into.

    Attributes:
        panels: float32: [panels, depth, 64]; bfloat16, int8: [panels, ceil(depth / 2), 64, 2].
        scales: float32 [panels, ceil(depth / 128), 64] of int8, else None.
        bias: float32 [panels * 64], or None.
    """

    panels: Tensor
    scales: Tensor | None
    bias: Tensor | None
    depth: int
    width: int

    def structure(self) -> PackedMatrix:
        scales, bias = (None if part is None else part.data_ptr() for part in (self.scales, self.bias))
        return PackedMatrix(self.panels.data_ptr(), scales, bias, self.depth, self.width)


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, arena: Arena) -> Packed:
    """A Linear's weight [width, depth] and bias [width], as panels of float32, bfloat16 or int8."""
    width, depth = weight.shape
    n_panels = -(-width // PANEL)
    in_pairs = (depth, PANEL) if dtype == torch.float32 else (-(-depth // 2), PANEL, 2)
    packed = Packed(
        arena.take(dtype, n_panels, *in_pairs),
        arena.take(torch.float32, n_panels, -(-depth // CHUNK), PANEL) if dtype == torch.int8 else None,
        None if bias is None else arena.take(torch.float32, n_panels * PANEL),
        *(depth, width),
    )
    if not arena.counts:
        _fill(packed, weight.detach(), None if bias is None else bias.detach())
    return packed


def pack_gated(weight: Tensor, bias: Tensor, dtype: torch.dtype, arena: Arena) -> Packed:
    """The Linear before a GEGLU, [2 F, depth], values before gates: panels hold 32 values, then their 32 gates."""
    width = weight.shape[0]
    if not arena.counts:
        weight, bias = _interleaved(weight.detach()), _interleaved(bias.detach()[:, None])[:, 0]
    return replace(pack(weight, bias, dtype, arena), width=width)


def _fill(packed: Packed, weight: Tensor, bias: Tensor | None) -> None:
    n_panels, depth = packed.panels.shape[0], packed.depth
    rows = F.pad(weight, (0, 0, 0, n_panels * PANEL - packed.width)).unflatten(0, (n_panels, PANEL)).transpose(1, 2)
    if packed.scales is not None:
        rows = _rounded_to_int8(rows.float(), packed.scales)
    if packed.panels.dim() == 4:
        pairs = F.pad(rows.to(packed.panels.dtype), (0, 0, 0, depth % 2)).unflatten(1, (-1, 2))
        packed.panels.copy_(pairs.transpose(2, 3))  # [panels, depth / 2, 64, 2]
    else:
        packed.panels.copy_(rows)
    if packed.bias is not None and bias is not None:
        packed.bias[: len(bias)] = bias


def product(x: Tensor, packed: Packed, epilogue: Epilogue, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [M, depth] times a packed matrix, into `out` float32 [M, width], gated [M, width / 2]. For tests."""
    rows = F.pad(x.float(), (0, -packed.depth % 16)).contiguous()
    matrix = packed.structure()
    arguments = PackedProduct(
        *(ctypes.pointer(matrix), ELEMENTS[packed.panels.dtype], epilogue, x.shape[0]),
        *(rows.data_ptr(), rows.shape[1], out.data_ptr(), out.shape[1]),
        None if scale is None else scale.data_ptr(),
    )
    status = _extension.library().dalle_fast_packed_product(ctypes.addressof(arguments))
    _extension.check(status, "packed_product")
    return out


def _rounded_to_int8(rows: Tensor, scales: Tensor) -> Tensor:
    """rows [panels, depth, 64] as int8; into scales [panels, chunks, 64] what 127 of a column and chunk stands for."""
    chunks = F.pad(rows, (0, 0, 0, -rows.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))  # [panels, chunks, 128, 64]
    torch.div(chunks.abs().amax(dim=2), _INT8_MOST, out=scales)
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
    return (chunks / divisors).round().to(torch.int8).flatten(1, 2)[:, : rows.shape[1]]


def _interleaved(halves: Tensor) -> Tensor:
    """[2 F, depth], values before gates, as [panels * 64, depth]: 32 values, their 32 gates, zeros behind the last."""
    half = halves.shape[0] // 2
    n_panels = -(-2 * half // PANEL)
    both = F.pad(halves.unflatten(0, (2, half)), (0, 0, 0, n_panels * PANEL // 2 - half))  # [2, panels * 32, depth]
    return both.unflatten(1, (n_panels, -1)).transpose(0, 1).flatten(0, 2)
