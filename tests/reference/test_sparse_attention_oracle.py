"""The oracle of sparse attention against a double loop, the original's outputs, and what attention means."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    FULL_KEY_MASK,
    GRID,
    LENGTH,
    PATTERNS,
    TEXT_LEN,
    make_angles,
    make_key_mask,
    make_qkv,
)
from golden_cases import golden, names
from tolerance import assert_same_in_float64, check_against_oracle

from dalle_fast import patterns
from dalle_fast.ops.sparse_attention import sparse_attention
from dalle_fast.reference.sparse_attention import dense_mask, rotate

every_pattern = pytest.mark.parametrize("label", PATTERNS)


def _rotated(vector, angles):
    """One vector turned pair by pair, in Python floats."""
    turned = list(vector)
    for i in range(0, len(angles), 2):
        a, b = vector[i], vector[i + 1]
        turned[i] = a * math.cos(angles[i]) - b * math.sin(angles[i])
        turned[i + 1] = b * math.cos(angles[i + 1]) + a * math.sin(angles[i + 1])
    return turned


def _double_loop(q, k, v, pattern, key_mask=None, scale=None, rotary=None):
    """Attention one query and one key at a time, in Python floats."""
    batch, heads, n, width = q.shape
    scale = width**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    windows = [pattern.window(i).tolist() for i in range(n)]
    for b in range(batch):
        for h in range(heads):
            rows = [t[b, h].tolist() for t in (q, k, v)]
            if rotary is not None:
                rows = [[_rotated(row, angle) for row, angle in zip(t, rotary.tolist(), strict=True)] for t in rows]
            for i in range(n):
                keys = [j for j in windows[i] if j < n and _unmasked(pattern, key_mask, b, i, j)]
                if not keys:
                    out[b, h, i] = torch.tensor(rows[2], dtype=q.dtype).mean(dim=0)
                    continue
                scores = [scale * sum(x * y for x, y in zip(rows[0][i], rows[1][j], strict=True)) for j in keys]
                weights = [math.exp(s - max(scores)) for s in scores]
                for c in range(width):
                    value = sum(w * rows[2][j][c] for w, j in zip(weights, keys, strict=True))
                    out[b, h, i, c] = value / sum(weights)
    return out


def _unmasked(pattern, key_mask, b, i, j):
    if key_mask is None:
        return True
    if pattern.name in FULL_KEY_MASK:
        return bool(key_mask[b, j])
    return i < TEXT_LEN or j >= TEXT_LEN or bool(key_mask[b, j])


N_TERMS = 2 * LENGTH + 6  # a dot product, a softmax and a mean over the keys


@every_pattern
@pytest.mark.parametrize("n", [1, TEXT_LEN, TEXT_LEN + 6, LENGTH])
def test_equals_double_loop(label, n):
    q, k, v = make_qkv(2, 2, n, 6, torch.float64)
    got = sparse_attention(q, k, v, pattern=PATTERNS[label], impl="reference")
    assert_same_in_float64(got, _double_loop(q, k, v, PATTERNS[label]), N_TERMS)


@every_pattern
def test_equals_double_loop_with_key_mask_rotary_and_scale(label):
    q, k, v = make_qkv(2, 1, LENGTH, 6, torch.float64)
    arguments = {"key_mask": make_key_mask(label, 2), "rotary": make_angles(LENGTH, 4), "scale": 0.7}
    got = sparse_attention(q, k, v, pattern=PATTERNS[label], **arguments, impl="reference")
    # cosines of thousands of radians: math.cos and torch.cos agree to a rounding
    assert_same_in_float64(got, _double_loop(q, k, v, PATTERNS[label], **arguments), N_TERMS)


@every_pattern
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(label, masked):
    n = TEXT_LEN + (2 if label == "axial_row" else 6)
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 1, n, 4, torch.float64))
    mask = make_key_mask(label, 1) if masked else None
    rotary = make_angles(n, 2)

    def attend(q, k, v):
        return sparse_attention(q, k, v, pattern=PATTERNS[label], key_mask=mask, rotary=rotary, impl="reference")

    # fast mode compares random projections of the Jacobian; one pattern takes the slow way, cell by cell
    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=label != "axial_row")


def test_stable_is_plain_softmax():
    """The original's stable softmax, alpha = 1024, written out: the same numbers and gradients."""
    dense = PATTERNS["full"].dense()

    def upstream(q, k, v):
        scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).masked_fill(~dense, -torch.finfo(q.dtype).max)
        scores = scores / 1024
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return (scores * 1024).softmax(dim=-1) @ v

    def ours(q, k, v):
        return sparse_attention(q, k, v, pattern=PATTERNS["full"], stable=True, impl="reference")

    check_against_oracle(ours, upstream, make_qkv(2, 2, LENGTH, 8), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_error_is_that_of_rounding_weights_and_result(dtype):
    q, k, v = make_qkv(2, 2, LENGTH, 16, dtype)
    got = sparse_attention(q, k, v, pattern=PATTERNS["paper_row"], impl="reference")
    exact = sparse_attention(q.double(), k.double(), v.double(), pattern=PATTERNS["paper_row"])
    assert got.dtype == dtype
    # weights sum to 1, each wrong by u, and the result is rounded once more; float32 scores add next to nothing
    assert (got - exact).abs().max() <= 2.05 * torch.finfo(dtype).eps / 2 * v.abs().max()


def test_rotate_turns_pairs_and_leaves_the_rest():
    x, angles = make_qkv(1, 2, 9, 8, torch.float64)[0], make_angles(12, 6)
    got = rotate(x, angles)
    expected = [
        [_rotated(row, angle) for row, angle in zip(head, angles[:9].tolist(), strict=True)] for head in x[0].tolist()
    ]
    assert_same_in_float64(got[0], torch.tensor(expected, dtype=torch.float64), N_TERMS)
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_rotate_in_float32_is_wrong_by_few_roundings():
    x, angles = make_qkv(2, 2, 9, 8)[0], make_angles(9, 8)
    error = (rotate(x, angles) - rotate(x.double(), angles)).abs().max()
    # two products with a rounded sine and cosine, and their sum
    assert error <= 3 * torch.finfo(torch.float32).eps * math.sqrt(2) * x.abs().max()


def test_rotate_keeps_large_angles_at_sixteen_bits():
    """UPSTREAM B7: rounding 8191.3 to bfloat16 first would turn it by whole radians."""
    x = make_qkv(1, 1, 9, 6, torch.bfloat16)[0]
    angles = make_angles(9, 6) + 8000
    error = (rotate(x, angles) - rotate(x.double(), angles)).abs().max()
    # one rounding of the result, whose length is that of a pair of x
    assert error <= torch.finfo(torch.bfloat16).eps / 2 * 1.01 * math.sqrt(2) * x.abs().max()


def test_dense_mask_is_made_once_and_outlives_inference_mode():
    pattern = patterns.make("axial_row", text_len=2, grid=(2, 3))
    with torch.inference_mode():
        q, k, v = make_qkv(1, 1, 8, 4)
        sparse_attention(q, k, v, pattern=pattern, impl="reference")
    first = dense_mask(pattern, 8, torch.device("cpu"), torch.float32)
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 1, 8, 4))
    mask = torch.ones(1, 2, dtype=torch.bool)
    sparse_attention(q, k, v, pattern=pattern, key_mask=mask, impl="reference").sum().backward()
    sparse_attention(q, k, v, pattern=pattern, impl="reference").sum().backward()
    assert dense_mask(pattern, 8, torch.device("cpu"), torch.float32) is first


def _golden_pattern(spec):
    arguments = spec["kwargs"]
    n_inputs = arguments["seq_len"]
    if spec["cls"] == "Attention" and spec["static_mask"] is None:
        name = "full" if arguments.get("causal", True) else "bidirectional"
        return patterns.make(name, text_len=n_inputs, grid=(1, 1))
    size = arguments.get("image_size", 8)
    layout = {"text_len": n_inputs + 1 - size**2, "grid": (size, size)}
    if spec["cls"] == "SparseConvCausalAttention":
        kernel, dilation = arguments["kernel_size"], arguments["dilation"]
        return patterns.make("conv_like", **layout, kernel=kernel, dilation=dilation)
    if spec["cls"] == "SparseAxialCausalAttention":
        return patterns.make(("axial_row", "axial_col")[arguments["axis"]], **layout)
    return patterns.make("axial_col", **layout)


@pytest.mark.parametrize("name", names("attn_module"))
def test_equals_the_originals_layer(name):
    case = golden(name)
    spec = case.models["attn"]
    heads, width = spec["kwargs"]["heads"], spec["kwargs"]["dim_head"]
    x = case.inputs["x"].requires_grad_()
    weights = {key: value.requires_grad_() for key, value in case.weights.items()}
    rotary = case.inputs.get("rotary_pos_emb")

    q, k, v = F.linear(x, weights["to_qkv.weight"]).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
    out = sparse_attention(
        q, k, v,
        pattern=_golden_pattern(spec),
        key_mask=case.inputs.get("mask"),
        stable=spec["kwargs"].get("stable", False),
        rotary=None if rotary is None else rotary.reshape(rotary.shape[-2:]),
        impl="reference",
    )  # fmt: skip
    y = F.linear(out.transpose(1, 2).flatten(2), weights["to_out.0.weight"], weights["to_out.0.bias"])
    (y * case.inputs["grad_out"]).sum().backward()

    case.check("y", y)
    case.check("grad.x", x.grad)
    for key, value in weights.items():
        case.check(f"grad.{key}", value.grad)


def test_golden_patterns_are_those_of_the_case():
    """The stored static mask, causal as the original's layer is, is axial_col."""
    case = golden("attn_static_axial_col")
    static = case.inputs["static_mask"]
    pattern = _golden_pattern(case.models["attn"])
    assert torch.equal(static & torch.ones_like(static).tril(), pattern.dense(len(static)))
    assert GRID[0] != GRID[1]
