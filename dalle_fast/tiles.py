"""Tiles of positions, and whom each meets: how a kernel walks a pattern without an [N, N] mask.

A tile holds positions that attend to much the same keys, so that a block of keys, loaded once, serves all of it. Text
and image never share a tile: an image query sees all text, a text query sees no image token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dalle_fast.patterns import AttentionPattern

BLOCK_SIDE = 8  # image tokens of a square block, for the patterns that look around in two dimensions
_SUB_BLOCK_SIDE = 4  # 16 neighbours: one vector of queries, so that few of its lanes see nothing in a key


def tile_positions(pattern: AttentionPattern, size: int) -> Tensor:
    """int64 [n_tiles, size]: the positions of each tile, text tiles first; -1 fills up the last one of text and image.

    Args:
        size: positions of a tile, at least 1.
    """
    order = _order(pattern)
    text_len = pattern.layout.text_len
    return torch.cat([_padded(part, size) for part in (order[:text_len], order[text_len:])])


def partners(
    pattern: AttentionPattern, positions: Tensor, *, of: Literal["queries", "keys"] = "queries"
) -> tuple[Tensor, Tensor]:
    """Whom the positions of a tile meet.

    Args:
        positions: int64 [size], -1 = padding, which meets nobody.
        of: "queries": the positions ask, and meet the keys they attend to; "keys": they are asked, and meet the queries
            that attend to them.
    Returns: int64 [W], ascending, every position that at least one of these meets; bool [size, W], which pairs do.
    """
    present = positions[positions >= 0]
    first, end = 0, pattern.length
    if pattern.causal and present.numel():  # no query meets a later key
        first, end = (0, int(present.max()) + 1) if of == "queries" else (int(present.min()), pattern.length)
    everyone = torch.arange(first, end, dtype=torch.int32)  # half the bytes of int64: N^2 comparisons in all
    mine = positions.clamp(min=0).int()[:, None]
    meets = pattern.allowed(mine, everyone) if of == "queries" else pattern.allowed(everyone, mine)
    meets = meets & (positions >= 0)[:, None]
    met = meets.any(dim=0).nonzero().flatten()
    return met + first, meets[:, met]


@lru_cache(maxsize=64)
def _order(pattern: AttentionPattern) -> Tensor:
    """int64 [length]: all positions, text first, image tokens in the order in which tiles take them."""
    layout = pattern.layout
    image = torch.arange(layout.text_len, layout.length)
    row, col = layout.row_of(image), layout.col_of(image)
    if pattern.name in ("axial_col", "paper_col"):
        image = image[_sorted_by(col, row)]
    elif pattern.name in ("conv_like", "paper_conv"):
        step = dict(pattern.options).get("dilation", 1)
        assert isinstance(step, int)
        # Dilated windows never join cells of different residues: such cells share no keys, and no tile.
        across, down = col // step, row // step
        keys = [row % step, col % step]
        for side in (BLOCK_SIDE, _SUB_BLOCK_SIDE, 1):
            keys += [down // side, across // side]
        image = image[_sorted_by(*keys)]
    return torch.cat((torch.arange(layout.text_len), image))


def _sorted_by(*keys: Tensor) -> Tensor:
    """The order that sorts by the first key, then the second, ..."""
    order = torch.arange(keys[0].numel())
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _padded(positions: Tensor, size: int) -> Tensor:
    n_tiles = -(-positions.numel() // size)
    tiles = positions.new_full((n_tiles * size,), -1)
    tiles[: positions.numel()] = positions
    return tiles.view(n_tiles, size)
