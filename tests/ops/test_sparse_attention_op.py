"""The contract of sparse_attention: what it takes, what it refuses and in which words."""

import pytest
import torch
from attention_cases import LENGTH, PATTERNS, TEXT_LEN, make_angles, make_qkv
from tolerance import assert_within_budget, check_against_oracle

from dalle_fast import patterns
from dalle_fast.functional import sparse_attention

ROW = PATTERNS["axial_row"]


def _packed(batch, heads, n, width):
    """q, k, v as views into one [B, N, 3 H D] tensor, the way a projection leaves them."""
    packed = torch.randn(batch, n, 3 * heads * width, generator=torch.Generator().manual_seed(3))
    return packed.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("heads_and_batch", [(1, 1), (1, 3), (3, 1)])
def test_gradients_through_packed_views(heads_and_batch):
    """UPSTREAM B12: one head or a batch of one, without rotary, raised on a view."""
    heads, batch = heads_and_batch
    views = [t.requires_grad_() for t in _packed(batch, heads, LENGTH, 6).detach().unbind()]
    check_against_oracle(
        lambda q, k, v: sparse_attention(q, k, v, pattern=ROW),
        lambda q, k, v: sparse_attention(q, k, v, pattern=ROW, impl="reference"),
        views,
        torch.float32,
    )


@pytest.mark.parametrize("shape", [(0, 2, LENGTH, 4), (2, 2, 0, 4), (2, 2, 1, 1)])
def test_empty_and_single_sizes(shape):
    q, k, v = (t.requires_grad_() for t in make_qkv(*shape))
    out = sparse_attention(q, k, v, pattern=ROW)
    assert out.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape and k.grad.shape == shape
    if shape[2] == 1:
        assert_within_budget(out.detach(), v.detach().double(), v.detach(), "one key: its value")


def test_a_single_position_layout():
    pattern = patterns.make("conv_like", text_len=1, grid=(1, 1))
    q, k, v = make_qkv(1, 1, 2, 4)
    out = sparse_attention(q, k, v, pattern=pattern)
    assert_within_budget(out[0, 0, 0], v[0, 0, 0].double(), v[0, 0, 0])


def test_scale_zero_is_a_value_and_none_is_the_width():
    q, k, v = make_qkv(1, 1, LENGTH, 16)
    flat = sparse_attention(q, k, v, pattern=PATTERNS["full"], scale=0.0)
    zero_queries = sparse_attention(torch.zeros_like(q), k, v, pattern=PATTERNS["full"])
    assert torch.equal(flat, zero_queries)
    assert torch.equal(
        sparse_attention(q, k, v, pattern=PATTERNS["full"]),
        sparse_attention(q, k, v, pattern=PATTERNS["full"], scale=0.25),
    )


def test_rotary_of_no_channels_and_longer_than_the_sequence():
    q, k, v = make_qkv(1, 2, 7, 4)
    none = sparse_attention(q, k, v, pattern=ROW, rotary=make_angles(7, 4)[:, :0])
    assert torch.equal(none, sparse_attention(q, k, v, pattern=ROW))
    longer = sparse_attention(q, k, v, pattern=ROW, rotary=make_angles(LENGTH, 4))
    assert torch.equal(longer, sparse_attention(q, k, v, pattern=ROW, rotary=make_angles(LENGTH, 4)[:7]))


def _refused(error, message, **changes):
    q, k, v = make_qkv(2, 1, LENGTH, 4)
    arguments = {"q": q, "k": k, "v": v, "pattern": ROW, **changes}
    with pytest.raises(error) as raised:
        sparse_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert str(raised.value) == message


def test_refuses_mixed_and_integer_dtypes():
    q = torch.zeros(2, 1, LENGTH, 4)
    advice = "Convert them with .to(dtype)."
    expected = f"sparse_attention: q, k, v must have one floating dtype, got float32, float64, float32. {advice}"
    _refused(TypeError, expected, k=q.double())
    expected = f"sparse_attention: q, k, v must have one floating dtype, got int64, int64, int64. {advice}"
    _refused(TypeError, expected, q=q.long(), k=q.long(), v=q.long())


def test_refuses_mixed_devices():
    meta = torch.zeros(2, 1, LENGTH, 4, device="meta")
    expected = "sparse_attention: q, k, v must be on one device, got cpu, meta, cpu. Move them with .to(device)."
    _refused(ValueError, expected, k=meta)
    # a device that autocast does not know
    _refused(ValueError, expected.replace("cpu, meta, cpu", "meta, cpu, cpu"), q=meta)
    expected = "sparse_attention: key_mask must be on the device of q, cpu, got meta. Move it with .to(device)."
    _refused(ValueError, expected, key_mask=torch.ones(2, TEXT_LEN, dtype=torch.bool, device="meta"))
    expected = "sparse_attention: rotary must be on the device of q, cpu, got meta. Move it with .to(device)."
    _refused(ValueError, expected, rotary=torch.zeros(LENGTH, 4, device="meta"))


def test_refuses_unequal_shapes():
    expected = (
        f"sparse_attention: q, k, v must be of one shape [B, H, N, D], got [2, 1, {LENGTH}, 4], [2, 1, 3, 4],"
        f" [2, 1, {LENGTH}, 4]. Did you split the heads?"
    )
    _refused(ValueError, expected, k=torch.zeros(2, 1, 3, 4))


@pytest.mark.parametrize("shape", [(2, 0, LENGTH, 4), (2, 2, LENGTH, 0)])
def test_refuses_no_heads_and_no_channels(shape):
    expected = (
        f"sparse_attention: q, k, v must have at least one head and one channel a head, got {list(shape)}."
        " Split the width C into H heads of D = C / H."
    )
    _refused(ValueError, expected, **dict.fromkeys("qkv", torch.zeros(shape)))


def test_refuses_a_sequence_beyond_the_layout():
    q = torch.zeros(2, 1, LENGTH + 1, 4)
    expected = (
        f"sparse_attention: N must be at most the length of the pattern's layout, {LENGTH}, got {LENGTH + 1}."
        " Make the pattern for the longer text or grid."
    )
    _refused(ValueError, expected, q=q, k=q, v=q)


def test_refuses_a_pattern_by_name():
    expected = "sparse_attention: pattern must be an AttentionPattern, got str. Make one with dalle_fast.patterns.make."
    _refused(TypeError, expected, pattern="axial_row")


@pytest.mark.parametrize(
    ("mask", "error", "got"),
    [
        (torch.ones(2, TEXT_LEN), TypeError, f"float32 [2, {TEXT_LEN}]"),
        (torch.ones(2, TEXT_LEN - 1, dtype=torch.bool), ValueError, f"bool [2, {TEXT_LEN - 1}]"),
        (torch.ones(3, TEXT_LEN, dtype=torch.bool), ValueError, f"bool [3, {TEXT_LEN}]"),
        (torch.ones(TEXT_LEN, dtype=torch.bool), ValueError, f"bool [{TEXT_LEN}]"),
    ],
)
def test_refuses_a_key_mask_of_another_kind(mask, error, got):
    expected = (
        f"sparse_attention: key_mask must be bool [B=2, T={TEXT_LEN}] for pattern 'axial_row', got {got}."
        " Did you leave out <bos>?"
    )
    _refused(error, expected, key_mask=mask)


def test_full_wants_a_key_mask_over_all_keys():
    mask = torch.ones(2, TEXT_LEN, dtype=torch.bool)
    expected = (
        f"sparse_attention: key_mask must be bool [B=2, N={LENGTH}] for pattern 'full', got bool [2, {TEXT_LEN}]."
        " Did you leave out <bos>?"
    )
    _refused(ValueError, expected, key_mask=mask, pattern=PATTERNS["full"])


@pytest.mark.parametrize("shape", [(LENGTH - 1, 4), (LENGTH, 3), (LENGTH, 6), (1, LENGTH, 4)])
def test_refuses_rotary_of_another_shape(shape):
    expected = (
        f"sparse_attention: rotary must be [>= N={LENGTH}, rot] with rot even and at most D=4, got {list(shape)}."
        " Build it for the layout of this model."
    )
    _refused(ValueError, expected, rotary=torch.zeros(shape))


def test_refuses_rounded_rotary_angles_and_learned_ones():
    expected = (
        "sparse_attention: rotary must hold raw angles in float32, got bfloat16. Angles reach thousands of radians:"
        " keep them float32 whatever the model's dtype."
    )
    _refused(TypeError, expected, rotary=torch.zeros(LENGTH, 4, dtype=torch.bfloat16))
    expected = "sparse_attention: rotary must be a constant, got a tensor that requires a gradient. Detach it."
    _refused(ValueError, expected, rotary=torch.zeros(LENGTH, 4, requires_grad=True))


def test_an_unknown_implementation_is_named():
    q, k, v = make_qkv(1, 1, LENGTH, 4)
    with pytest.raises(ValueError, match="impl must be 'auto' or one of reference, cpu, triton, cuda, got 'fast'"):
        sparse_attention(q, k, v, pattern=ROW, impl="fast")
