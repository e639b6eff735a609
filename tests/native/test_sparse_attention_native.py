"""What is the C++ implementation's own: its tile lists, and every instruction set against the oracle."""

import pytest
import torch
from attention_cases import PATTERNS, make_angles, make_qkv
from tolerance import check_against_oracle

from dalle_fast import patterns
from dalle_fast.functional import sparse_attention
from dalle_fast.native.sparse_attention import GROUP, TILE, _tile_lists

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGER = [
    patterns.make(name, text_len=75, grid=(11, 26), **options)
    for name, options in [
        *(("full", {}), ("axial_row", {}), ("axial_col", {}), ("conv_like", {"dilation": 2}), ("bidirectional", {})),
        *(("paper_conv", {"wrap": "torus"}), ("block_sparse", {"block": 8})),
    ]
]


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), *LARGER], ids=lambda pattern: pattern.spec[:60])
def test_tile_lists_hold_every_pair_of_the_pattern_once(pattern):
    lists = _tile_lists(pattern)
    met = torch.zeros(pattern.length, pattern.length, dtype=torch.int)
    for tile, queries in enumerate(lists.queries):
        for key, count, first_group, groups, mask in lists.runs[lists.run_start[tile] : lists.run_start[tile + 1]]:
            assert first_group >= 0
            assert 0 < groups <= TILE // GROUP - first_group
            keys = lists.keys[key : key + count].long()
            for lane in range(int(first_group) * GROUP, int(first_group + groups) * GROUP):
                if queries[lane] >= 0:
                    seen = torch.ones_like(keys) if mask < 0 else lists.masks[mask : mask + count] >> lane & 1
                    met[queries[lane], keys] += seen.int()
    assert torch.equal(met, pattern.dense().int())


@pytest.mark.parametrize("name", ["axial_row", "axial_col", "conv_like"])
def test_little_is_computed_that_the_pattern_does_not_ask_for(name):
    pattern = patterns.make(name, text_len=257, grid=(32, 32))
    runs = _tile_lists(pattern).runs
    computed = int((runs[:, 1] * runs[:, 3]).sum()) * GROUP
    # a tile whose lanes see different windows, and text's diagonal, cost what conv_like shows here: a quarter
    assert computed < 1.25 * int(pattern.dense().sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("pattern", LARGER, ids=lambda pattern: pattern.name)
def test_every_instruction_set_is_within_the_oracles_budget(pattern, dtype, isa):
    n = pattern.layout.max_inputs
    mask = torch.rand(2, n if pattern.masks_every_query else 75, generator=torch.Generator().manual_seed(0)) > 0.3

    def run(impl):
        options = {"pattern": pattern, "key_mask": mask, "rotary": make_angles(n, 18), "impl": impl}
        return lambda q, k, v: sparse_attention(q, k, v, **options)

    check_against_oracle(run("cpu"), run("reference"), make_qkv(2, 4, n, 24), dtype)


@pytest.mark.parametrize("width", [1, 3, 17, 130])
def test_every_instruction_set_takes_head_widths_off_its_vectors(width, isa):
    def run(impl):
        return lambda q, k, v: sparse_attention(q, k, v, pattern=LARGER[1], impl=impl)

    for dtype in DTYPES:
        check_against_oracle(run("cpu"), run("reference"), make_qkv(3, 4, 100, width), dtype, backward=False)


def test_scores_thousands_apart_give_the_value_of_the_largest(isa):
    pattern = LARGER[0]
    q, k, v = make_qkv(1, 1, pattern.length, 16)
    q[..., 0], k[..., 0] = 100.0, -100.0
    winners = torch.tensor([0, 10, 60, 75, 130, 300])  # in many blocks of keys
    k[:, :, winners, 0] = 100.0 + torch.arange(6.0)

    out = sparse_attention(q, k, v, pattern=pattern, scale=1.0, impl="cpu")
    last = (winners[None, :] <= torch.arange(pattern.length)[:, None]).sum(1) - 1
    assert torch.equal(torch.cdist(out[0, 0], v[0, 0]).argmin(-1), winners[last])
