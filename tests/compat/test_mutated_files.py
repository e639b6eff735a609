"""Mutated files end in an error or in data: no crash, no write, no call, memory within twice the file and 256 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BATCH = 500

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux: reads memory from /proc"
)


def survived(first: int, last: int, folder: Path) -> dict[str, int]:
    """Reads the files of these seeds in a process of its own."""
    folder.mkdir(exist_ok=True)
    folders = [HERE, HERE.parent, HERE.parents[1]]
    paths = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "mutated_worker.py"), str(first), str(last)],
        capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"seed {lines[-1] if lines else first}: exit code {done.returncode}\n{done.stderr[-3000:]}"
    )
    return json.loads(lines[-1])


def test_three_hundred_mutated_files(tmp_path):
    counts = survived(0, 300, tmp_path / "a")
    assert counts["data"] > 20 and counts["unreadable"] > 100 and counts["unsafe"] > 2 and counts["known"] > 10
    assert sum(counts[kind] for kind in ("data", "unreadable", "unsafe")) == 300


@pytest.mark.long
@pytest.mark.parametrize("first", range(300, 10_300, 2000))
def test_ten_thousand_mutated_files(first, tmp_path):
    read = 0
    for start in range(first, first + 2000, BATCH):
        counts = survived(start, start + BATCH, tmp_path / "a")
        read += sum(counts[kind] for kind in ("data", "unreadable", "unsafe"))
    assert read == 2000
