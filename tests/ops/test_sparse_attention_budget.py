"""Every kernel of sparse attention against the float64 oracle: patterns, sizes, dtypes, masks, rotary, strides."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import LENGTH, PATTERNS, TEXT_LEN, make_angles, make_key_mask, make_qkv
from tolerance import check_against_oracle

from dalle_fast import patterns
from dalle_fast.functional import sparse_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
every_pattern = pytest.mark.parametrize("label", PATTERNS)

# Longer than any tile, and no multiple of one: text and image end within tiles, rows and columns run across them.
LARGE = [
    patterns.make(name, text_len=75, grid=(11, 13), **options)
    for name, options in [
        ("full", {}),
        ("axial_row", {}),
        ("axial_col", {}),
        ("conv_like", {"dilation": 2}),
        ("paper_conv", {}),
        ("paper_conv", {"wrap": "torus", "kernel": 5}),
        ("block_sparse", {}),
        ("bidirectional", {}),
    ]
]


def check(kernel, pattern, dtype, *, n=None, batch=8, heads=4, width=16, channels=24, **options):
    """The output of one kernel at `dtype`, and the gradients of a layer on it, are within the oracle's budget.

    Gradients are those of the layer's input and of the weights it projects q, k and v with: each sums over many rows.
    In dq itself one row, whose delta = dout . out happened to round badly, decides a comparison of maxima.
    """
    n = pattern.length if n is None else n

    def attend(impl):
        return lambda q, k, v: sparse_attention(q, k, v, pattern=pattern, impl=impl, **options)

    def layer(impl):
        def run(x, weight):
            return attend(impl)(*F.linear(x, weight).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4))

        return run

    check_against_oracle(attend(kernel), attend("reference"), make_qkv(batch, heads, n, width), dtype, backward=False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, n, channels, generator=generator)
    weight = torch.randn(3 * heads * width, channels, generator=generator) * (2 / channels**0.5)
    check_against_oracle(layer(kernel), layer("reference"), (x, weight), dtype)


@every_pattern
@every_dtype
def test_every_pattern(label, dtype, kernel):
    check(kernel, PATTERNS[label], dtype)


@every_pattern
@every_dtype
def test_key_masks_with_queries_that_see_nothing_and_rotary(label, dtype, kernel):
    check(kernel, PATTERNS[label], dtype, key_mask=make_key_mask(label, 8), rotary=make_angles(LENGTH, 12))


@every_pattern
@pytest.mark.parametrize("n", [1, TEXT_LEN - 1, TEXT_LEN, TEXT_LEN + 6, LENGTH - 1])
def test_sequences_that_end_early(label, n, kernel):
    options = {"key_mask": make_key_mask(label, 32), "rotary": make_angles(n, 16)}
    check(kernel, PATTERNS[label], torch.float32, n=n, batch=32, heads=4, **options)


@pytest.mark.parametrize("width", [1, 6, 64, 80])
@every_dtype
def test_head_widths(width, dtype, kernel):
    for label in ("full", "axial_col", "conv_like_3"):
        rotary = make_angles(LENGTH, width // 6 * 6) if width > 1 else None
        check(kernel, PATTERNS[label], dtype, width=width, rotary=rotary)


@pytest.mark.parametrize("pattern", LARGE, ids=lambda pattern: pattern.spec[:60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_more_than_one_tile(pattern, dtype, kernel):
    check(kernel, pattern, dtype, n=pattern.layout.max_inputs, batch=2, width=32)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scales(scale, kernel):
    check(kernel, PATTERNS["paper_row"], torch.float32, width=6, scale=scale)


def _shared_memory(layout, width=16):
    """q, k, v of one sample and two heads whose memory lies as `layout` says, NaN around it."""
    made = make_qkv(1, 2, LENGTH, width)
    if layout == "packed":  # [B, N, 3, H, D], as a projection leaves it
        memory = torch.full((1, LENGTH + 1, 3, 2, width), torch.nan)
        views = memory[:, :LENGTH].permute(2, 0, 3, 1, 4).unbind()
    elif layout == "wide":  # rows longer than they are read
        memory = torch.full((3, 1, 2, LENGTH, width + 3), torch.nan)
        views = memory[..., :width].unbind()
    else:  # channels apart
        memory = torch.full((3, 1, 2, width, LENGTH + 1), torch.nan)
        views = memory[..., :LENGTH].transpose(-1, -2).unbind()
    for view, values in zip(views, made, strict=True):
        view.copy_(values)
    return made, views, memory


@pytest.mark.parametrize("layout", ["packed", "wide", "channels apart"])
@pytest.mark.parametrize("label", ["axial_row", "bidirectional"])
def test_any_strides_give_the_same_bits_and_inputs_stay(layout, label, kernel):
    made, views, memory = _shared_memory(layout)
    before = memory.clone()
    # of what is summed: no channel apart; of the broadcast sum, stride 0
    for dout in (torch.randn(1, 2, 16, LENGTH).transpose(-1, -2), torch.ones(()).expand(1, 2, LENGTH, 16)):
        results = []
        for tensors in (made, views):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = sparse_attention(*leaves, pattern=PATTERNS[label], rotary=make_angles(LENGTH, 6), impl=kernel)
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(memory.nan_to_num(7.5), before.nan_to_num(7.5)), "an input was written to"


def test_broadcast_inputs(kernel):
    q, k, v = make_qkv(2, 2, LENGTH, 16)
    one_key = k[:, :1].expand_as(k)
    got = sparse_attention(q, one_key, v, pattern=PATTERNS["axial_row"], impl=kernel)
    assert torch.equal(got, sparse_attention(q, one_key.contiguous(), v, pattern=PATTERNS["axial_row"], impl=kernel))


@every_dtype
@pytest.mark.parametrize("pattern", LARGE[:4], ids=lambda pattern: pattern.name)
def test_equal_bits_for_any_number_of_threads_and_in_a_second_run(pattern, dtype, kernel, restored_threads):
    leaves = [t.requires_grad_() for t in make_qkv(1, 3, pattern.layout.max_inputs, 16, dtype)]

    def run():
        out = sparse_attention(*leaves, pattern=pattern, impl=kernel)
        once, again = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)), "two backward passes differ"
        return out, *once

    torch.set_num_threads(1)
    expected = run()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True)), f"{threads} threads"


@every_pattern
def test_all_of_the_results_is_written(label, kernel, poisoned_memory):
    assert torch.empty(3).isnan().all()
    for n in (LENGTH, TEXT_LEN + 6, 1):
        leaves = [t.requires_grad_() for t in make_qkv(2, 2, n, 6)]
        out = sparse_attention(*leaves, pattern=PATTERNS[label], key_mask=make_key_mask(label, 2), impl=kernel)
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), leaves)))
