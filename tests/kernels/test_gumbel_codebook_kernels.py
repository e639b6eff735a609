"""Triton kernels of gumbel_codebook in the interpreter, which checks bounds and races, against the float64 oracle."""

import itertools
import math

import pytest
import torch

from dalle_fast import rng
from dalle_fast.reference.gumbel_noise import words as oracle_words

pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")

import triton
import triton.language as tl
from dalle_fast.kernels.gumbel_codebook_arguments import prepare
from dalle_fast.kernels.gumbel_codebook_blocks import DIVERGENCE
from dalle_fast.kernels.gumbel_codebook_sizes import TABLE, Launch, pick_gumbel_codebook
from dalle_fast.kernels.philox import gumbel
from gumbel_codebook_cases import MODES
from gumbel_codebook_harness import SMALL, bottleneck, check, drawn, reference
from tolerance import assert_within_budget

from dalle_fast.kernels import gumbel_codebook as kernels
from dalle_fast.kernels import gumbel_codebook_arguments, gumbel_codebook_codes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = {
    "mode": list(MODES),
    "dtype": list(DTYPES),
    "n_codes": [37, 9, 64, 70],
    "dim": [20, 8, 40],  # of blocks of 16
    "n_features": [5, 16, 24],  # of blocks of 16
    "with_kl": [True, False],
    "bias": [True, False],
    "temperature": [0.9, 1 / 16],
    "grid": [(3, 5), (17, 1)],
    "layout": ["rows", "channels", "inside"],
    "slices": ["several", "one"],
}
every_mode = pytest.mark.parametrize("mode", MODES)


def pairwise(choices):
    """Few combinations in which every two values of two different choices meet, greedily, always the same ones."""
    names = list(choices)
    left = {
        frozenset([(a, str(x)), (b, str(y))])
        for a, b in itertools.combinations(names, 2)
        for x in choices[a]
        for y in choices[b]
    }
    while left:
        case = {}
        for name in names:
            gains = [
                sum(frozenset([(name, str(value)), (other, str(case[other]))]) in left for other in case)
                for value in choices[name]
            ]
            untried = [sum((name, str(value)) in pair for pair in left) for value in choices[name]]
            best = max(range(len(gains)), key=lambda i: (gains[i], untried[i]))
            case[name] = choices[name][best]
        left -= {frozenset([(a, str(case[a])), (b, str(case[b]))]) for a, b in itertools.combinations(names, 2)}
        yield case


CASES = list(pairwise(CHOICES))


def make_inputs(n_codes=37, dim=20, n_features=5, grid=(3, 5), *, batch=2, bias=True, layout="rows", seed=0):
    """features, weight, bias, codebook of unit variance, and noise [B, K, h, w]."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    features = laid_out(randn(batch, n_features, *grid), layout)
    noise = -torch.log(-torch.log(torch.rand(batch, n_codes, *grid, generator=generator)))
    inputs = (features, randn(n_codes, n_features), randn(n_codes) if bias else None, randn(n_codes, dim))
    return inputs, laid_out(noise, layout)


def laid_out(x, layout):
    """x [B, C, h, w]: contiguous; with its channels side by side; as a view inside of larger memory."""
    if layout == "channels":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "inside":
        return torch.nn.functional.pad(x, (1, 2, 0, 1, 2, 1))[:, 2:-1, : x.shape[2], 1:-2]
    return x


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch):
    """Features in blocks of 16; what kernels leave unwritten is NaN, or no code."""
    monkeypatch.setattr(gumbel_codebook_arguments, "FEATURES_AT_ONCE", 16)
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def filled(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(math.nan if x.is_floating_point() else -7)

    return filled


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_outputs_and_gradients_are_within_the_budget(case, monkeypatch):
    if case["slices"] == "one":
        monkeypatch.setattr(gumbel_codebook_codes, "PROGRAMS", 1)
    sizes = {name: case[name] for name in ("n_codes", "dim", "n_features", "grid", "bias", "layout")}
    inputs, noise = make_inputs(**sizes)
    options = {name: case[name] for name in ("mode", "with_kl", "temperature")}
    check(inputs, DTYPES[case["dtype"]], noise=noise, **options)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"sm{row.arches[0]}-{8 * row.itemsize}bit")
@pytest.mark.parametrize("mode", ["soft", "reinmax"])  # which take all sizes of a row between them
def test_every_launch_row(row, mode):
    dtype = torch.float32 if row.itemsize == 4 else torch.bfloat16
    launch = pick_gumbel_codebook(dtype, row.arches[0])
    assert launch == row.launch
    widest = max(sizes.block_c for sizes in launch)
    rows = max(sizes.block_m for sizes in launch)
    inputs, noise = make_inputs(2 * launch.forward.block_n - 5, widest + 8, 5, (1, rows // 2 + 3))
    check(inputs, dtype, mode=mode, noise=noise, with_kl=True, launch=launch)


def test_the_table_has_a_row_for_every_architecture_and_dtype():
    for arch, dtype in itertools.product((80, 86, 87, 89, 90, 100, 103, 110, 120, 121), DTYPES.values()):
        assert isinstance(pick_gumbel_codebook(dtype, arch), Launch)
    with pytest.raises(NotImplementedError, match=r"no launch sizes for torch\.float64"):
        pick_gumbel_codebook(torch.float64, 90)


# -- noise

SEEDS = [0, 1, 0x0123456789ABCDEF, 2**63 + 5, 2**64 - 1]


@pytest.mark.parametrize("first_row", [0, 2**31 - 9, 2**32 - 20])
@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_those_of_the_oracle(seed, first_row):
    seeds = rng.seeds_to_tensor(seed)
    found, _ = drawn(seeds, first_row, 20, 37)
    positions = torch.arange(first_row, first_row + 20)
    assert torch.equal(found, oracle_words(seeds, positions, rng.Stream.VAE, 37))


@triton.jit
def _gumbel_of(words_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, gumbel(tl.load(words_ptr + offs).to(tl.uint32)))


def test_noise_is_finite_and_near_the_exact_one_at_every_end():
    """Words: both ends of their range, everything in between."""
    ends = torch.arange(2**16) << 9
    found = torch.cat([ends, 0xFFFFFFFF - ends, torch.arange(2**16) << 16])
    noise = torch.empty(len(found))
    _gumbel_of[(len(found) // 4096,)](found, noise, BLOCK=4096)
    u = rng.uniform(found)
    exact, own = -torch.log(-torch.log(u.double())), -torch.log(-torch.log(u))
    for part in (exact.abs() < 1, exact.abs() >= 1):
        assert_within_budget(noise[part], exact[part], own[part])


@every_mode
def test_a_seed_gives_the_bits_that_its_noise_written_out_gives(mode):
    inputs, _ = make_inputs()
    seed, first_row = rng.seeds_to_tensor(2**64 - 3), 2**32 - 30
    noise = drawn(seed, first_row, 30, 37)[1].unflatten(0, (2, 3, 5)).permute(0, 3, 1, 2)
    dembeds = torch.randn(2, 20, 3, 5, generator=torch.Generator().manual_seed(1))
    written = run(inputs, dembeds, mode=mode, with_kl=True, noise=noise)
    assert_same_bits(run(inputs, dembeds, mode=mode, with_kl=True, seed=seed, first_row=first_row), written)


@every_mode
def test_rows_draw_by_their_number_in_the_whole_batch(mode):
    (features, *others), _ = make_inputs()
    seed = rng.seeds_to_tensor(7)
    whole = bottleneck(mode=mode, seed=seed)(features, *others)
    part = bottleneck(mode=mode, seed=seed, first_row=15)(features[1:], *others)
    for a, b in zip(whole[:3], part[:3], strict=True):
        assert torch.equal(a[1:], b)


# -- meaning


def test_kl_of_every_row():
    inputs, noise = make_inputs(n_codes=70)
    for dtype, scale in ((torch.float32, 0.01), (torch.float32, 30.0), (torch.bfloat16, 1.0)):
        features, weight, bias, codebook = (x.to(dtype) for x in inputs)
        features = features * scale
        call = prepare(
            features, weight, bias, codebook, noise, None, first_row=0, temperature=1.0, mode="straight_through"
        )
        _, _, _, kl, statistics = kernels.launch_forward(call, with_kl=True, launch=SMALL)
        rows = statistics[DIVERGENCE.value]
        assert torch.equal(kl, rows.sum())
        exact, own = (kl_rows(features, weight, bias, codebook, noise, kind) for kind in (torch.float64, dtype))
        assert_within_budget(rows, exact, own)


def kl_rows(features, weight, bias, codebook, noise, dtype):
    """The oracle's KL of each row alone, [B h w]."""
    function = reference(mode="soft", temperature=1.0, noise=noise[:1, :, :1, :1], with_kl=True)
    others = [x.to(dtype) for x in (weight, bias, codebook)]
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
    return torch.stack([function(pixel[None, :, None, None], *others)[3] for pixel in pixels])


def test_ties_go_to_the_lowest_code():
    """Every logit four times: in one quad, in two, in two blocks."""
    (features, weight, _, codebook), _ = make_inputs(n_codes=130)
    for same in (torch.arange(130) // 4, torch.arange(130) % 7, torch.arange(130) % 65):
        tied = weight[same]
        noise = torch.zeros(2, 130, 3, 5)
        _, codes, noisy_codes, _ = bottleneck(mode="straight_through", noise=noise)(features, tied, None, codebook)
        logits = torch.einsum("bfyx,kf->byxk", features.double(), tied.double())
        assert torch.equal(codes, logits.argmax(-1)) and torch.equal(noisy_codes, codes)
        assert torch.equal(kernels.launch_codes(features, tied, None, launch=SMALL), codes)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_codes_alone_are_those_of_the_forward_pass(dtype):
    inputs, noise = make_inputs(n_codes=70, n_features=24, bias=dtype != torch.float32)
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    _, codes, _, _ = bottleneck(mode="straight_through", noise=noise)(*inputs)
    assert torch.equal(kernels.launch_codes(*inputs[:3], launch=SMALL), codes)


@every_mode
def test_large_logits_and_low_temperature_stay_finite_and_within_the_budget(mode):
    (features, weight, bias, codebook), noise = make_inputs()
    inputs = (features * 3000, weight, bias, codebook)
    check(inputs, torch.float32, mode=mode, noise=noise, with_kl=True, temperature=1 / 16)


@pytest.mark.parametrize("n_codes, grid, batch", [(1, (1, 1), 1), (2, (3, 5), 2)], ids=["one", "two"])
@every_mode
def test_fewest_codes(mode, n_codes, grid, batch):
    inputs, noise = make_inputs(n_codes, 8, 3, grid, batch=batch)
    check(inputs, torch.float32, mode=mode, noise=noise, with_kl=True)


def test_forward_and_backward_by_their_table():
    (features, weight, bias, codebook), noise = make_inputs(dim=8)
    options = {"first_row": 0, "temperature": 0.9, "mode": "soft"}
    embeds, codes, noisy_codes, kl, statistics = kernels.forward(
        features, weight, bias, codebook, noise, None, with_kl=True, **options
    )
    assert torch.equal(kernels.codes(features, weight, bias), codes)
    gradients = kernels.backward(
        embeds, None, features, weight, None, codebook, noise, None, embeds, noisy_codes, statistics, **options
    )
    assert [list(x.shape) for x in gradients] == [[2, 5, 3, 5], [37, 5], [0], [37, 8]]
    assert kl.shape == () and kl.dtype == torch.float32


# -- what a kernel must not do


def run(inputs, dembeds, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    embeds, codes, noisy_codes, kl = bottleneck(**options)(*leaves)
    roots = [embeds, kl] if options["with_kl"] else [embeds]
    gradients = torch.autograd.grad(roots, leaves, [dembeds, torch.tensor(0.3)][: len(roots)])
    return [embeds.detach(), codes, noisy_codes, kl.detach(), *gradients]


def assert_same_bits(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}: {(a != b).sum()} of {a.numel()} differ"


@every_mode
def test_twice_the_same_bits_and_inputs_untouched(mode):
    inputs, noise = make_inputs(layout="inside")
    inputs = [x.bfloat16() for x in inputs]
    dembeds = laid_out(torch.randn(2, 20, 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(), "inside")
    before = [x.clone() for x in (*inputs, noise, dembeds)]
    once, again = (run(inputs, dembeds, mode=mode, with_kl=True, noise=noise) for _ in range(2))
    assert_same_bits(once, again)
    assert_same_bits((*inputs, noise, dembeds), before)


def test_without_a_gradient_of_the_kl_the_kl_changes_nothing():
    inputs, noise = make_inputs(n_codes=9)
    dembeds = torch.randn(2, 20, 3, 5, generator=torch.Generator().manual_seed(1))
    for mode in ("soft", "reinmax"):
        call = prepare(*inputs, noise, None, first_row=0, temperature=0.9, mode=mode)
        with_kl, without = (kernels.launch_forward(call, with_kl=kl, launch=SMALL) for kl in (True, False))
        assert without[3] == 0
        gradients = [
            kernels.launch_backward(dembeds, None, embeds, noisy_codes, statistics, call, launch=SMALL)
            for embeds, _, noisy_codes, _, statistics in (with_kl, without)
        ]
        assert_same_bits(with_kl[:3], without[:3])
        assert_same_bits(*gradients)


def test_results_lie_as_rows():
    inputs, noise = make_inputs()
    embeds, *_, dfeatures, _, _, _ = run(inputs, torch.ones(2, 20, 3, 5), mode="soft", with_kl=True, noise=noise)
    for x in (embeds, dfeatures):
        assert x.permute(0, 2, 3, 1).is_contiguous()
