"""What decoding remembers: key / value caches typed by attention pattern, and the whole of a transformer's state.

An image token's keys are kept only as long as the pattern can still ask for them: a ring of 1 + (largest distance the
predicate allows) + slack slots, in raster order; `axial_col` keeps everything, column by column, so that a column is
read in one piece; `full` keeps everything. Keys and values are stored rotated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_fast.models.token_shift import ShiftCache
from dalle_fast.patterns import AttentionPattern
from dalle_fast.reference.sparse_attention import turns

if TYPE_CHECKING:
    from dalle_fast.layout import TokenLayout

_BY_COLUMNS = ("axial_col", "paper_col")  # patterns whose keys are stored column by column

Piece = slice | Tensor  # where some of a query's keys stand in a cache


class KVCache:
    """Keys and values of one attention layer: [B, H, T + slots, D], text first.

    Args:
        pattern: whose windows must stay readable.
        slack: longest step - 1 + longest rollback.
        like: [B, H, N, D], a tensor of the dtype, device and sizes to store.
    """

    def __init__(self, pattern: AttentionPattern, slack: int, like: Tensor) -> None:
        self.pattern = pattern
        self.slot_of = slots_of_positions(pattern, slack)
        batch, heads, _, dim_head = like.shape
        size = pattern.layout.text_len + ring_slots(pattern, slack)
        self._kv = like.new_empty(2, batch, heads, size, dim_head)
        self.k, self.v = self._kv
        self._pieces = WindowPieces.of(pattern, slack, like.device)
        self._device = like.device

    @property
    def nbytes(self) -> int:
        return self._kv.nbytes

    def write(self, kv: Tensor, start: int) -> None:
        """Remembers keys and values [2, B, H, M, D] of positions start .. start + M - 1; of more than fit, the last."""
        n = kv.shape[3]
        if n == 1:
            self._kv[:, :, :, self.slot_of[start]] = kv[:, :, :, 0]
            return
        text_len = self.pattern.layout.text_len
        first_image = max(start, text_len, start + n - (self.k.shape[2] - text_len))
        kept = [p for p in range(start, start + n) if p < text_len or p >= first_image]
        slots = torch.tensor([self.slot_of[p] for p in kept], device=self._device)
        rows = torch.tensor([p - start for p in kept], device=self._device)
        self._kv.index_copy_(3, slots, kv.index_select(3, rows))

    def window(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values the query at `position` attends to, as pieces ([B, H, W, D], [B, H, W, D])."""
        return [(_take(self.k, piece), _take(self.v, piece)) for piece in self._pieces.at(position)]

    def union_window(self, start: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """For the queries start .. start + n - 1: every key any of them may see, its value, and bool [n, W] who may."""
        query = torch.arange(start, start + n)
        key = torch.arange(start + n)
        allowed = self.pattern.allowed(query[:, None], key[None, :])
        seen = allowed.any(dim=0).nonzero().flatten()
        index = torch.tensor([self.slot_of[p] for p in seen.tolist()], device=self._device)
        return self.k.index_select(2, index), self.v.index_select(2, index), allowed[:, seen].to(self._device)


class DecodeCache:
    """The state of a transformer behind a prefix: what each layer remembers, and how many positions have been read.

    Args:
        max_step: most positions one later step may add.
        max_rollback: most positions that may be taken back.

    Layers make their parts on first use, so the cache takes dtype, device and batch size from the activations.
    """

    def __init__(self, layout: TokenLayout, *, max_step: int = 1, max_rollback: int = 0) -> None:
        if max_step < 1 or max_rollback < 0:
            raise ValueError(
                f"DecodeCache: max_step must be >= 1 and max_rollback >= 0, got {max_step} and {max_rollback}."
            )
        self.layout = layout
        self.max_step = max_step
        self.max_rollback = max_rollback
        self.offset = 0
        self._furthest = 0
        self._keys: dict[tuple[int, str], KVCache] = {}
        self._shifts: dict[tuple[int, str], ShiftCache] = {}
        self._turns: Tensor | None = None

    @property
    def slack(self) -> int:
        return self.max_step - 1 + self.max_rollback

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(kept.nbytes for kept in self._keys.values())

    def layer(self, index: int, name: str) -> LayerCache:
        """The part of branch `name` ("attn" or "ff") of block `index`."""
        return LayerCache(self, index, name)

    def turns(self, angles: Tensor, dtype: torch.dtype) -> Tensor:
        """The rotations of every position, for values of `dtype`: computed once, every layer turns by the same."""
        if self._turns is None:
            self._turns = turns(angles, dtype)
        return self._turns

    def advance(self, n: int) -> None:
        """Counts n positions as read; called once every layer has seen them."""
        self.offset += n
        self._furthest = max(self._furthest, self.offset)

    def rollback(self, n: int) -> None:
        """Takes the last n positions back. Raises ValueError beyond the start or `max_rollback`."""
        deepest = min(self.offset, self.max_rollback - (self._furthest - self.offset))
        if not 0 <= n <= deepest:
            raise ValueError(
                f"rollback: n must be in 0..{deepest}, got {n}. The cache is at position {self.offset} and was made "
                f"for rollbacks of {self.max_rollback}."
            )
        self.offset -= n

    def check_step(self, n: int, length: int) -> None:
        """Raises ValueError where n more positions do not fit behind the prefix."""
        if n < 1:
            raise ValueError(f"cache: a step must add at least 1 position, got {n}.")
        if self.offset > 0 and n > self.max_step:
            raise ValueError(f"cache: a step must add at most max_step={self.max_step} positions, got {n}.")
        if self.offset + n > length:
            raise ValueError(f"cache: {self.offset} positions read and {n} more exceed the sequence of {length}.")


class LayerCache:
    """A `DecodeCache` as one branch of one block sees it."""

    def __init__(self, state: DecodeCache, index: int, name: str) -> None:
        self.state, self._branch = state, (index, name)

    @property
    def offset(self) -> int:
        return self.state.offset

    def shift(self, x: Tensor) -> ShiftCache:
        """The token shift's part, made for activations like x."""
        shifts = self.state._shifts
        if self._branch not in shifts:
            shifts[self._branch] = ShiftCache(self.state.layout, self.state.slack, x)
        return shifts[self._branch]

    def keys(self, pattern: AttentionPattern, like: Tensor) -> KVCache:
        """The attention's part, made for keys like `like`."""
        keys = self.state._keys
        if self._branch not in keys:
            keys[self._branch] = KVCache(pattern, self.state.slack, like)
        return keys[self._branch]


# -------------------------------------------------------------------------------------- derived from the predicate


def ring_slots(pattern: AttentionPattern, slack: int) -> int:
    """Image slots a cache of this pattern needs: 1 + largest distance + slack, at most one for each image token."""
    n_image = pattern.layout.n_image
    if pattern.name in _BY_COLUMNS:  # stored column by column, where a ring would save next to nothing
        return n_image
    return min(n_image, 1 + pattern.max_image_distance() + slack)


@lru_cache(maxsize=64)
def slots_of_positions(pattern: AttentionPattern, slack: int) -> tuple[int, ...]:
    """Where each position of the layout is kept: text at itself, image tokens in a ring behind it or by columns."""
    layout, slots = pattern.layout, ring_slots(pattern, slack)
    text = list(range(layout.text_len))
    if pattern.name in _BY_COLUMNS:
        image = [(p % layout.grid_cols) * layout.grid_rows + p // layout.grid_cols for p in range(layout.n_image)]
    else:
        image = [p % slots for p in range(layout.n_image)]
    return tuple(text + [layout.text_len + slot for slot in image])


class WindowRuns(NamedTuple):
    """The image keys that each image token sees, as runs of slots, ascending in position: what the C++ engine walks."""

    slots: int
    slot_of: Tensor  # int64 [R * C]: where each image token is kept, counted from the first image slot
    run_start: Tensor  # int64 [R * C + 1]: image token p has the runs run_start[p] .. run_start[p + 1] - 1
    runs: Tensor  # int64 [runs, 2]: first slot, count


@lru_cache(maxsize=64)
def window_runs(pattern: AttentionPattern, slack: int) -> WindowRuns:
    """The window of every image token, in the slots of `slots_of_positions`."""
    layout = pattern.layout
    slot_of = torch.tensor(slots_of_positions(pattern, slack)[layout.text_len :]) - layout.text_len
    # Keys in the order of their slots, where that is not the order of positions: a column's keys then lie together.
    by_columns = pattern.name in _BY_COLUMNS
    keys = slot_of.argsort() if by_columns else torch.arange(layout.n_image)
    follows = torch.ones(layout.n_image, dtype=torch.bool)
    follows[1:] = slot_of[keys][1:] == slot_of[keys][:-1] + 1  # else a run ends before this key
    runs, counts = [], []
    for queries in torch.arange(layout.n_image).split(layout.grid_cols):  # bounds the memory of a mask
        seen = pattern.allowed(layout.text_len + queries[:, None], layout.text_len + keys[None, :])
        goes_on = seen[:, 1:] & seen[:, :-1] & follows[1:]
        query, first = (seen & ~F.pad(goes_on, (1, 0))).nonzero().unbind(1)
        last = (seen & ~F.pad(goes_on, (0, 1))).nonzero()[:, 1]
        runs.append(torch.stack((slot_of[keys[first]], last - first + 1), dim=1))
        counts.append(query.bincount(minlength=len(queries)))
    run_start = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    return WindowRuns(ring_slots(pattern, slack), slot_of, run_start, torch.cat(runs))


class WindowPieces:
    """The slots of every position's window, found on first use and shared by all caches of a pattern."""

    def __init__(self, pattern: AttentionPattern, slack: int, device: torch.device) -> None:
        self._pattern, self._device = pattern, device
        self._slot_of = slots_of_positions(pattern, slack)
        self._known: dict[int, tuple[Piece, ...]] = {}

    @staticmethod
    @lru_cache(maxsize=64)
    def of(pattern: AttentionPattern, slack: int, device: torch.device) -> WindowPieces:
        return WindowPieces(pattern, slack, device)

    def at(self, position: int) -> tuple[Piece, ...]:
        """`pattern.window(position)` as slots: one or two slices, or the text's slice and an index tensor."""
        if position not in self._known:
            self._known[position] = self._find(position)
        return self._known[position]

    def _find(self, position: int) -> tuple[Piece, ...]:
        slots = sorted(self._slot_of[p] for p in self._pattern.window(position).tolist())
        breaks = [i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1]
        runs = [slots[a:b] for a, b in zip([0, *breaks], [*breaks, len(slots)], strict=True)]
        if len(runs) <= 2:
            return tuple(slice(run[0], run[-1] + 1) for run in runs)
        first = runs[0]  # all of the text, but in block_sparse
        rest = torch.tensor(slots[len(first) :], device=self._device)
        return slice(first[0], first[-1] + 1), rest


def _take(cache: Tensor, piece: Piece) -> Tensor:
    return cache[:, :, piece] if isinstance(piece, slice) else cache.index_select(2, piece)
