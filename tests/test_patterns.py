"""Every pattern against a double loop written from its definition, and what decoding derives from the predicate."""

import math

import pytest
import torch

from dalle_fast import patterns
from dalle_fast.layout import TokenLayout
from dalle_fast.models.cache import KVCache, ring_slots, slots_of_positions

LAYOUTS = [(3, (4, 4)), (4, (3, 5)), (1, (5, 3)), (6, (1, 7)), (6, (7, 1)), (2, (1, 1)), (1, (1, 1))]
CASES = [
    ("full", {}),
    ("axial_row", {}),
    ("axial_col", {}),
    ("conv_like", {}),
    ("conv_like", {"kernel": 3}),
    ("conv_like", {"kernel": 3, "dilation": 2}),
    ("conv_like", {"kernel": 1}),
    ("conv_like", {"kernel": 21}),
    ("paper_row", {}),
    ("paper_col", {}),
    ("paper_conv", {}),
    ("paper_conv", {"kernel": 3}),
    ("paper_conv", {"kernel": 3, "wrap": "none"}),
    ("paper_conv", {"kernel": 3, "wrap": "torus"}),
    ("paper_conv", {"wrap": "torus"}),
    ("block_sparse", {"block": 4}),
    ("block_sparse", {"block": 2, "num_random_blocks": 1, "seed": 3}),
    ("bidirectional", {}),
]


def sees(name, options, cols, rows, q, k):
    """Whether image token q sees image token k <= q: the definitions of the paper and the original, cell by cell."""
    (qr, qc), (kr, kc), back = divmod(q, cols), divmod(k, cols), q - k
    if name == "full":
        return True
    if name == "axial_row":
        return qr == kr
    if name in ("axial_col", "paper_col"):
        return qc == kc
    if name == "conv_like":
        steps = [i * options.get("dilation", 1) for i in range(options.get("kernel", 5))]
        return any(qr - a == kr and qc - b == kc for a in steps for b in steps)
    if name == "paper_row":
        return back <= cols
    half = options.get("kernel", 11) // 2
    offsets = range(-half, half + 1)
    wrap = options.get("wrap", "raster")
    if wrap == "raster":
        return any(back == a * cols + b for a in range(half + 1) for b in offsets)
    if wrap == "none":
        return any(qr + a == kr and qc + b == kc for a in offsets for b in offsets)
    return any((qr + a) % rows == kr and (qc + b) % cols == kc for a in offsets for b in offsets)


def by_double_loop(pattern, name, options):
    text_len, (rows, cols) = pattern.layout.text_len, pattern.layout.grid
    n = pattern.layout.length
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            if name == "bidirectional":
                mask[q, k] = True
            elif k > q:
                continue
            elif k < text_len:
                mask[q, k] = True
            elif q >= text_len:
                mask[q, k] = sees(name, options, cols, rows, q - text_len, k - text_len)
    return mask


def made(name, options, text_len, grid):
    if name == "block_sparse":  # as many random blocks as there are, in the smallest layouts
        n_blocks = math.ceil((text_len + grid[0] * grid[1] - 1) / options["block"])
        options = {**options, "num_random_blocks": min(options.get("num_random_blocks", 1), n_blocks)}
    return patterns.make(name, text_len=text_len, grid=grid, **options)


@pytest.mark.parametrize(("text_len", "grid"), LAYOUTS)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "block_sparse"])
def test_dense_mask_equals_the_double_loop(name, options, text_len, grid):
    pattern = made(name, options, text_len, grid)
    assert torch.equal(pattern.dense(), by_double_loop(pattern, name, options))


@pytest.mark.parametrize(("text_len", "grid"), LAYOUTS)
def test_block_sparse_follows_an_explicit_layout(text_len, grid):
    block, inputs = 2, text_len + grid[0] * grid[1] - 1
    n_blocks = math.ceil(inputs / block)
    blocks = [[i == j or (i * 7 + j * 3) % 4 == 0 for j in range(n_blocks)] for i in range(n_blocks)]
    pattern = patterns.make("block_sparse", text_len=text_len, grid=grid, block=block, layout=blocks)
    for q in range(inputs):
        for k in range(inputs):
            assert bool(pattern.dense()[q, k]) == (k <= q and blocks[q // block][k // block]), (q, k)


def test_block_sparse_default_holds_text_windows_and_random_blocks():
    """text_seq_len 32 is 4 global blocks of 8; windows of 4 blocks; key T-1 = 32, in block 4, is not global."""

    def blocks(**options):
        dense = patterns.make("block_sparse", text_len=33, grid=(8, 8), block=8, **options).dense()
        return [[bool(dense[i * 8 + 7, j * 8]) for j in range(i + 1)] for i in range(12)]

    fixed = [[j < 4 or i // 4 == j // 4 for j in range(i + 1)] for i in range(12)]
    assert blocks(num_random_blocks=0) == fixed
    random = blocks(num_random_blocks=3, seed=5)
    for row, wanted in zip(random, fixed, strict=True):
        assert all(there or not here for there, here in zip(row, wanted, strict=True))
    assert sum(map(sum, random)) > sum(map(sum, fixed))
    assert random == blocks(num_random_blocks=3, seed=5) != blocks(num_random_blocks=3, seed=6)


def test_conv_like_does_not_wrap_where_raster_distance_would():
    pattern = patterns.make("conv_like", text_len=1, grid=(3, 4), kernel=3)
    last_of_first_row, first_of_second = 1 + 3, 1 + 4
    assert not bool(pattern.allowed(torch.tensor(first_of_second), torch.tensor(last_of_first_row)))


def test_paper_variants_for_one_query():
    """The 4 x 4 grid and query 5 of the mask comparison in the project's notes on the paper."""

    def keys(name, **options):
        pattern = patterns.make(name, text_len=1, grid=(4, 4), **options)
        return (pattern.image_window(1 + 5) - 1).tolist()

    assert keys("paper_row") == [1, 2, 3, 4, 5]
    assert keys("axial_row") == [4, 5]
    assert keys("axial_col") == [1, 5]
    assert keys("conv_like", kernel=3) == [0, 1, 4, 5]
    assert keys("paper_conv", kernel=3, wrap="none") == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(("text_len", "grid"), LAYOUTS)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "bidirectional"])
@pytest.mark.parametrize("slack", [0, 3])
def test_a_ring_still_holds_every_key_a_window_asks_for(name, options, text_len, grid, slack):
    """Plays decoding with positions in the slots: what is read must be `pattern.window`, at every position."""
    pattern = made(name, options, text_len, grid)
    size = text_len + ring_slots(pattern, slack)
    cache = KVCache(pattern, slack, torch.zeros(1, 1, 1, 1))
    assert cache.k.shape[2] == size
    for position in range(pattern.layout.length):
        cache.write(torch.full((2, 1, 1, 1, 1), float(position)), position)
        for back in range(min(slack, position) + 1):  # a rollback of up to `slack` may come back here
            read = sorted(int(p) for k, _ in cache.window(position - back) for p in k.flatten())
            assert read == pattern.window(position - back).tolist()


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [("axial_row", {}, 7), ("paper_row", {}, 8), ("conv_like", {}, 4 * 8 + 1), ("full", {}, 63), ("axial_col", {}, 63)],
)
def test_ring_sizes_are_those_of_the_formulas(name, options, slots):
    pattern = patterns.make(name, text_len=5, grid=(9, 7), **options)
    assert ring_slots(pattern, 0) == slots
    assert ring_slots(pattern, 2) == min(slots + 2, 63)


def test_slots_of_a_column_are_contiguous():
    pattern = patterns.make("axial_col", text_len=2, grid=(3, 4))
    slot_of = slots_of_positions(pattern, 0)
    assert [slot_of[2 + row * 4 + 1] for row in range(3)] == [2 + 3, 2 + 4, 2 + 5]


def test_dense_of_fewer_positions_is_the_corner():
    pattern = patterns.make("conv_like", text_len=3, grid=(3, 4))
    assert torch.equal(pattern.dense(7), pattern.dense()[:7, :7])
    assert pattern.dense(0).shape == (0, 0)
    with pytest.raises(ValueError, match=r"must be in 0\.\.15"):
        pattern.dense(16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rows", {}, "name must be one of"),
        ("full", {"kernel": 3}, "takes no options"),
        ("conv_like", {"wrap": "none"}, "takes kernel, dilation"),
        ("conv_like", {"kernel": 4}, "odd"),
        ("conv_like", {"kernel": -1}, "odd"),
        ("conv_like", {"dilation": 0}, "at least 1"),
        ("paper_conv", {"wrap": "v2"}, "raster, none, torus"),
        ("block_sparse", {"block": 0}, "block must be"),
        ("block_sparse", {"block": 8, "layout": [[True]]}, r"\[1, 1\]"),
        ("block_sparse", {"block": 8, "layout": [[False, True], [True, True]]}, "diagonal"),
        ("block_sparse", {"block": 4, "num_random_blocks": 9}, "num_random_blocks"),
    ],
)
def test_impossible_patterns_are_refused_in_words(name, options, message):
    with pytest.raises(ValueError, match=message):
        patterns.make(name, text_len=5, grid=(3, 4), **options)


def test_a_pattern_without_a_decode_window_says_so():
    with pytest.raises(ValueError, match="no decode window"):
        patterns.make("bidirectional", text_len=5, grid=(3, 4)).max_image_distance()
    with pytest.raises(ValueError, match="position must be"):
        patterns.make("full", text_len=5, grid=(3, 4)).window(17)


def test_patterns_are_values():
    one, other = (patterns.make("conv_like", text_len=5, grid=(3, 4), kernel=k) for k in (3, 5))
    assert one == patterns.make("conv_like", text_len=5, grid=(3, 4), kernel=3, dilation=1)
    assert one != other
    assert len({one, other, one}) == 2
    assert one.layout == TokenLayout(5, (3, 4))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("text_len", "grid"), LAYOUTS)
def test_a_spec_reads_back_as_its_pattern(name, options, text_len, grid):
    pattern = patterns.make(name, text_len=text_len, grid=grid, **options)
    again = patterns.from_spec(pattern.spec)
    assert again == pattern and hash(again) == hash(pattern)
    assert again.spec == pattern.spec and patterns.from_spec(pattern.spec) is again
    assert torch.equal(again.dense(), pattern.dense())


def test_a_spec_can_be_read_and_tells_every_option():
    conv = patterns.make("conv_like", text_len=257, grid=(32, 16), dilation=2)
    assert conv.spec == "conv_like text_len=257 grid=32x16 dilation=2 kernel=5"
    layout = torch.eye(3, dtype=torch.bool)
    layout[2, 0] = True  # cells 100 010 101
    block = patterns.make("block_sparse", text_len=4, grid=(3, 3), block=4, layout=layout)
    assert block.spec == "block_sparse text_len=4 grid=3x3 block=4 layout=0x115"
    layout[2, 1] = True
    assert patterns.make("block_sparse", text_len=4, grid=(3, 3), block=4, layout=layout).spec != block.spec


@pytest.mark.parametrize("spec", ["", "full", "full text_len=3", "full text_len=3 grid=2x2 causal"])
def test_refuses_what_is_no_spec(spec):
    with pytest.raises(ValueError, match=r"patterns.from_spec: spec must be the spec of an AttentionPattern, got '"):
        patterns.from_spec(spec)
