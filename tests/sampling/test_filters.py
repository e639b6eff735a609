"""Filters against a sorting oracle, ties included; the draw against softmax."""

import math

import pytest
import torch

from dalle_fast import rng
from dalle_fast.ops.gumbel_noise import gumbel_noise
from dalle_fast.sampling.filters import Filters

# chi-square of 255 degrees of freedom exceeds this with probability 1e-6 (Wilson-Hilferty)
N_CODES, N_DRAWS = 256, 40_000


def kept_by_sorting(logits, top_k, temperature, top_p):
    """Which tokens stay, one row, by sorting and walking down."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k is not None and top_k < len(order):
        last = logits[order[top_k - 1]]
        order = [i for i in order if logits[i] >= last]
    if top_p is not None and top_p < 1:
        weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
        total, reached, kept = sum(weights), 0.0, []
        for i, weight in zip(order, weights, strict=True):
            if reached / total >= top_p and logits[i] < logits[kept[-1]]:
                break
            kept.append(i)
            reached += weight
        order = kept
    return set(order)


@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("levels", [3, 1000])
def test_filters_keep_what_sorting_keeps(top_k, top_p, temperature, levels):
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(levels, (4, 23), generator=generator).double() * (6 / levels)  # 3 levels: many ties
    filtered = Filters(temperature, top_k, top_p).filtered(logits)
    for row, out in zip(logits, filtered, strict=True):
        kept = kept_by_sorting(row.tolist(), top_k, temperature, top_p)
        assert set(out.isfinite().nonzero().flatten().tolist()) == kept
        assert torch.equal(out[sorted(kept)], row[sorted(kept)] / temperature)


def test_temperature_zero_takes_the_most_likely_and_the_lowest_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    filters = Filters(temperature=0)
    assert not filters.needs_noise
    assert filters.choose(logits, None).tolist() == [1, 0]


def test_the_original_threshold_counts_the_whole_vocabulary():
    assert Filters.from_threshold(0.5, 18448, temperature=1, top_k=None, top_p=None).top_k == 9224
    assert Filters.from_threshold(0.9999, 122, temperature=1, top_k=None, top_p=None).top_k == 1
    assert Filters.from_threshold(0.9999, 122, temperature=1, top_k=7, top_p=None).top_k == 7


def test_draws_follow_softmax():
    """Chi-square of 40,000 draws against softmax, at a fixed seed; fails with probability 1e-6 for a right sampler."""
    logits = torch.randn(N_CODES, generator=torch.Generator().manual_seed(0)) * 1.5
    temperature = 0.8
    noise = gumbel_noise(1234, torch.arange(N_DRAWS), rng.Stream.IMAGE_SAMPLING, N_CODES)
    drawn = Filters(temperature).choose(logits.expand(N_DRAWS, -1), noise)
    expected = (logits.double() / temperature).softmax(-1) * N_DRAWS
    seen = drawn.bincount(minlength=N_CODES).double()
    rare = expected < 5
    expected, seen = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (expected, seen))
    statistic = float(((seen - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    quantile = 4.753  # of the normal distribution, at 1 - 1e-6
    limit = degrees * (1 - 2 / (9 * degrees) + quantile * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit, f"chi-square {statistic:.0f} of {degrees} degrees of freedom, limit {limit:.0f}"
    wrong = drawn.bincount(minlength=N_CODES).roll(1).double()[~rare]
    assert float(((wrong - expected[:-1]) ** 2 / expected[:-1]).sum()) > limit


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 2.5}, TypeError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
    ],
)
def test_impossible_settings_are_refused_in_words(settings, error, message):
    with pytest.raises(error, match=message):
        Filters(**settings)


def test_impossible_threshold_is_refused_in_words():
    with pytest.raises(ValueError, match=r"filter_thres must be in 0\.\.1"):
        Filters.from_threshold(1.5, 10, temperature=1, top_k=None, top_p=None)
