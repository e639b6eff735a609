"""What the tests of the C++ implementations share."""

import pytest

from dalle_fast import _extension

MISSING = _extension.missing()


@pytest.fixture(params=["baseline"] if MISSING else _extension.instruction_sets())
def isa(request):
    """Each instruction set of this machine, in force while the test runs."""
    if MISSING:
        pytest.skip(MISSING.removeprefix("missing: "))
    before = _extension.isa()
    _extension.set_isa(request.param)
    yield request.param
    _extension.set_isa(before)
