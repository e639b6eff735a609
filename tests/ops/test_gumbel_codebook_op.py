"""The contract of gumbel_codebook: what it takes, what it refuses and in which words."""

import math

import pytest
import torch
from gumbel_codebook_cases import MODES, SEED, make_inputs, named, results, same, written_noise

from dalle_fast import rng
from dalle_fast.functional import gumbel_codebook

OP = "gumbel_codebook"
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(dtype, impl):
    inputs = make_inputs(dtype=dtype)[:4]
    embeds, codes, noisy_codes, kl = gumbel_codebook(*inputs, temperature=1, with_kl=True, impl=impl)
    assert embeds.shape == (2, 4, 2, 3) and embeds.dtype == dtype
    assert codes.shape == noisy_codes.shape == (2, 2, 3) and codes.dtype == noisy_codes.dtype == torch.int64
    assert kl.shape == () and kl.dtype == torch.float32
    assert gumbel_codebook(*inputs, temperature=1.0, impl=impl)[3] is None


def test_float64_stays_float64():
    embeds, *_, kl = gumbel_codebook(*make_inputs(dtype=torch.float64)[:4], temperature=1.0, with_kl=True)
    assert embeds.dtype == kl.dtype == torch.float64


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"grid": (0, 3)}, {"grid": (1, 1), "batch": 1}, {"n_codes": 1}, {"dim": 1}]
)
@every_mode
def test_empty_and_single_sizes(sizes, mode, impl):
    inputs, noise = named(make_inputs(**sizes))
    for given in ({"gumbel_noise": noise}, {"seed": 1}):
        embeds, codes, _, kl, *gradients = results(impl, inputs, mode=mode, **given)
        assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(gradients, inputs.values(), strict=True))
        if sizes.get("n_codes") == 1:
            assert not codes.any() and kl == 0
        if not embeds.numel():
            assert kl == 0 and not any(g.any() for g in gradients)


def test_reinmax_alone_is_ignored_as_upstream(impl):
    inputs = make_inputs()[:4]
    soft, both = (gumbel_codebook(*inputs, temperature=0.5, seed=3, reinmax=r, impl=impl) for r in (False, True))
    assert same(soft, both)


def test_seeds_repeat_and_the_default_does_not(impl):
    inputs = make_inputs()[:4]

    def embeds(**noise):
        return gumbel_codebook(*inputs, temperature=1.0, impl=impl, **noise)[0]

    assert torch.equal(embeds(seed=3), embeds(seed=3))
    assert not torch.equal(embeds(seed=3), embeds(seed=4))
    torch.manual_seed(0)
    first, second = embeds(), embeds()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(embeds(), first)
    torch.manual_seed(0)
    assert torch.equal(embeds(seed=rng.draw_seed()), first)


@pytest.mark.parametrize("seed", [0, SEED, 2**64 - 1])
def test_a_seed_and_its_tensor_are_one(seed, impl):
    inputs, _ = named(make_inputs())
    as_int, as_tensor = (results(impl, inputs, seed=s) for s in (seed, rng.seeds_to_tensor(seed)))
    assert same(as_int, as_tensor)


@every_mode
def test_a_seed_means_the_noise_of_its_counters(mode):
    """Of the reference, bit for bit: row r of the call draws at position first_row + r of Stream.VAE."""
    inputs, _ = named(make_inputs(3, grid=(2, 5)))
    for first in (0, 17, 2**32 - 30):
        noise = written_noise(SEED, 3, 7, (2, 5), first, impl="auto")
        given = {"mode": mode, "gumbel_noise": noise}
        assert same(
            results("reference", inputs, mode=mode, seed=SEED, first_row=first), results("reference", inputs, **given)
        )


def test_noise_is_a_constant(impl):
    noise = torch.zeros(2, 7, 2, 3, requires_grad=True)
    inputs = make_inputs()[:4]
    assert not gumbel_codebook(*inputs, temperature=1.0, gumbel_noise=noise, impl=impl)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_of_another_dtype_is_read_as_it_is(dtype, impl):
    inputs, noise = named(make_inputs())
    noise = noise.to(dtype)
    one, other = (results(impl, inputs, gumbel_noise=n) for n in (noise, noise.float()))
    assert same(one, other)


# -- refusals


def _refused(error, message, *, changes=None, **arguments):
    inputs = list(make_inputs()[:4])
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
    noise = torch.zeros(2, 7, 2, 3)
    expected = "gumbel_codebook: seed and gumbel_noise must not both be given, got seed={}. Leave one out."
    _refused(ValueError, expected.format(0), seed=0, gumbel_noise=noise)
    _refused(ValueError, expected.format("a tensor"), seed=rng.seeds_to_tensor(0), gumbel_noise=noise)


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (-1, ValueError, "gumbel_codebook: seed must be in 0 .. 2**64 - 1, got -1. Take it modulo 2**64"),
        (2**64, ValueError, "gumbel_codebook: seed must be in 0 .. 2**64 - 1, got 18446744073709551616."),
        (0.5, TypeError, "gumbel_codebook: seed must be a whole number, got 0.5 (float)."),
        ([1, 2], TypeError, "gumbel_codebook: seed must be a whole number, got [1, 2] (list)."),
        (
            torch.tensor([1, 2]),
            TypeError,
            "gumbel_codebook: seed as a tensor must be int64 [1] on the CPU or the device of features, got int64 [2]",
        ),
    ],
)
def test_refuses_impossible_seeds(seed, error, words):
    with pytest.raises(error) as raised:
        gumbel_codebook(*make_inputs()[:4], temperature=1.0, seed=seed)
    assert str(raised.value).startswith(words)


def test_refuses_rows_beyond_the_positions():
    expected = (
        "gumbel_codebook: first_row must be 0 or more and leave its 12 rows below 2**32, got {}."
        " Positions of the noise are 32 bits wide."
    )
    for first_row in (-1, 2**32 - 11):
        _refused(ValueError, expected.format(first_row), first_row=first_row)
    gumbel_codebook(*make_inputs()[:4], temperature=1.0, first_row=2**32 - 12)
    expected = (
        "gumbel_codebook: first_row must be a whole number, got 0.0 (float)."
        " It counts the rows of the global batch before these."
    )
    _refused(TypeError, expected, first_row=0.0)


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
    expected = "gumbel_codebook: weight must be [K, F=3] with K and F at least 1, got {}. Flatten the weight of the 1x1"
    expected += " convolution."
    for shape in ((7, 3, 1, 1), (7, 4), (0, 3)):
        _refused(ValueError, expected.format(list(shape)), changes={weight: torch.zeros(shape)})
    expected = "gumbel_codebook: bias must be [K=7], got [3]. There is one bias a code."
    _refused(ValueError, expected, changes={bias: torch.zeros(3)})
    expected = (
        "gumbel_codebook: codebook must be [K=7, D] with D at least 1, as weight has K rows, got {}."
        " Give the embedding's weight."
    )
    for shape in ((8, 4), (7, 0), (7,)):
        _refused(ValueError, expected.format(list(shape)), changes={codebook: torch.zeros(shape)})


def test_refuses_mixed_dtypes_and_devices():
    expected = (
        "gumbel_codebook: features, weight, bias, codebook must have one floating dtype, got float32, float64, float32,"
        " float32. Convert them with .to(dtype)."
    )
    _refused(TypeError, expected, changes={1: torch.zeros(7, 3, dtype=torch.float64)})
    expected = (
        "gumbel_codebook: features, weight, bias, codebook, gumbel_noise must be on one device, got cpu, cpu, cpu, cpu,"
        " meta. Move them with .to(device)."
    )
    _refused(ValueError, expected, gumbel_noise=torch.zeros(2, 7, 2, 3, device="meta"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_refuses_features_that_are_not_finite_and_says_where(value, dtype, impl):
    inputs, noise = named(make_inputs(dtype=dtype))
    inputs["features"][1, 2, 0, 1] = value
    expected = (
        f"gumbel_codebook: features must be finite, got {value} at [b=1, f=2, y=0, x=1]%s."
        " Lower the learning rate, or compute the encoder in float32."
    )
    with pytest.raises(ValueError) as raised:
        results(impl, inputs, gumbel_noise=noise)
    assert str(raised.value) == expected % ""
    inputs["features"][1, 2, 1] = -value
    with pytest.raises(ValueError) as raised:
        results(impl, inputs, gumbel_noise=noise)
    assert str(raised.value) == expected % " and 3 more"


def test_features_whose_sum_overflows_are_finite(impl):
    inputs, noise = named(make_inputs())
    inputs["features"].fill_(3e38)
    inputs["weight"] *= 1e-38
    assert results(impl, inputs, gumbel_noise=noise)[0].isfinite().all()
