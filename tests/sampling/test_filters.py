"""The filters of a call as one object; what they do is the op's (tests/ops/test_choose_token_op.py)."""

import pytest
import torch

from dalle_fast import rng
from dalle_fast.functional import choose_token
from dalle_fast.sampling.filters import Filters


def test_filters_are_those_of_the_op():
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    stream = rng.Stream.TEXT_SAMPLING
    for settings in ({}, {"temperature": 0.5}, {"top_k": 3, "temperature": 2.0}, {"top_p": 0.5}, {"temperature": 0}):
        tokens = Filters(**settings).token(logits, list(range(64)), 7, stream)
        assert torch.equal(tokens, choose_token(logits, seeds=list(range(64)), positions=7, stream=stream, **settings))


def test_what_leaves_one_token_needs_no_noise():
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    for filters in (Filters(temperature=0), Filters(top_k=1)):
        assert torch.equal(filters.token(logits, list(range(64)), 7, rng.Stream.TEXT_SAMPLING), logits.argmax(dim=-1))


def test_the_original_threshold_counts_the_whole_vocabulary():
    assert Filters.from_threshold(0.5, 18448, temperature=1, top_k=None, top_p=None).top_k == 9224
    assert Filters.from_threshold(0.9999, 122, temperature=1, top_k=None, top_p=None).top_k == 1
    assert Filters.from_threshold(0.9999, 122, temperature=1, top_k=7, top_p=None).top_k == 7


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": float("inf")}, ValueError, "generate: temperature must be in"),
        ({"top_k": 0}, ValueError, "generate: top_k must be at least 1"),
        ({"top_p": 0.0}, ValueError, "generate: top_p must be in"),
    ],
)
def test_impossible_settings_are_refused_in_words(settings, error, message):
    with pytest.raises(error, match=message):
        Filters(**settings)


def test_impossible_threshold_is_refused_in_words():
    with pytest.raises(ValueError, match=r"filter_thres must be in 0\.\.1"):
        Filters.from_threshold(1.5, 10, temperature=1, top_k=None, top_p=None)
