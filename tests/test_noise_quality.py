"""The noise of gumbel_noise and of the fused kernels: distributed as Gumbel, independent, no counter met twice.

Seeds are fixed, so a failure is a defect and no accident. Every threshold is that of a false alarm once in a million:

    Kolmogorov-Smirnov   D <= sqrt(ln(2 / alpha) / (2 n)), valid at any n (Massart); at n = 2**22 it sees a cumulative
                         distribution that is off by 0.0013 anywhere
    chi-square           its exact tail; with 2**17 samples in 6 cells it sees probabilities off by 2.5 % of themselves,
                         with 2**15 in 64 cells by 6 %, with 2**22 in 26 tails by 0.5 %; a cell expects 250 or more
    correlation          |r| <= z / sqrt(n); at n = 2**20 it sees 0.005
"""

import math
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from gumbel_codebook_cases import SEED
from implementations import skip_without

from dalle_fast import DiscreteVAE, dispatch, rng
from dalle_fast.functional import gumbel_codebook, gumbel_noise
from dalle_fast.ops.gumbel_codebook import OP
from dalle_fast.reference.gumbel_noise import words

ALPHA = 1e-6
IMPLS = ["reference", "cpu"]
SEEDS = [0, SEED, 2**64 - 1]
VAE = rng.Stream.VAE


def ks_distance(x: torch.Tensor, cumulative) -> float:
    """The largest distance between the empirical distribution of x and `cumulative`."""
    exact = cumulative(x.flatten().double().sort().values)
    steps = torch.arange(len(exact) + 1, dtype=torch.float64) / len(exact)
    return float(torch.maximum(exact - steps[:-1], steps[1:] - exact).max())


def ks_limit(n: int) -> float:
    return math.sqrt(math.log(2 / ALPHA) / (2 * n))


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The probability of counts at least as far from their expectations."""
    expected = counts.sum() * probabilities.double()
    assert expected.min() >= 250
    distance = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(expected.new_tensor((len(counts) - 1) / 2), distance / 2))


def gumbel_cumulative(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.exp(-x))


def draw(impl: str, seed: int, n_rows: int, n_codes: int, first_row: int = 0, stream: rng.Stream = VAE) -> torch.Tensor:
    skip_without(impl, "gumbel_noise")
    return gumbel_noise(seed, first_row + torch.arange(n_rows), stream, n_codes, impl=impl)


def fused(impl: str, bias: torch.Tensor, n_rows: int, seed: int, *, codebook: torch.Tensor, temperature: float = 1.0):
    """Embeddings [n_rows, D] and noisy codes [n_rows] of rows whose logits are `bias`, drawn inside the op."""
    skip_without(impl, OP)
    embeds, _, noisy_codes, _ = gumbel_codebook(
        torch.zeros(1, 1, 1, n_rows), torch.zeros(len(bias), 1), bias, codebook,
        temperature=temperature, seed=seed, impl=impl,
    )  # fmt: skip
    return embeds[0, :, 0].T, noisy_codes.flatten()


# -- the distribution


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_gumbel(impl, seed):
    noise = draw(impl, seed, 2**9, 2**13)
    assert ks_distance(noise, gumbel_cumulative) <= ks_limit(noise.numel())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_tails_are_gumbels(impl):
    """Where Kolmogorov-Smirnov is blind: cells that end at probabilities 2**-13 .. 1/2 from either end."""
    noise = draw(impl, SEED, 2**9, 2**13)
    edges = 2.0 ** -torch.arange(13, 0, -1, dtype=torch.float64)
    edges = torch.cat((edges, 1 - edges[:-1].flip(0)))
    cells = torch.bucketize(gumbel_cumulative(noise.double()).flatten(), edges)
    probabilities = torch.cat((edges, edges.new_ones(1))).diff(prepend=edges.new_zeros(1))
    assert chi_square_p(torch.bincount(cells, minlength=26), probabilities) >= ALPHA


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_inside_the_op_is_gumbel(impl, seed):
    """Logits of zero and the identity as codebook: log p_i - log p_j = n_i - n_j, whose distribution is logistic."""
    n_codes, n_rows = 64, 2**15
    weights, _ = fused(impl, torch.zeros(n_codes), n_rows, seed, codebook=torch.eye(n_codes))
    logs = weights.double().log()
    # lanes of one counter, of two counters, of the first and the last block
    for one, other in (([0, 20], [1, 22]), ([4, 5], [8, 9]), ([2, 3], [62, 63])):
        differences = logs[:, one] - logs[:, other]
        assert ks_distance(differences, torch.sigmoid) <= ks_limit(differences.numel())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_hard_samples_are_distributed_as_the_softmax(impl, seed):
    logits = torch.tensor([0.0, 1.0, -2.0, 2.5, 0.5, -1.0])
    _, codes = fused(impl, logits, 2**17, seed, codebook=torch.zeros(6, 1))
    counts = torch.bincount(codes, minlength=6)
    assert chi_square_p(counts, logits.double().softmax(0)) >= ALPHA


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flat", [True, False])
def test_hard_samples_of_8192_codes_are_distributed_as_the_softmax(seed, flat):
    """In 64 cells of codes of about equal probability; of flat logits the cells are neighbours."""
    n_codes, cells = 8192, 64
    logits = torch.zeros(n_codes) if flat else torch.randn(n_codes, generator=torch.Generator().manual_seed(0))
    _, codes = fused("cpu", logits, 2**15, seed, codebook=torch.zeros(n_codes, 1))
    p = logits.double().softmax(0)
    order = p.argsort(descending=True, stable=True)
    cell_of = torch.empty(n_codes, dtype=torch.int64)
    cell_of[order] = ((p[order].cumsum(0) - p[order] / 2) * cells).long()
    probabilities = torch.zeros(cells, dtype=torch.float64).index_add_(0, cell_of, p)
    counts = torch.bincount(cell_of[codes], minlength=cells)
    assert chi_square_p(counts, probabilities) >= ALPHA


def test_noise_a_little_wrong_would_be_seen():
    noise = draw("reference", 1, 2**9, 2**13)
    limit = ks_limit(noise.numel())
    for wrong in (noise * 1.01, noise + 0.005):
        assert ks_distance(wrong, gumbel_cumulative) > limit
    logits = torch.tensor([0.0, 1.0, -2.0, 2.5, 0.5, -1.0])
    _, codes = fused("reference", logits, 2**17, 1, codebook=torch.zeros(6, 1))
    counts = torch.bincount(codes, minlength=6)
    assert chi_square_p(counts, (logits.double() * 1.03).softmax(0)) < ALPHA


# -- independence


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lag", [1, 2, 31, 32, 33, 1024])
def test_noise_of_pixels_rows_and_samples_is_uncorrelated(impl, lag):
    """Of positions at the distance of neighbours in a 32x32 grid, and of the same place in two samples of a batch."""
    u = gumbel_cumulative(draw(impl, 7, 2**12 + 1024, 256).double())
    assert_uncorrelated(u[:-lag], u[lag:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64])
def test_noise_of_codes_is_uncorrelated(impl, lag):
    u = gumbel_cumulative(draw(impl, 7, 2**13, 256).double())
    assert_uncorrelated(u[:, :-lag], u[:, lag:])


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_of_steps_and_streams_is_uncorrelated(impl):
    """Seeds of one, two and 2**32 apart, as a loop may number its steps; fresh ones; the same seed in every stream."""
    torch.manual_seed(0)
    fresh = [int(rng.draw_seed()) for _ in range(2)]
    base = draw(impl, 3, 2**12, 256)
    others = [draw(impl, seed, 2**12, 256) for seed in (4, 5, 3 + 2**32, *fresh)]
    others += [draw(impl, 3, 2**12, 256, stream=stream) for stream in rng.Stream if stream != VAE]
    drawn = [gumbel_cumulative(noise.double()) for noise in (base, *others)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert_uncorrelated(one, other)


def assert_uncorrelated(one: torch.Tensor, other: torch.Tensor) -> None:
    n = one.numel()
    assert n >= 2**20
    r = float(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1])
    assert abs(r) <= NormalDist().inv_cdf(1 - ALPHA / 2) / math.sqrt(n), f"correlation {r:.2g}"


# -- no counter twice


@pytest.fixture
def draws(monkeypatch):
    """(seed, first row, rows) of every call of gumbel_codebook that draws, as it reaches the implementation."""
    seen = []
    reference = dispatch.registered()[OP]["reference"]

    def spy(features, weight, bias, codebook, noise, seed, first_row, *rest):
        batch, _, height, width = features.shape
        seen.append((int(seed), first_row, batch * height * width))
        return reference.function(features, weight, bias, codebook, noise, seed, first_row, *rest)

    monkeypatch.setitem(dispatch._OPS, OP, {"reference": replace(reference, function=spy)})
    return seen


def set_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)


def assert_no_counter_twice(draws, n_codes):
    """Of one seed the spans of rows are apart, and so are the words: blocks of four, beside the other streams'."""
    for (seed, first, rows), (next_seed, next_first, _) in pairwise(sorted(draws)):
        assert seed != next_seed or first + rows <= next_first, "rows of two calls meet"
    blocks = [
        words(torch.tensor([seed]), first + torch.arange(rows), stream, n_codes).reshape(-1, 4)
        for seed, first, rows in draws
        for stream in rng.Stream
    ]
    assert len(torch.cat(blocks).unique(dim=0)) == sum(map(len, blocks))


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_vae_meets_no_counter_twice(ranks, draws, monkeypatch):
    """Over pixels, batch, steps, accumulation and ranks; all ranks start from the same seed, the worst they can do."""
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=24, codebook_dim=8, num_layers=2, hidden_dim=8, kl_div_loss_weight=0.1)
    steps, accumulation, n_rows = 3, 2, 5 * 4 * 4
    for rank in range(ranks):
        set_rank(monkeypatch, rank, ranks)
        torch.manual_seed(9)
        for _ in range(steps * accumulation):
            vae(torch.full((5, 3, 16, 16), 0.5), return_loss=True).backward()
    assert len(draws) == ranks * steps * accumulation and {rows for *_, rows in draws} == {n_rows}
    assert len({seed for seed, *_ in draws}) == steps * accumulation
    assert all(first >= 0 and first + rows <= 2**32 for _, first, rows in draws)
    assert_no_counter_twice(draws, n_codes=24)


def test_counters_met_twice_would_be_seen(draws):
    """The check above, on what a trainer could do wrong: one seed for two steps."""
    vae = DiscreteVAE(image_size=16, num_tokens=24, codebook_dim=8, num_layers=2, hidden_dim=8)
    for _ in range(2):
        vae(torch.zeros(1, 3, 16, 16), seed=4)
    assert draws[0] == draws[1] == (4, 0, 16)
    with pytest.raises(AssertionError, match="rows of two calls meet"):
        assert_no_counter_twice(draws, n_codes=24)


@pytest.mark.parametrize(
    ("rank", "ranks", "first"), [(0, 1, 0), (1, 2, 2**31), (2, 3, 2 * 1431655765), (7, 8, 7 * 2**29)]
)
def test_ranks_number_their_rows_apart(rank, ranks, first, monkeypatch):
    assert rng.first_row_of_rank(2**32) == 0
    set_rank(monkeypatch, rank, ranks)
    assert rng.first_row_of_rank(10) == rng.first_row_of_rank(2**32 // ranks) == first
    with pytest.raises(ValueError) as raised:
        rng.first_row_of_rank(2**32 // ranks + 1)
    assert str(raised.value) == (
        f"first_row_of_rank: rows must be at most {2**32 // ranks}, the share of one of {ranks} ranks, got"
        f" {2**32 // ranks + 1}. Split the batch."
    )
