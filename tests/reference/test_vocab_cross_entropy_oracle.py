"""The oracle of vocab_cross_entropy against the original's full, masked head, and gradcheck."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_same_in_float64, check_against_oracle, outputs_and_gradients

from dalle_fast.layout import TokenLayout
from dalle_fast.ops.vocab_cross_entropy import vocab_cross_entropy

LAYOUT = TokenLayout(4, (2, 3))
N_TEXT, N_IMAGE, WIDTH = 9, 5, 6
N_TERMS = 200  # a norm, a dot product, a softmax and a mean over the batch


def _inputs(batch=2, n=LAYOUT.max_inputs, layout=LAYOUT, dtype=torch.float64, seed=0):
    """hidden, norm weight, norm bias, weight, bias, labels; image codes without offset."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    n_text = min(layout.text_len - 1, n)
    text = torch.randint(N_TEXT, (batch, n_text), generator=generator)
    image = torch.randint(N_IMAGE, (batch, n - n_text), generator=generator)
    head = (draw(N_TEXT + N_IMAGE, WIDTH), draw(N_TEXT + N_IMAGE))
    norm = (1 + draw(WIDTH) / 4, draw(WIDTH) / 4)
    return (draw(batch, n, WIDTH), *norm, *head, torch.cat((text, image), dim=1))


def _upstream(hidden, norm_weight, norm_bias, weight, bias, labels, *, divide_max=False, layout=LAYOUT):
    """The original: all logits, the other half set to -finfo.max, two cross entropies over the whole vocabulary."""
    n_text = layout.text_len - 1
    if divide_max:
        hidden = hidden / hidden.amax(dim=-1, keepdim=True).detach()
    logits = F.linear(F.layer_norm(hidden, (WIDTH,), norm_weight, norm_bias), weight, bias)
    predicts_image = torch.arange(hidden.shape[1])[:, None] >= n_text
    is_image = torch.arange(len(weight)) >= N_TEXT
    logits = logits.masked_fill(predicts_image != is_image, -torch.finfo(logits.dtype).max).transpose(1, 2)
    labels = torch.where(predicts_image[:, 0], labels + N_TEXT, labels)
    return (
        F.cross_entropy(logits[:, :, :n_text], labels[:, :n_text]),
        F.cross_entropy(logits[:, :, n_text:], labels[:, n_text:]),
    )


def _ours(hidden, norm_weight, norm_bias, weight, bias, labels, *, divide_max=False, layout=LAYOUT):
    norm = (norm_weight, norm_bias)
    arguments = {"divide_max": divide_max, "impl": "reference"}
    return vocab_cross_entropy(hidden, norm, weight, bias, labels, layout, N_TEXT, **arguments)


def _by_sample(function, **options):
    """The losses of each sample by itself: many scalars, so that luck with one hides nothing."""

    def of_batch(hidden, norm_weight, norm_bias, weight, bias, labels):
        pairs = [
            function(h[None], norm_weight, norm_bias, weight, bias, y[None], **options)
            for h, y in zip(hidden, labels, strict=True)
        ]
        return tuple(torch.stack(losses) for losses in zip(*pairs, strict=True))

    return of_batch


@pytest.mark.parametrize("divide_max", [False, True])
def test_equals_the_originals_masked_head(divide_max):
    ours, upstream = (_by_sample(function, divide_max=divide_max) for function in (_ours, _upstream))
    check_against_oracle(ours, upstream, _inputs(8), torch.float32)
    got, expected = (
        outputs_and_gradients(lambda *x, f=f: f(*x, divide_max=divide_max), _inputs(3), torch.float64)
        for f in (_ours, _upstream)
    )
    assert got.keys() == expected.keys() and len(got) == 2 + 5
    for name, value in got.items():
        assert_same_in_float64(value, expected[name], N_TERMS, name)


@pytest.mark.parametrize("n", [LAYOUT.text_len, LAYOUT.text_len + 2])
def test_a_partial_image_equals_the_original(n):
    inputs = _inputs(n=n)
    for one, other in zip(_ours(*inputs), _upstream(*inputs), strict=True):
        assert_same_in_float64(one, other, N_TERMS)


def test_negative_maxima_divide_by_their_sign():
    """divide_max is LayerNorm(x / m) with the signed maximum: rows of negative numbers turn over."""
    hidden, *rest = _inputs()
    hidden = -hidden.abs()
    for one, other in zip(
        _ours(hidden, *rest, divide_max=True), _upstream(hidden, *rest, divide_max=True), strict=True
    ):
        assert_same_in_float64(one, other, N_TERMS)
    assert all(
        abs(a - b) > 1e-3 for a, b in zip(_ours(hidden, *rest, divide_max=True), _ours(hidden, *rest), strict=True)
    )


def test_passes_gradcheck():
    *tensors, labels = _inputs(1)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *given: _ours(*given, labels), tensors)


def test_divide_max_passes_gradcheck_as_a_constant():
    """No gradient through the maximum: numerically that is a maximum held fixed."""
    hidden, *rest = _inputs(1)
    fixed = hidden.amax(dim=-1, keepdim=True)
    given = hidden.clone().requires_grad_()
    ours = torch.autograd.grad(sum(_ours(given, *rest, divide_max=True)), given)[0]
    scaled = (hidden / fixed).requires_grad_()
    expected = torch.autograd.grad(sum(_ours(scaled, *rest)), scaled)[0] / fixed
    assert_same_in_float64(ours, expected, N_TERMS)


def test_a_text_position_reads_no_image_row_and_the_other_way_round():
    hidden, norm_weight, norm_bias, weight, bias, labels = _inputs()
    text, image = _ours(hidden, norm_weight, norm_bias, weight, bias, labels)
    changed = weight.clone()
    changed[N_TEXT:] *= 3
    text_2, image_2 = _ours(hidden, norm_weight, norm_bias, changed, bias, labels)
    assert torch.equal(text, text_2) and not torch.equal(image, image_2)
    changed = hidden.clone()
    changed[:, : LAYOUT.text_len - 1] += 3 * torch.arange(WIDTH)
    text_3, image_3 = _ours(changed, norm_weight, norm_bias, weight, bias, labels)
    assert torch.equal(image, image_3) and not torch.equal(text, text_3)


def test_position_t_minus_1_predicts_the_first_code():
    hidden, norm_weight, norm_bias, weight, bias, labels = _inputs(1)
    labels[:] = -100
    first = LAYOUT.text_len - 1
    labels[0, first] = 2
    text, image = _ours(hidden, norm_weight, norm_bias, weight, bias, labels)
    normed = F.layer_norm(hidden[0, first], (WIDTH,), norm_weight, norm_bias)
    logits = weight[N_TEXT:] @ normed + bias[N_TEXT:]
    assert text == 0
    assert_same_in_float64(image, logits.logsumexp(0) - logits[2], N_TERMS)


def test_ignored_labels_do_not_count():
    hidden, norm_weight, norm_bias, weight, bias, labels = _inputs()
    ignored = labels.clone()
    ignored[0, 0] = ignored[1, 5] = -100
    losses = _ours(hidden, norm_weight, norm_bias, weight, bias, ignored)
    every = [
        _ours(hidden, norm_weight, norm_bias, weight, bias, labels.where(only, -100))
        for only in torch.eye(labels.numel(), dtype=torch.bool).view(-1, *labels.shape)
    ]
    n_text = LAYOUT.text_len - 1
    text = torch.stack([pair[0] for pair in every]).view_as(labels)[:, :n_text]
    image = torch.stack([pair[1] for pair in every]).view_as(labels)[:, n_text:]
    assert_same_in_float64(losses[0], text[ignored[:, :n_text] >= 0].mean(), N_TERMS)
    assert_same_in_float64(losses[1], image[ignored[:, n_text:] >= 0].mean(), N_TERMS)


def test_layout_without_text():
    layout = TokenLayout(1, (2, 3))
    inputs = _inputs(n=5, layout=layout)
    text, image = _ours(*inputs, layout=layout)
    assert text == 0
    assert_same_in_float64(image, _upstream(*inputs, layout=layout)[1], N_TERMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_losses_are_float32_and_close(dtype):
    inputs = _inputs(dtype=dtype)
    exact = _ours(*(t.double() if t.is_floating_point() else t for t in inputs))
    for got, want in zip(_ours(*inputs), exact, strict=True):
        assert got.dtype == torch.float32
        # the normed operand is rounded once: each logit moves by at most u |y| . |w|, the loss by at most twice that
        largest = (inputs[0].float().abs().max() * 4 + 1) * inputs[3].float().abs().sum(-1).max()
        assert (got - want).abs() <= 2 * torch.finfo(dtype).eps / 2 * largest
