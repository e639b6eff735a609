"""Converting and loading a file hold its weights once."""

from __future__ import annotations

from pathlib import Path

import pytest
from convert_memory import measure

_SPARE = 100 << 20


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: reads memory from /proc")
def test_a_large_file_is_held_once(tmp_path):
    measured = measure(tmp_path, dim=1024, depth=6)
    assert measured["bytes"] > 200 << 20
    assert measured["converting"] < measured["bytes"] + _SPARE
    assert measured["loading"] < measured["bytes"] + _SPARE
