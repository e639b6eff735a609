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


class Row(NamedTuple):
    """A row of the table: for which calls, what, and where that was found best."""

    min_arch: int
    head_dim: int
    itemsize: int
    launch: Launch
    measured: str


NOT_MEASURED = "compiled for sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120; not yet measured"
_SMALL_SHARED_MEMORY = (86, 89, 120, 121)  # 99 KB a block, where others of their generation have 163 or more

# The first row with the call's head width and item size whose architecture is not newer is taken.
TABLE = (
    Row(80, 16, 2, Launch(Sizes(128, 64, 4, 2), Sizes(64, 64, 4, 2), Sizes(64, 64, 4, 2), 8), NOT_MEASURED),
    Row(80, 32, 2, Launch(Sizes(128, 64, 4, 2), Sizes(64, 64, 4, 2), Sizes(64, 64, 4, 2), 8), NOT_MEASURED),
    Row(80, 64, 2, Launch(Sizes(128, 64, 4, 2), Sizes(64, 64, 4, 2), Sizes(64, 64, 4, 2), 8), NOT_MEASURED),
    Row(80, 128, 2, Launch(Sizes(128, 64, 8, 1), Sizes(64, 64, 4, 1), Sizes(64, 64, 4, 1), 8), NOT_MEASURED),
    Row(80, 16, 4, Launch(Sizes(64, 32, 4, 1), Sizes(64, 32, 4, 1), Sizes(32, 64, 4, 1), 8), NOT_MEASURED),
    Row(80, 32, 4, Launch(Sizes(64, 32, 4, 1), Sizes(64, 32, 4, 1), Sizes(32, 64, 4, 1), 8), NOT_MEASURED),
    Row(80, 64, 4, Launch(Sizes(64, 32, 4, 1), Sizes(64, 32, 4, 1), Sizes(32, 64, 4, 1), 8), NOT_MEASURED),
    Row(80, 128, 4, Launch(Sizes(64, 32, 8, 1), Sizes(64, 32, 8, 1), Sizes(32, 64, 8, 1), 8), NOT_MEASURED),
)


def pick_sparse_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, arch: int) -> Launch:
    """Launch sizes for [B, H, N, D] at `dtype` on compute capability `arch` (90 for 9.0)."""
    head_dim = shape[-1]
    for row in TABLE:
        if arch >= row.min_arch and (row.head_dim, row.itemsize) == (head_dim, dtype.itemsize):
            return row.launch
    raise NotImplementedError(f"sparse_attention: no launch sizes for head width {head_dim}, {dtype}, sm_{arch}.")
