"""What the tests of models share."""

import pytest
from implementations import auto_takes, skip_without


@pytest.fixture(params=["reference", "cpu"])
def attention(request, monkeypatch):
    """The implementation on which every attention of the test runs."""
    skip_without(request.param)
    auto_takes(monkeypatch, request.param)
    return request.param
