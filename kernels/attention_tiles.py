"""Which blocks each tile of sparse attention walks over: small int32 tables, built on the host once per shape.

A query tile meets the keys of one contiguous run that all of its queries attend to (the text; everything before the
tile for `full`), walked in whole blocks without a mask, and a list of further keys that some of its queries attend to,
gathered, with the predicate. The rest of the keys is in no block. Key tiles meet queries the same way, turned round:
the run is at the end, where every query attends to these keys.

Text of 2^k + 1 positions (`<bos>` and 2^k more) is no whole number of blocks. Where every query attends to key 0, that
key can be taken apart, as a vector, so that no block is spent on it: `first` is then 1, the first key of the tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dalle_fast.patterns import AttentionPattern
from dalle_fast.tiles import partners, tile_positions


class QueryTiles(NamedTuple):
    """What query-outer kernels walk. Positions are -1 where a tile or block is not full."""

    positions: Tensor  # int32 [n_tiles, BLOCK_M]: the queries of each tile
    walks: Tensor  # int32 [n_tiles, 3]: whole key blocks from key `first` on; first and number of rows of `gathered`
    gathered: Tensor  # int32 [n_rows, BLOCK_N]: keys that need the predicate
    first: int  # 1 where key 0 is taken apart
    first_key: Tensor  # int32 [1, 1]: key 0 as a tile
    first_split: Tensor  # int32 [1, 3]: tile 0 has n_tiles slots from slot 0 on; see KeyTiles.splits


class KeyTiles(NamedTuple):
    """What the key-outer kernel walks, in items of bounded length. Positions are -1 where a tile is not full."""

    positions: Tensor  # int32 [n_tiles, BLOCK_N]: the keys of each tile
    items: Tensor  # int32 [n_items, 6]: tile, first query and number of whole query blocks, rows as above, slot or -1
    gathered: Tensor  # int32 [n_rows, BLOCK_M]: queries that need the predicate
    splits: Tensor  # int32 [n_splits, 3]: tile, its first slot, its number of slots
    n_slots: int  # partial sums that items of split tiles leave behind


def takes_first_apart(pattern: AttentionPattern, block_n: int) -> bool:
    """Whether key 0 is better treated as a vector: the text is one key longer than whole blocks, and all see key 0."""
    everyone = torch.arange(pattern.length)
    return pattern.layout.text_len % block_n == 1 and bool(pattern.allowed(everyone, everyone[:1]).all())


@lru_cache(maxsize=256)
def query_tiles(
    pattern: AttentionPattern, n: int, block_m: int, block_n: int, apart: bool, device: torch.device
) -> QueryTiles:
    """The tiles of the first n positions, most work first: a long tile that starts late would be waited for.

    apart: take key 0 apart where that saves a block.
    """
    first = int(apart and takes_first_apart(pattern, block_n))
    walks = []
    for queries in _split(pattern, n, block_m, lone_text_query_joins=True):
        keys, every = _met(pattern, queries, first, n, of="queries")
        in_run = every & (keys == torch.arange(first, first + len(keys)))
        n_whole = int(in_run.long().cumprod(0).sum()) // block_n
        walks.append((queries, n_whole, keys[n_whole * block_n :]))
    walks.sort(key=lambda walk: -walk[1] - -(-len(walk[2]) // block_n))
    rows, spans = _rows([keys for *_, keys in walks], block_n)
    table = [(n_whole, *span) for (_, n_whole, _), span in zip(walks, spans, strict=True)]
    positions, _ = _rows([queries for queries, *_ in walks], block_m)
    tables = (_table(table, 3).to(device), rows.to(device))
    key, split = _table([(0,)], 1).to(device), _table([(0, 0, len(walks))], 3).to(device)
    return QueryTiles(positions.to(device), *tables, first, first_key=key, first_split=split)


@lru_cache(maxsize=256)
def key_tiles(
    pattern: AttentionPattern, n: int, block_m: int, block_n: int, first: int, longest: int, device: torch.device
) -> KeyTiles:
    """The tiles of keys first..n-1; the work of one tile is cut into items of at most `longest` query blocks."""
    tiles = _split(pattern, n, block_n, first=first)
    runs, lists = [], []
    for keys in tiles:
        queries, every = _met(pattern, keys, 0, n, of="keys")
        in_run = every & (queries == torch.arange(n - len(queries), n))
        n_whole = int(in_run.flip(0).long().cumprod(0).sum()) // block_m
        runs.append((n - n_whole * block_m, n_whole))
        lists.append(queries[: len(queries) - n_whole * block_m])
    rows, spans = _rows(lists, block_m)
    items: list[tuple[int, ...]] = []
    splits: list[tuple[int, ...]] = []
    n_slots = 0
    for tile, (run, span) in enumerate(zip(runs, spans, strict=True)):
        pieces = _cut(run, span, block_m, longest)
        slots = range(n_slots, n_slots + len(pieces)) if len(pieces) > 1 else [-1]
        items += [(tile, *piece, slot) for piece, slot in zip(pieces, slots, strict=True)]
        if len(pieces) > 1:
            splits.append((tile, n_slots, len(pieces)))
            n_slots += len(pieces)
    items.sort(key=lambda item: -item[2] - item[4])
    positions, _ = _rows(tiles, block_n)
    tables = (_table(items, 6).to(device), rows.to(device), _table(splits, 3).to(device))
    return KeyTiles(positions.to(device), *tables, n_slots)


def _split(
    pattern: AttentionPattern, n: int, size: int, *, first: int = 0, lone_text_query_joins: bool = False
) -> list[Tensor]:
    """Positions first..n-1 in tiles of `size` or fewer, int64; text and image apart, in the order of dalle_fast.tiles.

    lone_text_query_joins: a last text query that would be alone in its tile moves to the last image tile where that
        has room: it sees all text, as image queries do. (With 257 text positions and 1,023 image inputs, always.)
    """
    order = tile_positions(pattern, 1).flatten()
    order = order[(order >= first) & (order < n)]
    is_text = order < pattern.layout.text_len
    text, image = order[is_text], order[~is_text]
    if lone_text_query_joins and len(text) % size == 1 and len(image) % size:
        text, image = text[:-1], torch.cat((image, text[-1:]))
    return [tile for part in (text, image) for tile in part.split(size) if len(tile)]


def _met(
    pattern: AttentionPattern, tile: Tensor, low: int, high: int, *, of: Literal["queries", "keys"]
) -> tuple[Tensor, Tensor]:
    """Partners of a tile among positions low..high-1, ascending, and for each whether it meets the whole tile."""
    positions, meets = partners(pattern, tile, of=of)
    inside = (positions >= low) & (positions < high)
    return positions[inside], meets.all(dim=0)[inside]


def _cut(run: tuple[int, int], span: tuple[int, int], block: int, longest: int) -> list[tuple[int, int, int, int]]:
    """Pieces of about equal length, each at most `longest` blocks, of a run (start, blocks) followed by rows."""
    (start, n_whole), (row, n_rows) = run, span
    total = n_whole + n_rows
    n_pieces = max(1, -(-total // longest))
    cuts = [i * total // n_pieces for i in range(n_pieces + 1)]
    pieces = []
    for low, high in pairwise(cuts):
        whole_low, whole_high = min(low, n_whole), min(high, n_whole)
        row_low, row_high = max(low - n_whole, 0), max(high - n_whole, 0)
        pieces.append((start + whole_low * block, whole_high - whole_low, row + row_low, row_high - row_low))
    return pieces


def _rows(lists: list[Tensor], width: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """int32 [n_rows, width]: the lists one after the other, each from a new row on; (first row, rows) of each."""
    spans, n_rows = [], 0
    for positions in lists:
        spans.append((n_rows, -(-len(positions) // width)))
        n_rows += spans[-1][1]
    rows = torch.full((n_rows, width), -1, dtype=torch.int32)
    for (start, _), positions in zip(spans, lists, strict=True):
        rows.view(-1)[start * width : start * width + len(positions)] = positions.to(torch.int32)
    return rows, spans


def _table(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), width)
