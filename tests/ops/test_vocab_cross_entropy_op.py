"""The contract of vocab_cross_entropy: what it takes, what it refuses and in which words."""

import pytest
import torch
import torch.nn.functional as F

from dalle_fast import dispatch
from dalle_fast.functional import vocab_cross_entropy
from dalle_fast.layout import TokenLayout
from dalle_fast.ops.vocab_cross_entropy import facts

OP = "vocab_cross_entropy"
LAYOUT = TokenLayout(4, (2, 3))
N_TEXT, N_IMAGE, WIDTH, N = 9, 5, 6, LAYOUT.max_inputs


def _arguments(batch=2, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden": draw(batch, N, WIDTH),
        "norm": (draw(WIDTH), draw(WIDTH)),
        "weight": draw(N_TEXT + N_IMAGE, WIDTH),
        "bias": draw(N_TEXT + N_IMAGE),
        "labels": torch.randint(N_IMAGE, (batch, N), generator=generator),
        "layout": LAYOUT,
        "num_text_tokens": N_TEXT,
        **changes,
    }


def test_strided_views_equal_contiguous_tensors_and_inputs_stay(impl):
    plain = _arguments(impl=impl)
    strided = {
        **plain,
        "hidden": plain["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": plain["weight"].T.contiguous().T,
        "labels": plain["labels"].T.contiguous().T,
    }
    before = {name: value.clone() for name, value in strided.items() if isinstance(value, torch.Tensor)}
    got, expected = vocab_cross_entropy(**strided, divide_max=True), vocab_cross_entropy(**plain, divide_max=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(strided[name], value) for name, value in before.items())


def test_an_empty_batch_costs_nothing(impl):
    arguments = _arguments(0, impl=impl)
    leaves = [arguments[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    losses = vocab_cross_entropy(**arguments)
    assert losses[0] == 0 and losses[1] == 0
    gradients = torch.autograd.grad(sum(losses), leaves)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, leaves, strict=True))


def test_no_bias_is_a_bias_of_zeros(impl):
    without = vocab_cross_entropy(**_arguments(bias=None, impl=impl))
    zeros = vocab_cross_entropy(**_arguments(bias=torch.zeros(N_TEXT + N_IMAGE), impl=impl))
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))


def test_autocast_rounds_the_operands_of_the_products_and_takes_mixed_dtypes(impl):
    arguments = _arguments(impl=impl)
    arguments["hidden"] = arguments["hidden"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = vocab_cross_entropy(**arguments)

    def rounded(x):
        return x.to(torch.bfloat16).double()

    normed = rounded(F.layer_norm(arguments["hidden"].float(), (WIDTH,), *arguments["norm"]))
    logits = normed @ rounded(arguments["weight"]).T + arguments["bias"]
    n_text, labels = LAYOUT.text_len - 1, arguments["labels"]
    expected = (
        F.cross_entropy(logits[:, :n_text, :N_TEXT].flatten(0, 1), labels[:, :n_text].flatten()),
        F.cross_entropy(logits[:, n_text:, N_TEXT:].flatten(0, 1), labels[:, n_text:].flatten()),
    )
    for loss, exact in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        # some twenty float32 additions in a row: a dot product, a softmax, a mean
        assert abs(loss - exact) < 20 * torch.finfo(torch.float32).eps * logits.abs().max()


def _refused(error, message, **changes):
    with pytest.raises(error) as raised:
        vocab_cross_entropy(**_arguments(**changes))
    assert str(raised.value) == message


def test_refuses_sequences_with_the_last_token():
    expected = (
        f"vocab_cross_entropy: hidden must be [B, N, C] with N at most {N}, the layout's inputs, got [2, {N + 1}, 6]."
        " The last image token is never an input."
    )
    _refused(ValueError, expected, hidden=torch.zeros(2, N + 1, WIDTH))


def test_refuses_tensors_that_do_not_fit():
    expected = "vocab_cross_entropy: hidden must have a width of at least 1, got [2, 8, 0]. Give all channels."
    _refused(ValueError, expected, hidden=torch.zeros(2, 8, 0))
    expected = "vocab_cross_entropy: weight must be [V, C=6], got [14, 5]. Give the head's own weight."
    _refused(ValueError, expected, weight=torch.zeros(14, 5))
    expected = "vocab_cross_entropy: bias must be [V=14], got [9]. There is one bias a row of weight."
    _refused(ValueError, expected, bias=torch.zeros(9))
    expected = "vocab_cross_entropy: norm's bias must be [C=6], got [5]. It belongs to the LayerNorm before the head."
    _refused(ValueError, expected, norm=(torch.zeros(6), torch.zeros(5)))
    expected = f"vocab_cross_entropy: labels must be [B=2, N={N}], got [2, {N - 1}]. Position i predicts token i + 1."
    _refused(ValueError, expected, labels=torch.zeros(2, N - 1, dtype=torch.int64))
    expected = "vocab_cross_entropy: labels must be int64, got int32. Convert them with .long()."
    _refused(TypeError, expected, labels=torch.zeros(2, N, dtype=torch.int32))
    expected = (
        "vocab_cross_entropy: num_text_tokens must be in 0..V=14, got 15."
        " It counts the text rows of weight, padding ids included."
    )
    _refused(ValueError, expected, num_text_tokens=15)


def test_refuses_mixed_dtypes():
    expected = (
        "vocab_cross_entropy: hidden, norm_weight, norm_bias, weight, bias must have one floating dtype, got float64,"
        " float32, float32, float32, float32. Convert them with .to(dtype)."
    )
    _refused(TypeError, expected, hidden=torch.zeros(2, N, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize(
    ("position", "label", "half", "largest"),
    [(0, N_TEXT, "text", N_TEXT - 1), (3, N_IMAGE, "image", N_IMAGE - 1), (4, -1, "image", N_IMAGE - 1)],
)
def test_refuses_ids_out_of_range(position, label, half, largest, impl):
    labels = torch.zeros(2, N, dtype=torch.int64)
    labels[1, position] = label
    expected = (
        f"vocab_cross_entropy: labels of {half} positions must be in 0..{largest}, or -100 for not counted, got"
        f" {label}. Image codes come without the offset of the text vocabulary."
    )
    _refused(ValueError, expected, labels=labels, impl=impl)


def test_explains_itself():
    text = dispatch.explain("vocab_cross_entropy", **facts(torch.zeros(1, 2, WIDTH), torch.zeros(3, WIDTH)))
    assert text.startswith("vocab_cross_entropy: runs on '")
