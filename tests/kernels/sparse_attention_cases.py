"""What to compile of sparse attention: every kernel of every launch row, for every target of the row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from dalle_fast.kernels.sparse_attention import launch_backward, launch_forward
from dalle_fast.kernels.sparse_attention_sizes import TABLE, Row
from triton_tools.ahead_of_time import TARGETS, AotCase, recorded_launches

from dalle_fast import patterns

TEXT_LEN, GRID = 257, (32, 32)
N = TEXT_LEN + GRID[0] * GRID[1] - 1
LAUNCH_OPTIONS = ("num_warps", "num_stages")

# With rotary and a key mask: all that a kernel can have to do. Each row takes the next, so that every predicate and
# both kinds of masks are compiled. Kernels without either need less of everything, and are compiled once a row.
PATTERNS = [
    patterns.make(name, text_len=TEXT_LEN, grid=GRID, **options)
    for name, options in [
        ("axial_row", {}),
        ("full", {}),
        ("conv_like", {"dilation": 2}),
        ("block_sparse", {}),
        ("axial_col", {}),
        ("paper_conv", {"wrap": "torus"}),
        ("bidirectional", {}),
        ("paper_conv", {}),
        ("paper_row", {}),
        ("conv_like", {}),
        ("paper_conv", {"wrap": "none"}),
        ("block_sparse", {}),
    ]
]


def aot_cases() -> list[AotCase]:
    """Two variants of every row: with rotary and key mask; with neither."""
    return [case for index, row in enumerate(TABLE) for case in _row_cases(row, PATTERNS[index % len(PATTERNS)])]


def _row_cases(row: Row, pattern: patterns.AttentionPattern) -> Iterator[AotCase]:
    targets = tuple(target for target in TARGETS if target // 10 * 10 in row.arches)
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    plain = patterns.make("axial_row", text_len=TEXT_LEN, grid=GRID)
    for what, on, with_options in (("rotary, mask", targets, True), ("plain", targets[:1], False)):
        given = pattern if with_options else plain
        for kernel, args, kwargs in _launches(row, given, dtypes[row.itemsize], with_options):
            constants = {name: value for name, value in kwargs.items() if name not in LAUNCH_OPTIONS}
            options = {name: kwargs[name] for name in LAUNCH_OPTIONS if name in kwargs}
            name = f"D{row.head_dim} {dtypes[row.itemsize]} sm_{row.arches[0]} {given.name}, {what}"
            if kernel.__name__ == "_sum_parts":
                name += f", BLOCK_N {constants['BLOCK_N']}"
            has_products = "FIRST" in constants or "SPLIT" in constants
            yield AotCase(name, kernel, args, constants, options, has_products and row.itemsize == 2, on)


def _launches(row: Row, pattern: patterns.AttentionPattern, dtype: torch.dtype, with_options: bool) -> list[tuple]:
    """(kernel, args, kwargs) of a forward and a backward call on packed queries, keys and values."""
    q, k, v = torch.zeros(1, N, 3, 2, row.head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    mask = torch.ones(1, N if pattern.masks_every_query else TEXT_LEN, dtype=torch.bool)
    options = {
        "pattern": pattern,
        "key_mask": mask if with_options else None,
        "scale": row.head_dim**-0.5,
        "rotary": torch.zeros(N, 6 * (row.head_dim // 6)) if with_options else None,
        "launch": row.launch,
    }
    with recorded_launches() as launches:
        out, lse = launch_forward(q, k, v, **options)
        launch_backward(out, q, k, v, out, lse, **options)
    return launches
