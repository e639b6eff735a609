"""sparse_attention with impl="triton" on a GPU, at real sizes: against the float64 oracle, opcheck, torch.compile."""

import pytest
import torch
from tolerance import check_against_oracle

from dalle_fast import patterns
from dalle_fast.functional import sparse_attention
from dalle_fast.models.rotary import rotary_angles

pytestmark = pytest.mark.gpu

TEXT_LEN, GRID = 257, (32, 32)
N = TEXT_LEN + GRID[0] * GRID[1] - 1
PATTERNS = [
    patterns.make(name, text_len=TEXT_LEN, grid=GRID, **options)
    for name, options in [
        ("full", {}),
        ("axial_row", {}),
        ("axial_col", {}),
        ("conv_like", {}),
        ("paper_conv", {"wrap": "torus"}),
        ("block_sparse", {}),
        ("bidirectional", {}),
    ]
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.spec)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def make_qkv(batch, heads, n, head_dim, dtype=torch.float32, seed=0):
    """q, k, v [B, H, N, D] of unit variance on the GPU: views of one packed tensor, as a projection leaves them."""
    packed = torch.randn(batch, n, 3 * heads * head_dim, generator=torch.Generator().manual_seed(seed))
    return packed.to("cuda", dtype).unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind()


def make_mask(pattern, batch, n):
    """The first sample hides its first keys: where the mask holds for every query, some queries see none."""
    width = n if pattern.masks_every_query else pattern.layout.text_len
    mask = torch.rand(batch, width, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :3] = False
    return mask.cuda()


def check(qkv, dtype, **options):
    """impl="triton" against the oracle. TF32 is off by default in torch, so the oracle's float32 is float32."""

    def run(impl):
        return lambda q, k, v: sparse_attention(q, k, v, impl=impl, **options)

    check_against_oracle(run("triton"), run("reference"), qkv, dtype)


# A pattern or dtype is a kernel to compile, which takes seconds: the interpreter has them in all combinations.


@every_pattern
def test_every_pattern_with_rotary_and_key_mask_at_real_size(pattern):
    angles = rotary_angles(pattern.layout, 64)[:N].cuda()
    check(make_qkv(2, 2, N, 64), torch.bfloat16, pattern=pattern, rotary=angles, key_mask=make_mask(pattern, 2, N))


@every_dtype
def test_every_dtype_at_real_size(dtype):
    check(make_qkv(1, 8, N, 64), dtype, pattern=PATTERNS[1])


@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_other_head_widths(head_dim):
    pattern = patterns.make("axial_row", text_len=129, grid=(24, 20))
    check(make_qkv(2, 4, pattern.length, head_dim), torch.bfloat16, pattern=pattern)


@pytest.mark.parametrize("n", [1, 100, 257, 300, 1279, 1281])
def test_any_length(n):
    check(make_qkv(2, 8, n, 64), torch.bfloat16, pattern=PATTERNS[1])


def test_two_runs_give_the_same_bits_and_a_sample_alone_the_same_output():
    qkv = make_qkv(2, 4, N, 64, torch.bfloat16)
    dout = make_qkv(2, 4, N, 64, torch.bfloat16, seed=1)[0]

    def run(tensors, dout):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = sparse_attention(*leaves, pattern=PATTERNS[1], impl="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    once, again = run(qkv, dout), run(qkv, dout)
    alone = run([t[1:] for t in qkv], dout[1:])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(once[0][1:], alone[0])


def test_opcheck():
    pattern = PATTERNS[1]
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 2, 300, 64))
    torch.library.opcheck(
        torch.ops.dalle_fast.sparse_attention.default, (q, k, v, None, None, pattern.spec, 0.125, "triton")
    )


def test_compiles_without_a_break_and_gives_what_eager_gives():
    pattern = PATTERNS[1]
    q, k, v = make_qkv(1, 2, N, 64, torch.bfloat16)

    def layer(q, k, v):
        return sparse_attention(q * 2, k, v, pattern=pattern, impl="triton").transpose(1, 2).flatten(2)

    assert torch.equal(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v))


def test_auto_takes_the_kernels():
    q, k, v = make_qkv(1, 2, 300, 64)
    pattern = PATTERNS[1]
    assert torch.equal(
        sparse_attention(q, k, v, pattern=pattern), sparse_attention(q, k, v, pattern=pattern, impl="triton")
    )
    with pytest.raises(NotImplementedError, match="head width"):
        sparse_attention(*make_qkv(1, 2, 300, 48), pattern=pattern, impl="triton")


def test_no_memory_but_the_results():
    """Nothing of size N x N, and no copy of packed queries, keys and values."""
    pattern = PATTERNS[1]
    q, k, v = make_qkv(4, 8, N, 64, torch.bfloat16)
    sparse_attention(q, k, v, pattern=pattern, impl="triton")  # tile lists are built and kept
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sparse_attention(q, k, v, pattern=pattern, impl="triton")
    statistics = 4 * 8 * N * 4
    assert (
        torch.cuda.max_memory_allocated() - before <= out.nbytes + statistics + 2**20
    )  # whole blocks of the allocator
