"""Sparse attention in C++ (csrc/cpu/sparse_attention*): launchers for float32, bfloat16 and float16 on the CPU.

The structures repeat those of csrc/cpu/sparse_attention.h. A pattern reaches the kernels as data: for each tile of 64
queries the runs of keys it walks over, and for keys that only some of its queries see a mask of 64 bits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dalle_fast import _extension
from dalle_fast.patterns import AttentionPattern
from dalle_fast.tiles import partners, tile_positions

TILE = 64
GROUP = 16  # lanes that a run takes or leaves together
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Heads(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("stride_b", _I64), ("stride_h", _I64), ("stride_n", _I64)]

    @classmethod
    def of(cls, tensor: Tensor) -> _Heads:
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class _TileLists(ctypes.Structure):
    _fields_ = [
        *(("tiles", _I64), ("text_tiles", _I64)),
        *((name, _POINTER) for name in ("queries", "run_start", "runs", "keys", "masks")),
    ]


class _SparseAttention(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("batch", "heads", "n", "width")),
        *(("element", _I32), ("scale", ctypes.c_float)),
        *((name, _Heads) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, _POINTER) for name in ("stats", "cosines", "sines", "key_mask")),
        *(("mask_len", _I64), ("mask_text_queries", _I32), ("lists", _TileLists), ("threads", _I64)),
    ]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention, and what its backward needs to make the softmax weights again.

    Args: as `dalle_fast.ops.sparse_attention`, checked there; unit stride on D; `key_mask` as `pattern` takes it.
    Returns: [B, H, N, D], a view of memory laid out [B, N, H, D]; float32 [B, H, N, 2]: of the scores
        log2(e) * scale * q.k the maximum m, and the sum of 2^(score - m); -inf and 0 for a query without a legal key.
    """
    out = _heads_like(q)
    stats = torch.empty(*q.shape[:3], 2, dtype=torch.float32)
    call = _Call(q, k, v, pattern, key_mask, scale, rotary, out, stats)
    _extension.check(_extension.library().dalle_fast_sparse_attention_forward(call.pointer()), "sparse_attention")
    return out, stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    *,
    pattern: AttentionPattern,
    key_mask: Tensor | None,
    scale: float,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, H, N, D] in memory laid out [B, N, H, D], for the gradient of `out`."""
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dq, dk, dv = (_heads_like(q) for _ in range(3))
    call = _Call(q, k, v, pattern, key_mask, scale, rotary, out, stats)
    for name, tensor in (("dout", dout), ("dq", dq), ("dk", dk), ("dv", dv)):
        setattr(call.arguments, name, _Heads.of(tensor))
    _extension.check(_extension.library().dalle_fast_sparse_attention_backward(call.pointer()), "sparse_attention")
    return dq, dk, dv


def _heads_like(q: Tensor) -> Tensor:
    batch, heads, n, width = q.shape
    return q.new_empty(batch, n, heads, width).transpose(1, 2)


class _Call:
    """The arguments of one call, and the tensors they point into."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: AttentionPattern,
        key_mask: Tensor | None,
        scale: float,
        rotary: Tensor | None,
        out: Tensor,
        stats: Tensor,
    ) -> None:
        batch, heads, n, width = q.shape
        self.lists = _tile_lists(pattern, n <= pattern.layout.text_len)
        self.mask = None if key_mask is None else key_mask.contiguous()
        self.turns = None if rotary is None else turns_of_channels(rotary[:n], width)
        self.arguments = _SparseAttention(
            *(batch, heads, n, width, _ELEMENTS[q.dtype], scale),
            *(_Heads.of(tensor) for tensor in (q, k, v, out)),
            *(_Heads() for _ in range(4)),
            stats.data_ptr(),
            *((None, None) if self.turns is None else (part.data_ptr() for part in self.turns)),
            None if self.mask is None else self.mask.data_ptr(),
            0 if self.mask is None else self.mask.shape[1],
            pattern.masks_every_query,
            self.lists.structure(),
            torch.get_num_threads(),
        )

    def pointer(self) -> int:
        return ctypes.addressof(self.arguments)


def turns_of_channels(rotary: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """float32 [N, width padded to 16]: cosines, and sines with the sign that the channel's partner is added with."""
    n, rot = rotary.shape
    padded = -(-width // 16) * 16
    cosines, sines = torch.ones(n, padded), torch.zeros(n, padded)
    torch.cos(rotary, out=cosines[:, :rot])
    torch.sin(rotary, out=sines[:, :rot])
    sines[:, :rot:2].neg_()
    return cosines, sines


# ------------------------------------------------------------------------------------------------ tile lists


@dataclass(frozen=True)
class _Lists:
    """A pattern as the kernels walk it; see TileLists in csrc/cpu/sparse_attention.h."""

    text_tiles: int
    queries: Tensor  # int32 [tiles, TILE]
    run_start: Tensor  # int32 [tiles + 1]
    runs: Tensor  # int32 [runs, 5]: key, count, first group, groups, mask
    keys: Tensor  # int32
    masks: Tensor  # int64, 64 bits each

    def structure(self) -> _TileLists:
        pointers = (part.data_ptr() for part in (self.queries, self.run_start, self.runs, self.keys, self.masks))
        return _TileLists(self.queries.shape[0], self.text_tiles, *pointers)


@lru_cache(maxsize=64)
def _tile_lists(pattern: AttentionPattern, text_only: bool = False) -> _Lists:
    tiles = tile_positions(pattern, TILE)
    text_tiles = -(-pattern.layout.text_len // TILE)
    if text_only:  # a prompt: no need to look at the image, which has many more tiles
        tiles = tiles[:text_tiles]
    # Keys that follow each other, most of all the text, point into one list of all positions.
    keys, masks = [torch.arange(pattern.length)], []
    n_keys, n_masks = pattern.length, 0
    runs, run_start = [], [0]
    for positions in tiles:
        for run_keys, first_group, groups, run_masks in _runs(pattern, positions):
            first, last = int(run_keys[0]), int(run_keys[-1])
            key = first if last - first == len(run_keys) - 1 else n_keys
            if key == n_keys:
                keys.append(run_keys)
                n_keys += len(run_keys)
            runs.append((key, len(run_keys), first_group, groups, -1 if run_masks is None else n_masks))
            if run_masks is not None:
                masks.append(run_masks)
                n_masks += len(run_masks)
        run_start.append(len(runs))
    return _Lists(
        text_tiles=text_tiles,
        queries=tiles.int().contiguous(),
        run_start=torch.tensor(run_start, dtype=torch.int32),
        runs=torch.tensor(runs, dtype=torch.int32),
        keys=torch.cat(keys).int(),
        masks=torch.cat([torch.empty(0, dtype=torch.int64), *masks]),
    )


def _runs(pattern: AttentionPattern, positions: Tensor) -> list[tuple[Tensor, int, int, Tensor | None]]:
    """The runs of one tile: keys, first group and groups of the lanes that meet them, masks [keys] or None."""
    keys, meets = partners(pattern, positions)
    idle = (positions < 0)[:, None]
    groups = meets.view(TILE // GROUP, GROUP, -1).any(dim=1).int()  # [groups, W]
    first = groups.argmax(dim=0)
    last = TILE // GROUP - 1 - groups.flip(0).argmax(dim=0)
    group = torch.arange(TILE)[:, None] // GROUP
    outside = (group < first) | (group > last)
    masked = ~(meets | idle | outside).all(dim=0)
    lanes = (meets.long() << torch.arange(TILE)[:, None]).sum(dim=0)  # the last lane is the sign: it wraps as it should
    kind = (masked.long() * TILE + first) * TILE + last
    order = torch.argsort(kind, stable=True)
    counts = torch.unique_consecutive(kind[order], return_counts=True)[1]
    runs = []
    for chosen in order.split(counts.tolist()):
        one = chosen[0]
        start, count = int(first[one]), int(last[one] - first[one]) + 1
        runs.append((keys[chosen], start, count, lanes[chosen] if masked[one] else None))
    return runs
