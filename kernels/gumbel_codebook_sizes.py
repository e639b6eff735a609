"""Launch sizes of the gumbel_codebook kernels: a table, and the function that reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """Block sizes and launch options of one kernel."""

    block_m: int  # rows
    block_n: int  # codes, in four lanes
    block_c: int  # channels of the codebook in a block, at most: fewer where it is narrower
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """How the kernels of one call are launched."""

    forward: Sizes  # the mixture, soft; block_c splits it over programs, each of which forms all logits
    search: Sizes  # codes and statistics only: straight_through, reinmax, `codes`
    rows: Sizes  # dfeatures; block_c is how much of a product is formed at once, as in weight
    weight: Sizes  # dweight, dbias
    codebook: Sizes  # dcodebook; block_c splits it, as in forward


class Row(NamedTuple):
    """A row of the table: for which calls, what, and where that was found best."""

    arches: tuple[int, ...]  # generations, by the tens: 90 for Hopper
    itemsize: int
    launch: Launch
    measured: str


NOT_MEASURED = "compiled for every target, at most 64 bytes of spills a thread; not yet measured"
# By shared memory and matrix units. 80: at most 99 KB a block on some, products out of registers. 90, 100: 227 KB,
# products out of shared memory, of 64 rows a warp group.
SMALL = (80, 120)
LARGE = (90, 100, 110)
ALL = SMALL + LARGE

_SMALL_16 = Launch(
    forward=Sizes(128, 64, 128, 8, 2),
    search=Sizes(64, 64, 128, 4, 2),
    rows=Sizes(64, 64, 64, 8, 2),
    weight=Sizes(64, 32, 64, 4, 2),
    codebook=Sizes(64, 64, 128, 8, 2),
)
_LARGE_16 = Launch(
    forward=Sizes(128, 64, 256, 8, 2),
    search=Sizes(64, 64, 128, 4, 2),
    rows=Sizes(64, 64, 128, 4, 2),
    weight=Sizes(64, 32, 64, 4, 2),
    codebook=Sizes(64, 64, 256, 8, 2),
)
_ALL_32 = Launch(
    forward=Sizes(16, 64, 256, 8, 1),
    search=Sizes(32, 32, 64, 8, 1),
    rows=Sizes(32, 32, 64, 8, 1),
    weight=Sizes(32, 32, 32, 8, 1),
    codebook=Sizes(32, 64, 64, 8, 1),
)
TABLE = (
    Row(SMALL, 2, _SMALL_16, NOT_MEASURED),
    Row(LARGE, 2, _LARGE_16, NOT_MEASURED),
    Row(ALL, 4, _ALL_32, NOT_MEASURED),
)


def pick_gumbel_codebook(dtype: torch.dtype, arch: int) -> Launch:
    """Launch sizes at `dtype` on compute capability `arch` (90 for 9.0)."""
    generation = arch // 10 * 10
    for row in TABLE:
        if generation in row.arches and row.itemsize == dtype.itemsize:
            return row.launch
    raise NotImplementedError(f"gumbel_codebook: no launch sizes for {dtype} on sm_{arch}.")
