"""The contracts of nearest_code and codebook_indices: what they take, what they refuse and in which words."""

import math

import pytest
import torch
from gumbel_codebook_cases import make_inputs, same
from implementations import skip_without

from dalle_fast import dispatch
from dalle_fast.functional import codebook_indices, nearest_code
from dalle_fast.ops import codebook_indices as codebook_indices_module
from dalle_fast.ops import nearest_code as nearest_code_module

OP = "codebook_indices"


def test_nearest_code_keeps_leading_shapes_strides_and_inputs():
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))  # [B, D, h, w]
    codebook = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    view = x.permute(0, 2, 3, 1)
    before = (x.clone(), codebook.clone())
    got = nearest_code(view, codebook)
    assert got.shape == (2, 3, 5) and got.dtype == torch.int64
    assert torch.equal(got, nearest_code(view.contiguous(), codebook))
    assert same((x, codebook), before)
    assert nearest_code(view[:0], codebook).shape == (0, 3, 5)
    assert nearest_code(codebook[3], codebook) == 3


@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(5, 4),
            ValueError,
            "nearest_code: x must be [..., D=4], got [2, 3]. Move the channels of maps to the end.",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(0, 4),
            ValueError,
            "nearest_code: codebook must be [K, D] with K and D at least 1, got [0, 4]. Give the embedding's weight.",
        ),
        (
            torch.zeros(2, 0),
            torch.zeros(5, 0),
            ValueError,
            "nearest_code: codebook must be [K, D] with K and D at least 1, got [5, 0]. Give the embedding's weight.",
        ),
        (
            torch.zeros(2, 4).long(),
            torch.zeros(5, 4),
            TypeError,
            "nearest_code: x, codebook must have one floating dtype, got int64, float32. Convert them with .to(dtype).",
        ),
    ],
)
def test_nearest_code_refuses(x, codebook, error, message):
    with pytest.raises(error) as raised:
        nearest_code(x, codebook)
    assert str(raised.value) == message


def test_indices_are_the_argmax_of_the_convolution(impl):
    features, weight, bias, _, _ = make_inputs()
    features, weight, bias = ((4 * t).round() for t in (features, weight, bias))  # whole numbers: sums are exact
    logits = torch.nn.functional.conv2d(features, weight[:, :, None, None], bias)
    codes = codebook_indices(features.requires_grad_(), weight, bias, impl=impl)
    assert codes.dtype == torch.int64 and not codes.requires_grad
    # argmax gives the lowest of equal ones
    assert torch.equal(codes, logits.argmax(dim=1))
    without = torch.nn.functional.conv2d(features, weight[:, :, None, None]).argmax(dim=1)
    assert torch.equal(codebook_indices(features, weight, None, impl=impl), without)
    assert codebook_indices(features[:0], weight, bias, impl=impl).shape == (0, 2, 3)


def test_indices_under_autocast_are_those_of_its_dtype(impl):
    features, weight, bias, _, _ = make_inputs(n_codes=300)
    with torch.autocast("cpu", torch.bfloat16):
        codes = codebook_indices(features.bfloat16(), weight, bias, impl=impl)
    assert torch.equal(codes, codebook_indices(*(t.bfloat16() for t in (features, weight, bias)), impl=impl))


def test_indices_compile_into_one_graph(impl):
    features, weight, bias, _, _ = make_inputs()
    torch.compiler.reset()
    compiled = torch.compile(codebook_indices, fullgraph=True, backend="aot_eager")
    expected = codebook_indices(features, weight, bias, impl=impl)
    assert torch.equal(compiled(features, weight, bias, impl=impl), expected)


def test_indices_are_registered_as_torch_wants_it():
    skip_without("cpu", OP)
    for bias in (torch.zeros(7), None):
        torch.library.opcheck(torch.ops.dalle_fast.codebook_indices.default, (*make_inputs()[:2], bias, "cpu"))


def _indices_refused(error, message, *, changes=None, impl="auto"):
    inputs = list(make_inputs()[:3])
    for index, tensor in (changes or {}).items():
        inputs[index] = tensor
    with pytest.raises(error) as raised:
        codebook_indices(*inputs, impl=impl)
    assert str(raised.value) == message


def test_indices_refuse_in_words(impl):
    features, weight, bias = range(3)
    expected = "codebook_indices: features must be [B, F, h, w], got [6, 3]. Give the encoder's maps, not rows."
    _indices_refused(ValueError, expected, changes={features: torch.zeros(6, 3)})
    expected = (
        "codebook_indices: weight must be [K, F=3] with K and F at least 1, got [7, 4]."
        " Flatten the weight of the 1x1 convolution."
    )
    _indices_refused(ValueError, expected, changes={weight: torch.zeros(7, 4)})
    expected = "codebook_indices: bias must be [K=7], got [3]. There is one bias a code."
    _indices_refused(ValueError, expected, changes={bias: torch.zeros(3)})
    expected = (
        "codebook_indices: features, weight, bias must have one floating dtype, got float32, float64, float32."
        " Convert them with .to(dtype)."
    )
    _indices_refused(TypeError, expected, changes={weight: torch.zeros(7, 3).double()})
    maps = torch.zeros(2, 3, 2, 3)
    maps[1, 2, 0, 1] = -math.inf
    expected = (
        "codebook_indices: features must be finite, got -inf at [b=1, f=2, y=0, x=1]."
        " Lower the learning rate, or compute the encoder in float32."
    )
    _indices_refused(ValueError, expected, changes={features: maps}, impl=impl)


def test_explain_themselves():
    features, weight, *_ = make_inputs()
    for op, module, given in (
        ("codebook_indices", codebook_indices_module, (features, weight)),
        ("nearest_code", nearest_code_module, (weight, weight)),
    ):
        assert dispatch.explain(op, **module.facts(*given)).startswith(f"{op}: runs on '")
