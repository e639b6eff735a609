"""Launch sizes of the vocab_cross_entropy kernels: a table, and the function that reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """Block sizes and launch options of one kernel; of a product, tile [block_m, block_n], summed block_k at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """How the kernels of one call are launched. Blocks are powers of two; a buffer's length is a multiple of all."""

    rows: Sizes  # the norm, forward and backward: rows by channels, nothing summed
    logits: Sizes  # rows by codes over channels; forward and backward alike, so that a logit is the same bits in both
    dnormed: Sizes  # rows by channels over codes
    dweight: Sizes  # codes by channels over rows

    @property
    def row_multiple(self) -> int:
        """What the rows of a buffer are a multiple of."""
        return max(self.rows.block_m, self.logits.block_m, self.dnormed.block_m, self.dweight.block_k)

    @property
    def code_multiple(self) -> int:
        """What the codes of a buffer are a multiple of."""
        return max(self.logits.block_n, self.dnormed.block_k, self.dweight.block_m)

    @property
    def channel_multiple(self) -> int:
        """What the channels of a buffer are a multiple of."""
        return max(self.logits.block_k, self.dnormed.block_n, self.dweight.block_n)


class Row(NamedTuple):
    """A row of the table: for which calls, what, and where that was found best."""

    arches: tuple[int, ...]  # generations, by the tens: 90 for Hopper
    itemsize: int  # of the products' operands
    launch: Launch
    measured: str


NOT_MEASURED = "compiled for every target, without spills; not yet measured"
# By shared memory and matrix units. 80: at most 99 KB a block on some, products out of registers. 90, 100: 227 KB,
# products out of shared memory, of 64 rows a warp group.
SMALL = (80, 120)
LARGE = (90, 100, 110)
ALL = SMALL + LARGE

_ROWS = Sizes(8, 512, 1, 4, 1)
_SMALL_16 = Launch(
    rows=_ROWS,
    logits=Sizes(128, 128, 32, 8, 4),
    dnormed=Sizes(128, 128, 32, 8, 4),
    dweight=Sizes(128, 128, 32, 8, 4),
)
_LARGE_16 = Launch(
    rows=_ROWS,
    logits=Sizes(128, 128, 64, 8, 4),
    dnormed=Sizes(128, 128, 64, 8, 4),
    dweight=Sizes(128, 128, 64, 8, 4),
)
_ALL_32 = Launch(
    rows=_ROWS,
    logits=Sizes(128, 128, 16, 8, 2),
    dnormed=Sizes(128, 128, 16, 8, 2),
    dweight=Sizes(128, 128, 16, 8, 2),
)
TABLE = (
    Row(SMALL, 2, _SMALL_16, NOT_MEASURED),
    Row(LARGE, 2, _LARGE_16, NOT_MEASURED),
    Row(ALL, 4, _ALL_32, NOT_MEASURED),
)


def pick_vocab_cross_entropy(product_dtype: torch.dtype, arch: int) -> Launch:
    """Launch sizes for products of `product_dtype` on compute capability `arch` (90 for 9.0)."""
    generation = arch // 10 * 10
    for row in TABLE:
        if generation in row.arches and row.itemsize == product_dtype.itemsize:
            return row.launch
    raise NotImplementedError(f"vocab_cross_entropy: no launch sizes for {product_dtype} on sm_{arch}.")
