"""The decoding engine in C++ (csrc/cpu/decode*): its structures, caches, and one call that reads rows or draws tokens.

The structures repeat those of csrc/cpu/decode.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_fast import _extension
from dalle_fast.native.choose_token import TokenChoice
from dalle_fast.native.packing import PANEL, Arena, PackedMatrix

CACHE_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LANES = 16  # what a head's width is padded to

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class DecodeBranch(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("norm_weight", "norm_bias", "norm_out_weight", "norm_out_bias", "scale")]


class DecodeWindows(ctypes.Structure):
    _fields_ = [("slots", _I64), *((name, _POINTER) for name in ("slot_of", "run_start", "runs"))]


class DecodeLayer(ctypes.Structure):
    _fields_ = [
        *((name, DecodeBranch) for name in ("attention", "feed_forward")),
        *((name, PackedMatrix) for name in ("qkv", "out", "widen", "narrow")),
        ("windows", DecodeWindows),
    ]


class DecodeTable(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("element", _I32)]


class DecodeModel(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("dim", "heads", "dim_head", "inner_ff", "depth")),
        *((name, _I64) for name in ("text_len", "grid_rows", "grid_cols")),
        *((name, _I32) for name in ("weights", "cache", "shift", "reversible", "stable")),
        *(("epsilon", ctypes.c_float), ("layers", ctypes.POINTER(DecodeLayer))),
        *(("cosines", _POINTER), ("sines", _POINTER), ("text_table", DecodeTable), ("image_table", DecodeTable)),
        *((name, _POINTER) for name in ("text_places", "row_places", "col_places")),
        *((name, _POINTER) for name in ("head_norm_weight", "head_norm_bias")),
        *(("text_head", PackedMatrix), ("image_head", PackedMatrix)),
    ]


class DecodeLayerCache(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("text_keys", "text_values", "image_keys", "image_values")),
        *((name, _POINTER * 2) for name in ("text_shift", "image_shift")),
    ]


class DecodeCaches(ctypes.Structure):
    _fields_ = [
        *(("layers", ctypes.POINTER(DecodeLayerCache)), ("prompt_of", _POINTER)),
        *(("shift_text_slots", _I64), ("shift_image_slots", _I64)),
    ]


class DecodeRows(ctypes.Structure):
    _fields_ = [
        ("count", _I64),
        *((name, _POINTER) for name in ("sequence", "position", "token", "back")),
        *(("wanted", _I64), ("wanted_rows", _POINTER), ("text_logits", _I32)),
    ]


class DecodeDraw(ctypes.Structure):
    _fields_ = [
        *(("samples", _I64), ("steps", _I64), ("first", _I64), ("guided", _I32), ("cond_scale", ctypes.c_float)),
        *(("choice", TokenChoice), ("seeds", _POINTER), ("codes", _POINTER)),
    ]


class Decode(ctypes.Structure):
    _fields_ = [
        *(("model", ctypes.POINTER(DecodeModel)), ("caches", ctypes.POINTER(DecodeCaches))),
        *(("rows", DecodeRows), ("draw", DecodeDraw), ("logits", _POINTER), ("workspace", _POINTER), ("threads", _I64)),
    ]


# ------------------------------------------------------------------------------------------------ caches


@dataclass(frozen=True)
class CacheSizes:
    """What sizes of caches follow from: those of the model, of its image rings and of its token shift."""

    heads: int
    dim_head: int
    text_len: int
    ring_slots: tuple[int, ...]  # a layer
    dtype: torch.dtype
    shift_channels: tuple[int, int] | None  # of a text and of an image token; None without shift

    def text(self, prompts: int, arena: Arena) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, prompts, ...], each prompt's in panels: of T columns, and of T rows."""
        layers, step = len(self.ring_slots), 2 if self.dtype == torch.bfloat16 else 1
        keys, values = (
            arena.take(self.dtype, layers, prompts, self.heads * _panels(width) * -(-depth // step) * PANEL * step)
            for width, depth in ((self.text_len, self.dim_head), (self.dim_head, self.text_len))
        )
        return keys, values

    def image(self, samples: int, arena: Arena) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [samples, H, slots, D padded to 16] of each layer."""
        width = -(-self.dim_head // _LANES) * _LANES
        return [
            (arena.take(self.dtype, *shape), arena.take(self.dtype, *shape))
            for shape in ((samples, self.heads, slots, width) for slots in self.ring_slots)
        ]

    def shift(self, sequences: int, slots: int, image: bool, arena: Arena) -> list[list[Tensor]]:
        """Rings [sequences, slots, channels] of each layer's two branches; none without shift."""
        if self.shift_channels is None:
            return []
        shape = (sequences, slots, self.shift_channels[image])
        return [[arena.take(torch.float32, *shape) for _ in range(2)] for _ in self.ring_slots]


def _panels(width: int) -> int:
    return -(-width // PANEL)


def layer_caches(
    text: tuple[Tensor, Tensor],
    image: Sequence[tuple[Tensor, Tensor]],
    text_shift: Sequence[Sequence[Tensor]],
    image_shift: Sequence[Sequence[Tensor]],
) -> ctypes.Array[DecodeLayerCache]:
    """The layers' structures over these tensors; the others may be empty where a call does not need them."""
    layers = (DecodeLayerCache * len(text[0]))()
    for i, layer in enumerate(layers):
        layer.text_keys, layer.text_values = (part[i].data_ptr() for part in text)
        if image:
            layer.image_keys, layer.image_values = (part.data_ptr() for part in image[i])
        for shifts, pointers in ((text_shift, layer.text_shift), (image_shift, layer.image_shift)):
            for branch, ring in enumerate(shifts[i] if shifts else ()):
                pointers[branch] = ring.data_ptr()
    return layers


# ------------------------------------------------------------------------------------------------ calls


def workspace_floats(model: DecodeModel, rows: int) -> int:
    """Floats of workspace for calls of at most this many rows."""
    return _extension.library().dalle_fast_decode_workspace(ctypes.addressof(model), rows)


def digest(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes, on the CPU."""
    whole, out = tensor.detach().contiguous(), ctypes.c_uint64()
    status = _extension.library().dalle_fast_digest(whole.data_ptr(), whole.nbytes, ctypes.addressof(out))
    _extension.check(status, "digest")
    return out.value


class Rows:
    """Rows of one call, as tensors and as the structure over them.

    Args:
        sequence, position, token: int64 [sequences, M], rows of one sequence one behind the other.
        last_only: logits of each sequence's last row, not of all.
        text_logits: by the text head.
    """

    def __init__(
        self, sequence: Tensor, position: Tensor, token: Tensor, *, last_only: bool, text_logits: bool = False
    ) -> None:
        n, m = token.shape
        back = torch.arange(m).expand(n, m)
        wanted = torch.arange(n * m).view(n, m)[:, -1:] if last_only else torch.arange(n * m)
        self._parts = [part.reshape(-1).contiguous() for part in (sequence, position, token, back, wanted)]
        pointers = [part.data_ptr() for part in self._parts]
        self.wanted = self._parts[4].shape[0]
        self.structure = DecodeRows(n * m, *pointers[:4], self.wanted, pointers[4], text_logits)

    @classmethod
    def to_draw(cls, sequences: int) -> Rows:
        """Room for the rows of a draw, which fills in position and token: one of each sequence."""
        room = torch.zeros(sequences, 1, dtype=torch.long)
        return cls(torch.arange(sequences)[:, None], room, room.clone(), last_only=True)


def run(
    model: DecodeModel,
    caches: DecodeCaches,
    rows: Rows,
    logits: Tensor,
    workspace: Tensor,
    draw: DecodeDraw | None = None,
) -> None:
    """One call: reads the rows; or draws, from `logits` on. Writes caches, `logits` [wanted, K] and the codes drawn."""
    arguments: Any = Decode(
        *(ctypes.pointer(model), ctypes.pointer(caches), rows.structure, DecodeDraw() if draw is None else draw),
        *(logits.data_ptr(), workspace.data_ptr(), torch.get_num_threads()),
    )
    _extension.check(_extension.library().dalle_fast_decode(ctypes.addressof(arguments)), "decode")
