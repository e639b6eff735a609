"""What the tests of ops share."""

import pytest
from implementations import skip_without


@pytest.fixture(params=["reference", "cpu"])
def impl(request):
    """Each implementation of sparse_attention that takes every head width."""
    skip_without(request.param)
    return request.param


@pytest.fixture(params=["cpu"])
def kernel(request):
    """Each implementation that must be measured against the oracle."""
    skip_without(request.param)
    return request.param
