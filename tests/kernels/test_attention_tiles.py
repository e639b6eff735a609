"""The tables that kernels walk: every allowed pair once, whole blocks allowed whole, nothing else, bounded items."""

import pytest
import torch
from dalle_fast.kernels.attention_tiles import key_tiles, query_tiles

from dalle_fast import patterns

CPU = torch.device("cpu")
CASES = [
    (patterns.make(name, text_len=text_len, grid=grid, **options), behind)
    for text_len, grid in [(17, (6, 5)), (19, (4, 9)), (1, (8, 8)), (33, (1, 1))]
    for name, options in [
        ("full", {}),
        ("axial_row", {}),
        ("axial_col", {}),
        ("conv_like", {"kernel": 3, "dilation": 2}),
        ("paper_conv", {"wrap": "torus", "kernel": 3}),
        ("block_sparse", {"block": 4}),
        ("bidirectional", {}),
    ]
    for behind in (0, 1, 20)  # positions of the layout that the call leaves out
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].spec} less {case[1]}")


def mark(seen, dense, queries, keys, whole):
    """Counts the pairs of one block; padding counts for none."""
    queries, keys = queries[queries >= 0].long(), keys[keys >= 0].long()
    legal = dense[queries][:, keys]
    assert legal.all() or not whole, "a block walked without the predicate must be allowed whole"
    assert len(set(keys.tolist())) == len(keys) and len(set(queries.tolist())) == len(queries)
    seen[queries[:, None], keys[None, :]] += legal.long()


@every_case
@pytest.mark.parametrize("block_m, block_n", [(16, 16), (32, 8)])
def test_query_tiles_meet_every_allowed_key_once(case, block_m, block_n):
    pattern, n = case[0], case[0].length - min(case[1], case[0].length - 1)
    tiles = query_tiles(pattern, n, block_m, block_n, True, CPU)
    dense = pattern.dense(n)
    seen = torch.zeros(n, n, dtype=torch.long)
    seen[:, : tiles.first] = 1
    for queries, (n_whole, row, n_rows) in zip(tiles.positions, tiles.walks.tolist(), strict=True):
        for block in range(n_whole):
            start = tiles.first + block * block_n
            mark(seen, dense, queries, torch.arange(start, start + block_n), True)
        for keys in tiles.gathered[row : row + n_rows]:
            mark(seen, dense, queries, keys, False)
    assert torch.equal(seen, dense.long())
    positions = tiles.positions[tiles.positions >= 0]
    assert torch.equal(positions.sort().values.long(), torch.arange(n)), "every query is in one tile"
    assert tiles.first == 0 or (pattern.layout.text_len % block_n == 1 and dense[:, 0].all())


@every_case
@pytest.mark.parametrize("block_m, block_n, longest", [(16, 16, 2), (8, 32, 1), (16, 16, 100)])
def test_items_of_key_tiles_meet_every_allowed_query_once(case, block_m, block_n, longest):
    pattern, n = case[0], case[0].length - min(case[1], case[0].length - 1)
    first = query_tiles(pattern, n, block_m, 16, True, CPU).first
    tiles = key_tiles(pattern, n, block_m, block_n, first, longest, CPU)
    dense = pattern.dense(n)
    seen = torch.zeros(n, n, dtype=torch.long)
    seen[:, :first] = dense[:, :first]
    slots = {}
    for tile, start, n_whole, row, n_rows, slot in tiles.items.tolist():
        keys = tiles.positions[tile]
        assert n_whole + n_rows <= longest
        slots.setdefault(tile, []).append(slot)
        for block in range(n_whole):
            mark(seen, dense, torch.arange(start, start + block_m) + block * block_m, keys, True)
        for queries in tiles.gathered[row : row + n_rows]:
            mark(seen, dense, queries, keys, False)
    assert torch.equal(seen, dense.long())
    for tile, first_slot, n_slots in tiles.splits.tolist():
        assert sorted(slots.pop(tile)) == list(range(first_slot, first_slot + n_slots))
    assert all(slot == [-1] for slot in slots.values()), "a tile that is not split is one item"
    assert sorted(tiles.positions[tiles.positions >= 0].tolist()) == list(range(first, n))


def test_sparse_patterns_walk_few_blocks():
    """At the standard size, blocks hold few pairs more than the pattern allows, and far fewer than a causal mask."""
    n = 1280
    for name in ("axial_row", "axial_col"):
        pattern = patterns.make(name, text_len=257, grid=(32, 32))
        tiles = query_tiles(pattern, n, 128, 64, True, CPU)
        assert tiles.first == 1 and len(tiles.positions) == 10, "no tile for the last text query alone"
        blocks = int(tiles.walks[:, 0].sum() + tiles.walks[:, 2].sum())
        assert blocks * 128 * 64 < 0.3 * n * n
        assert int(tiles.walks[:, 0].sum()) == 8 * 4 + 2, "all text of 256 keys is whole blocks"
