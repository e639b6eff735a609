"""The contracts of gumbel_codebook and nearest_code: what they take, what they refuse and in which words."""

import math

import pytest
import torch

from dalle_fast import dispatch
from dalle_fast.functional import gumbel_codebook, nearest_code
from dalle_fast.ops import gumbel_codebook as gumbel_codebook_module
from dalle_fast.ops import nearest_code as nearest_code_module


def _inputs(batch=2, n_features=3, height=2, width=3, n_codes=7, dim=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, n_features, height, width), (n_codes, n_features), (n_codes,), (n_codes, dim))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def _same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


def test_shapes_and_dtypes():
    embeds, codes, noisy_codes, kl = gumbel_codebook(*_inputs(dtype=torch.bfloat16), temperature=1.0, with_kl=True)
    assert embeds.shape == (2, 4, 2, 3) and embeds.dtype == torch.bfloat16
    assert codes.shape == noisy_codes.shape == (2, 2, 3) and codes.dtype == noisy_codes.dtype == torch.int64
    assert kl.shape == () and kl.dtype == torch.float32
    assert gumbel_codebook(*_inputs(), temperature=1.0)[3] is None


def test_strided_views_equal_contiguous_tensors_and_inputs_stay():
    features, weight, bias, codebook = _inputs()
    noise = torch.randn(2, 7, 2, 3)
    views = (
        features.transpose(2, 3).contiguous().transpose(2, 3),
        weight.T.contiguous().T,
        torch.stack((bias, bias), dim=1)[:, 0],
        torch.cat((codebook, codebook), dim=1)[:, :4],
    )
    given = [*views, noise.to(memory_format=torch.channels_last)]
    before = [t.clone() for t in given]
    arguments = {"temperature": 0.7, "straight_through": True, "with_kl": True}
    got = gumbel_codebook(*given[:4], gumbel_noise=given[4], **arguments)
    assert _same(got, gumbel_codebook(features, weight, bias, codebook, gumbel_noise=noise, **arguments))
    assert _same(given, before)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"height": 1, "width": 1, "batch": 1}, {"n_codes": 1}, {"dim": 1}])
@pytest.mark.parametrize("mode", [{}, {"straight_through": True, "reinmax": True}])
def test_empty_and_single_sizes(sizes, mode):
    inputs = [t.requires_grad_() for t in _inputs(**sizes)]
    embeds, codes, _, kl = gumbel_codebook(*inputs, temperature=1.0, with_kl=True, **mode)
    (embeds.sum() + kl).backward()
    assert all(t.grad.shape == t.shape and t.grad.isfinite().all() for t in inputs)
    if sizes.get("n_codes") == 1:
        assert not codes.any() and kl == 0
    if sizes.get("batch") == 0:
        assert embeds.numel() == 0 and kl == 0


def test_reinmax_alone_is_ignored_as_upstream():
    inputs = _inputs()
    soft, both = (gumbel_codebook(*inputs, temperature=0.5, seed=3, reinmax=r) for r in (False, True))
    assert _same(soft, both)


def test_seeds_repeat_and_the_default_does_not():
    inputs = _inputs()

    def embeds(**noise):
        return gumbel_codebook(*inputs, temperature=1.0, **noise)[0]

    assert torch.equal(embeds(seed=3), embeds(seed=3))
    assert not torch.equal(embeds(seed=3), embeds(seed=4))
    torch.manual_seed(0)
    first, second = embeds(), embeds()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(embeds(), first)


def test_nan_in_one_sample_touches_no_other():
    features, *rest = _inputs(3)
    before = gumbel_codebook(features, *rest, temperature=1.0, seed=1)
    features[1] = math.nan
    after = gumbel_codebook(features, *rest, temperature=1.0, seed=1)
    assert _same([t[[0, 2]] for t in before[:3]], [t[[0, 2]] for t in after[:3]])


def test_noise_is_a_constant():
    noise = torch.zeros(2, 7, 2, 3, requires_grad=True)
    assert not gumbel_codebook(*_inputs(), temperature=1.0, gumbel_noise=noise)[0].requires_grad


def _refused(error, message, *, changes=None, **arguments):
    inputs = _inputs()
    for index, tensor in (changes or {}).items():
        inputs[index] = tensor
    with pytest.raises(error) as raised:
        gumbel_codebook(*inputs, **{"temperature": 1.0, **arguments})
    assert str(raised.value) == message


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_refuses_impossible_temperatures(temperature):
    expected = (
        f"gumbel_codebook: temperature must be a finite number above 0, got {float(temperature)}."
        " For hard codes use straight_through."
    )
    _refused(ValueError, expected, temperature=temperature)


def test_refuses_seed_beside_noise():
    expected = "gumbel_codebook: seed and gumbel_noise must not both be given, got seed=0. Leave one out."
    _refused(ValueError, expected, seed=0, gumbel_noise=torch.zeros(2, 7, 2, 3))


def test_refuses_noise_of_another_shape_or_kind():
    expected = (
        "gumbel_codebook: gumbel_noise must be [B=2, K=7, h=2, w=3], got [2, 7, 3, 2]."
        " There is one number a code and position."
    )
    _refused(ValueError, expected, gumbel_noise=torch.zeros(2, 7, 3, 2))
    expected = "gumbel_codebook: gumbel_noise must be floating, got int64. Give -log(-log(u))."
    _refused(TypeError, expected, gumbel_noise=torch.zeros(2, 7, 2, 3, dtype=torch.int64))


def test_refuses_tensors_that_do_not_fit():
    features, weight, bias, codebook = range(4)
    expected = "gumbel_codebook: features must be [B, F, h, w], got [6, 3]. Give the encoder's maps, not rows."
    _refused(ValueError, expected, changes={features: torch.zeros(6, 3)})
    expected = (
        "gumbel_codebook: weight must be [K=7, F=3], got [7, 3, 1, 1]. Flatten the weight of the 1x1 convolution."
    )
    _refused(ValueError, expected, changes={weight: torch.zeros(7, 3, 1, 1)})
    expected = "gumbel_codebook: bias must be [K=7], got [3]. There is one bias a code."
    _refused(ValueError, expected, changes={bias: torch.zeros(3)})
    expected = "gumbel_codebook: codebook must be [K, D] with K at least 1, got [0, 4]. Give the embedding's weight."
    _refused(ValueError, expected, changes={codebook: torch.zeros(0, 4)})


def test_refuses_mixed_dtypes():
    expected = (
        "gumbel_codebook: features, weight, bias, codebook must have one floating dtype, got float32, float64, float32,"
        " float32. Convert them with .to(dtype)."
    )
    _refused(TypeError, expected, changes={1: torch.zeros(7, 3, dtype=torch.float64)})


def test_nearest_code_keeps_leading_shapes_strides_and_inputs():
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))  # [B, D, h, w]
    codebook = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    view = x.permute(0, 2, 3, 1)
    before = (x.clone(), codebook.clone())
    got = nearest_code(view, codebook)
    assert got.shape == (2, 3, 5) and got.dtype == torch.int64
    assert torch.equal(got, nearest_code(view.contiguous(), codebook))
    assert _same((x, codebook), before)
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
            "nearest_code: codebook must be [K, D] with K at least 1, got [0, 4]. Give the embedding's weight.",
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


def test_explain_themselves():
    features, _, _, codebook = _inputs()
    for op, module, given in (
        ("gumbel_codebook", gumbel_codebook_module, (features, codebook)),
        ("nearest_code", nearest_code_module, (codebook, codebook)),
    ):
        assert dispatch.explain(op, **module.facts(*given)).startswith(f"{op}: runs on '")
