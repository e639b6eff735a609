"""Launch sizes of the sparse attention kernels: a table, and the function that reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """Block sizes and launch options of one kernel."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """How the kernels of one call are launched."""

    forward: Sizes
    backward_queries: Sizes  # dq
    backward_keys: Sizes  # dk, dv
    longest: int  # query blocks that one program of the key-outer kernel walks at most
    apart: bool  # take key 0 apart where that saves a block (see attention_tiles.py); float32 spills with it


class Row(NamedTuple):
    """A row of the table: for which calls, what, and where that was found best."""

    arches: tuple[int, ...]  # generations, by the tens: 90 for Hopper
    head_dim: int
    itemsize: int
    launch: Launch
    measured: str


NOT_MEASURED = "compiled for sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120; not yet measured"
# By shared memory and matrix units. 80: at most 99 KB a block on some, products out of registers. 90, 100: 227 KB,
# products out of shared memory.
SMALL = (80, 120)
LARGE = (90, 100, 110)
ALL = SMALL + LARGE

TABLE = (
    Row(SMALL, 16, 2, Launch(Sizes(128, 64, 8, 3), Sizes(64, 32, 4, 2), Sizes(64, 32, 8, 2), 8, True), NOT_MEASURED),
    Row(SMALL, 32, 2, Launch(Sizes(128, 64, 8, 3), Sizes(64, 32, 4, 2), Sizes(64, 32, 8, 2), 8, True), NOT_MEASURED),
    Row(SMALL, 64, 2, Launch(Sizes(128, 32, 8, 2), Sizes(64, 32, 8, 2), Sizes(64, 32, 4, 2), 8, True), NOT_MEASURED),
    Row(SMALL, 128, 2, Launch(Sizes(64, 32, 8, 2), Sizes(64, 32, 8, 1), Sizes(64, 32, 8, 1), 8, True), NOT_MEASURED),
    Row(LARGE, 16, 2, Launch(Sizes(128, 64, 8, 3), Sizes(64, 64, 4, 2), Sizes(64, 64, 4, 2), 8, True), NOT_MEASURED),
    Row(LARGE, 32, 2, Launch(Sizes(128, 64, 8, 3), Sizes(64, 64, 4, 2), Sizes(64, 64, 4, 2), 8, True), NOT_MEASURED),
    Row(LARGE, 64, 2, Launch(Sizes(128, 64, 8, 3), Sizes(64, 64, 4, 2), Sizes(64, 64, 8, 2), 8, True), NOT_MEASURED),
    Row(LARGE, 128, 2, Launch(Sizes(128, 64, 8, 2), Sizes(64, 64, 8, 2), Sizes(64, 64, 8, 1), 8, True), NOT_MEASURED),
    Row(ALL, 16, 4, Launch(Sizes(32, 32, 4, 1), Sizes(32, 32, 4, 1), Sizes(32, 32, 8, 1), 8, False), NOT_MEASURED),
    Row(ALL, 32, 4, Launch(Sizes(32, 32, 8, 1), Sizes(32, 32, 4, 1), Sizes(32, 16, 4, 1), 8, False), NOT_MEASURED),
    Row(ALL, 64, 4, Launch(Sizes(32, 16, 8, 1), Sizes(32, 32, 8, 1), Sizes(32, 16, 4, 1), 8, False), NOT_MEASURED),
    Row(ALL, 128, 4, Launch(Sizes(32, 16, 8, 1), Sizes(16, 16, 8, 1), Sizes(16, 16, 8, 1), 8, False), NOT_MEASURED),
)


def pick_sparse_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, arch: int) -> Launch:
    """Launch sizes for [B, H, N, D] at `dtype` on compute capability `arch` (90 for 9.0)."""
    head_dim, generation = shape[-1], arch // 10 * 10
    for row in TABLE:
        if generation in row.arches and (row.head_dim, row.itemsize) == (head_dim, dtype.itemsize):
            return row.launch
    raise NotImplementedError(f"sparse_attention: no launch sizes for head width {head_dim}, {dtype}, sm_{arch}.")
