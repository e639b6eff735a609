"""Triton kernels of sparse attention in the interpreter, which checks bounds and races, against the float64 oracle."""

import itertools
import math

import pytest
import torch
from attention_cases import PATTERNS, make_angles

from dalle_fast import patterns

pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")

import triton
import triton.language as tl
from dalle_fast.kernels.attention_blocks import allowed
from dalle_fast.kernels.sparse_attention_arguments import pattern_arguments
from dalle_fast.kernels.sparse_attention_sizes import TABLE, Launch, pick_sparse_attention
from sparse_attention_harness import SMALL, attention, check

# 17 = 16 + 1: `<bos>` is taken apart. 19 is no such number, and its grid is larger than a tile. Both have R != C.
LAYOUTS = {"T17": (17, (3, 5)), "T19": (19, (5, 4))}
NAMES = {
    "full": ("full", {}),
    "axial_row": ("axial_row", {}),
    "axial_col": ("axial_col", {}),
    "conv_like": ("conv_like", {"kernel": 3}),
    "conv_like_dilated": ("conv_like", {"kernel": 3, "dilation": 2}),
    "paper_row": ("paper_row", {}),
    "paper_col": ("paper_col", {}),
    "paper_conv_raster": ("paper_conv", {"kernel": 3}),
    "paper_conv_clipped": ("paper_conv", {"kernel": 3, "wrap": "none"}),
    "paper_conv_torus": ("paper_conv", {"kernel": 3, "wrap": "torus"}),
    "block_sparse": ("block_sparse", {"block": 4, "num_random_blocks": 1}),
    "bidirectional": ("bidirectional", {}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = {
    "name": list(NAMES),
    "layout": list(LAYOUTS),
    "dtype": list(DTYPES),
    "head_dim": [16, 32, 64, 128],
    "rotary": ["none", "part", "all"],
    "masked": [False, True],
    "length": ["whole", "training", "partial", "text"],
    "scale": [0.25, 0.0, -0.125],
}


def pairwise(choices):
    """Few combinations in which every two values of two different choices meet, greedily, always the same ones."""
    names = list(choices)
    left = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]
    }  # fmt: skip
    while left:
        case = dict(min(left, key=str))
        for name in names:
            if name not in case:
                pairs = {value: sum(_pair(names, name, value, other) in left for other in case.items())
                         for value in choices[name]}  # fmt: skip
                case[name] = max(pairs, key=pairs.get)
        left -= {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}
        yield case


def _pair(names, name, value, other):
    return tuple(sorted([(name, value), other], key=lambda item: names.index(item[0])))


CASES = list(pairwise(CHOICES))


def make_qkv(n, head_dim, *, seed=0, batch=2, heads=1):
    """q, k, v [B, H, N, D] of unit variance: views of one packed tensor, as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, n, 3 * heads * head_dim, generator=generator)
    return packed.unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind()


def make_mask(pattern, n, batch=2):
    """Of the width that the kernels take; the first sample's first three keys are hidden, so some queries see none."""
    width = min(n, pattern.length if pattern.masks_every_query else pattern.layout.text_len)
    mask = torch.rand(batch, width, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :3] = False
    return mask


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What kernels leave unwritten is NaN."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))


def _filled_with_nan(allocate):
    def filled(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    return filled


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_forward_and_gradients_are_within_the_budget(case):
    name, options = NAMES[case["name"]]
    text_len, grid = LAYOUTS[case["layout"]]
    pattern = patterns.make(name, text_len=text_len, grid=grid, **options)
    whole = pattern.length
    n = {"whole": whole, "training": whole - 1, "partial": text_len + 7, "text": text_len - 2}[case["length"]]
    rot = {"none": 0, "part": 6 * (case["head_dim"] // 6), "all": case["head_dim"]}[case["rotary"]]
    check(
        make_qkv(n, case["head_dim"]),
        DTYPES[case["dtype"]],
        pattern,
        launch=SMALL,
        key_mask=make_mask(pattern, n) if case["masked"] else None,
        scale=case["scale"],
        rotary=make_angles(n, rot) if rot else None,
    )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"sm{row.arches[0]}-D{row.head_dim}-{8 * row.itemsize}bit")
def test_every_launch_row(row):
    """At a size with several blocks of each kind, and a text tile that is cut into items."""
    if row.itemsize == 4:
        dtype, pattern, samples = torch.float32, patterns.make("axial_col", text_len=33, grid=(5, 6)), 2
    else:
        dtype, pattern, samples = torch.bfloat16, patterns.make("axial_col", text_len=65, grid=(9, 11)), 1
    n = pattern.length - 1
    launch = pick_sparse_attention((samples, samples, n, row.head_dim), dtype, row.arches[0])
    assert launch == row.launch
    cut = launch._replace(longest=2)
    check(make_qkv(n, row.head_dim, batch=samples, heads=samples), dtype, pattern, launch=cut)


def test_the_table_has_a_row_for_every_architecture_head_width_and_dtype():
    for arch in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
        for head_dim in (16, 32, 64, 128):
            for dtype in DTYPES.values():
                assert isinstance(pick_sparse_attention((1, 8, 1280, head_dim), dtype, arch), Launch)
    with pytest.raises(NotImplementedError, match="head width 48"):
        pick_sparse_attention((1, 8, 1280, 48), torch.float32, 90)


# -- the predicate's twin


@triton.jit
def _predicate(out_ptr, geometry, blocks_ptr, n, PATTERN: tl.constexpr, BLOCK: tl.constexpr):
    """Cell (i, j) of out int8 [n + 1, n + 1] is about query i - 1 and key j - 1; -1 is padding."""
    offs = tl.arange(0, BLOCK)
    result = allowed(offs[:, None] - 1, offs[None, :] - 1, geometry, blocks_ptr, PATTERN)
    inside = (offs <= n)[:, None] & (offs <= n)[None, :]
    tl.store(out_ptr + offs[:, None] * (n + 1) + offs[None, :], result.to(tl.int8), mask=inside)


ODD_GRIDS = [
    patterns.make(name, text_len=text_len, grid=grid, **options)
    for text_len, grid in [(1, (1, 1)), (3, (1, 9)), (2, (9, 1)), (5, (7, 4)), (4, (3, 11))]
    for name, options in [
        *NAMES.values(),
        ("conv_like", {"kernel": 9, "dilation": 3}),
        *(
            ("paper_conv", {"kernel": kernel, "wrap": wrap})
            for kernel in (5, 11, 31)
            for wrap in patterns.PAPER_CONV_WRAPS
        ),
    ]
    if not (name == "block_sparse" and text_len == 1)
]


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), *ODD_GRIDS], ids=lambda p: p.spec)
def test_predicate_is_that_of_the_pattern_cell_by_cell(pattern):
    name, geometry, blocks = pattern_arguments(pattern, torch.device("cpu"))
    n = pattern.length
    out = torch.full((n + 1, n + 1), 2, dtype=torch.int8)
    _predicate[(1,)](out, geometry, blocks, n, PATTERN=name, BLOCK=triton.next_power_of_2(n + 1))
    assert torch.equal(out[1:, 1:], pattern.dense().to(torch.int8))
    assert not out[0].any() and not out[:, 0].any(), "padding meets nobody"


# -- what a kernel must not do


def _run(qkv, dout, pattern, **options):
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = attention(pattern, **options)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_twice_the_same_bits_alone_or_in_a_batch_and_inputs_untouched(dtype):
    pattern = patterns.make("conv_like", text_len=17, grid=(3, 5), kernel=3)
    qkv = [t.to(dtype) for t in make_qkv(pattern.length, 16, batch=3)]
    dout = make_qkv(pattern.length, 16, seed=1, batch=3)[0].to(dtype)
    mask, angles = make_mask(pattern, pattern.length, batch=3), make_angles(pattern.length, 12)
    given = [*qkv, dout, mask, angles]
    before = [t.clone() for t in given]
    once, again = (_run(qkv, dout, pattern, key_mask=mask, rotary=angles) for _ in range(2))
    alone = _run([t[1:2] for t in qkv], dout[1:2], pattern, key_mask=mask[1:2], rotary=angles)
    for a, b, c in zip(once, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_nan_in_one_sample_stays_there():
    pattern = patterns.make("axial_row", text_len=17, grid=(3, 5))
    qkv = make_qkv(pattern.length, 16)
    dout = make_qkv(pattern.length, 16, seed=1)[0]
    clean = _run(qkv, dout, pattern)
    for t in qkv:
        t[0, :, 3:] = math.nan
    for a, b in zip(clean, _run(qkv, dout, pattern), strict=True):
        assert torch.equal(a[1], b[1]) and b[0].isnan().any()


def test_results_lie_as_the_next_projection_reads_them():
    pattern = patterns.make("axial_row", text_len=17, grid=(3, 5))
    qkv = make_qkv(pattern.length, 16)
    for t in _run(qkv, qkv[0], pattern):
        assert t.transpose(1, 2).is_contiguous()
