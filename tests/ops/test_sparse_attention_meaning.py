"""What sparse attention means, on every implementation: who sees whom, what a mask hides, what stays apart."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import FULL_KEY_MASK, LENGTH, PATTERNS, TEXT_LEN, make_angles, make_key_mask, make_qkv
from tolerance import assert_same_in_float64, assert_within_budget, check_against_oracle

from dalle_fast.functional import sparse_attention

every_pattern = pytest.mark.parametrize("label", PATTERNS)


@every_pattern
def test_zero_queries_and_one_hot_values_show_the_pattern(label, impl):
    pattern = PATTERNS[label]
    q = torch.zeros(2, 3, LENGTH, LENGTH)
    v = torch.eye(LENGTH).expand(2, 3, -1, -1)
    weights = sparse_attention(q, q, v, pattern=pattern, impl=impl)
    dense = pattern.dense()
    assert torch.equal(weights > 0, dense.expand(2, 3, -1, -1))
    # all legal keys weigh the same
    exact = (dense.double() / dense.sum(-1, keepdim=True)).expand(2, 3, -1, -1)
    assert_within_budget(weights, exact, exact.float())


@every_pattern
def test_key_mask_hides_exactly_its_keys(label, impl):
    pattern, mask = PATTERNS[label], make_key_mask(label, 2)
    q = torch.zeros(2, 1, LENGTH, LENGTH)
    seen = sparse_attention(q, q, torch.eye(LENGTH).expand_as(q), pattern=pattern, key_mask=mask, impl=impl) > 0
    legal = pattern.dense().expand(2, 1, -1, -1).clone()
    if pattern.name in FULL_KEY_MASK:
        legal &= mask[:, None, None, :]
    else:
        legal[:, :, TEXT_LEN:, :TEXT_LEN] &= mask[:, None, None, :]
    legal |= ~legal.any(dim=-1, keepdim=True)  # no legal key: the mean over all
    assert torch.equal(seen, legal)


@every_pattern
def test_a_changed_key_is_seen_by_exactly_the_queries_that_may_attend_to_it(label, impl):
    pattern = PATTERNS[label]
    q, k, v = make_qkv(1, 2, LENGTH, 6)
    # a small scale keeps every weight far from underflow
    before = sparse_attention(q, k, v, pattern=pattern, scale=0.05, impl=impl)
    dense = pattern.dense()
    for j in range(LENGTH):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j] += 3
        v2[:, :, j] -= 1000
        after = sparse_attention(q, k2, v2, pattern=pattern, scale=0.05, impl=impl)
        assert torch.equal((after != before).any(dim=-1).all(dim=1)[0], dense[:, j]), f"key {j}"
        assert torch.equal(after[:, :, ~dense[:, j]], before[:, :, ~dense[:, j]])


@every_pattern
def test_a_gradient_reaches_exactly_the_keys_that_its_query_may_attend_to(label, impl):
    pattern, dense = PATTERNS[label], PATTERNS[label].dense()
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 1, LENGTH, 6))
    out = sparse_attention(q, k, v, pattern=pattern, scale=0.05, impl=impl)
    for i in range(LENGTH):
        dq, dk, dv = torch.autograd.grad(out[:, :, i].sum(), (q, k, v), retain_graph=True)
        assert torch.equal((dv != 0).any(dim=-1)[0, 0], dense[i]), f"query {i}"
        assert not dk[0, 0, ~dense[i]].any()
        assert not dq[0, 0, torch.arange(LENGTH) != i].any()


def test_a_query_without_a_legal_key_gives_the_mean_of_all_values_and_no_gradient_but_to_them(impl):
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 2, LENGTH, 6))
    out = sparse_attention(
        q, k, v, pattern=PATTERNS["full"], key_mask=torch.zeros(1, LENGTH, dtype=torch.bool), impl=impl
    )
    exact = v.detach().double().mean(dim=2, keepdim=True).expand_as(v)
    assert_within_budget(out.detach(), exact, v.detach().mean(dim=2, keepdim=True).expand_as(v))
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq.any() and not dk.any()
    assert_same_in_float64(dv.double(), torch.ones_like(dv).double(), LENGTH * 2**29)


def test_a_mask_that_hides_nothing_changes_nothing(impl):
    def with_mask(q, k, v):
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        return sparse_attention(q, k, v, pattern=PATTERNS["full"], key_mask=mask, impl=impl)

    def without(q, k, v):
        return sparse_attention(q, k, v, pattern=PATTERNS["full"], impl="reference")

    for dtype in (torch.float32, torch.bfloat16):
        check_against_oracle(with_mask, without, make_qkv(2, 2, LENGTH, 8), dtype)


def test_a_key_mask_longer_than_needed_is_cut(impl):
    q, k, v = make_qkv(2, 1, TEXT_LEN + 3, 4)
    for label in ("full", "axial_row"):
        mask = make_key_mask(label, 2)
        longer = F.pad(mask, (0, 9), value=False)
        a, b = (sparse_attention(q, k, v, pattern=PATTERNS[label], key_mask=m, impl=impl) for m in (mask, longer))
        assert torch.equal(a, b)


def test_text_queries_of_sparse_layers_ignore_the_key_mask(impl):
    q, k, v = make_qkv(1, 1, LENGTH, 4)
    nothing = torch.zeros(1, TEXT_LEN, dtype=torch.bool)
    masked, plain = (
        sparse_attention(q, k, v, pattern=PATTERNS["axial_col"], key_mask=m, impl=impl) for m in (nothing, None)
    )
    assert_within_budget(masked[:, :, :TEXT_LEN], plain[:, :, :TEXT_LEN].double(), plain[:, :, :TEXT_LEN])
    assert (masked[:, :, TEXT_LEN:] != plain[:, :, TEXT_LEN:]).any()


@pytest.mark.parametrize("label", ["full", "axial_row", "conv_like_3", "bidirectional"])
def test_nan_in_one_sample_touches_no_other(label, impl):
    tensors = [t.requires_grad_() for t in make_qkv(3, 2, LENGTH, 6)]
    mask, dout = make_key_mask(label, 3), make_qkv(3, 2, LENGTH, 6, seed=1)[0]

    def attend(q, k, v):
        out = sparse_attention(
            q, k, v, pattern=PATTERNS[label], key_mask=mask, rotary=make_angles(LENGTH, 4), impl=impl
        )
        return out, *torch.autograd.grad(out, tensors, dout)

    before = attend(*tensors)
    for value in (math.nan, math.inf):
        with torch.no_grad():
            for t in tensors:
                t[1, :, 7] = value
        after = attend(*tensors)
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(after, before, strict=True))
        assert all(t[1].isnan().any() for t in after)


def test_one_sample_alone_is_the_same_as_in_a_batch(impl):
    q, k, v = make_qkv(3, 2, LENGTH, 6)
    pattern = PATTERNS["conv_like_3"]
    together = sparse_attention(q, k, v, pattern=pattern, impl=impl)
    exact = sparse_attention(q.double(), k.double(), v.double(), pattern=pattern, impl="reference")
    for b in range(3):
        alone = sparse_attention(*(t[b : b + 1] for t in (q, k, v)), pattern=pattern, impl=impl)
        if impl == "reference":  # a library's product may add in another order for another batch
            assert_within_budget(alone, exact[b : b + 1], together[b : b + 1])
        else:
            assert torch.equal(alone, together[b : b + 1])
