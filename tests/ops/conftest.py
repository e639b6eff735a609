"""What the tests of ops share."""

import pytest
import torch
from implementations import skip_without


@pytest.fixture(params=["reference", "cpu"])
def impl(request):
    """Each implementation that takes every size, of the op that the test module names as OP."""
    skip_without(request.param, getattr(request.module, "OP", "sparse_attention"))
    return request.param


@pytest.fixture(params=["cpu"])
def kernel(request):
    """Each implementation that must be measured against the oracle, of the op that the test module names as OP."""
    skip_without(request.param, getattr(request.module, "OP", "sparse_attention"))
    return request.param


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
