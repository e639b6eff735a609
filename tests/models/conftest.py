"""What the tests of models share."""

import functools

import pytest
from implementations import auto_takes, skip_without

from dalle_fast import functional


@pytest.fixture(params=["reference", "cpu"])
def attention(request, monkeypatch):
    """The implementation on which every attention of the test runs."""
    skip_without(request.param)
    auto_takes(monkeypatch, request.param)
    return request.param


@pytest.fixture
def bottleneck_takes(monkeypatch):
    """A function: from its call on, DiscreteVAE runs gumbel_codebook and codebook_indices on the implementation."""

    def take(impl):
        for op in (functional.gumbel_codebook, functional.codebook_indices):
            skip_without(impl, op.__name__)
            monkeypatch.setattr(f"dalle_fast.models.dvae.{op.__name__}", functools.partial(op, impl=impl))

    return take


@pytest.fixture(params=["reference", "cpu", "triton"])
def bottleneck(request, bottleneck_takes):
    """The implementation on which every gumbel_codebook and codebook_indices of a DiscreteVAE runs."""
    bottleneck_takes(request.param)
    return request.param
