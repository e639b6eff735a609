"""A measurement is one JSON line; tables and plots know nothing else.

| key | what |
|---|---|
| run | UTC time the run began: rows of one run were measured side by side, ratios across runs are not reported |
| op, impl, mode, case, dtype | what was measured; `sizes` spells the case out |
| values | {name: {"value", "unit"}}: median, p20, p80; some of bandwidth, throughput, rate, step, of_ceiling, peak... |
| pieces | {piece: median seconds} where the job was timed in pieces |
| extrapolated | null, or in words what the whole was computed from |
| rounds | samples behind the percentiles |
| cold | were caches flushed before each call |
| baseline | the impl ratios refer to |
| ceilings | {kind: {"value", "unit", "at"}} measured in the same run |
| smoke | true: verified at a toy size, nothing was timed |
| device, versions, commit, dirty, load, time | where, with what, when; load is the system's just before the run |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

KEYS = (
    "run", "op", "impl", "mode", "case", "sizes", "dtype", "values", "pieces", "extrapolated", "rounds", "cold",
    "baseline", "ceilings", "smoke", "device", "versions", "commit", "dirty", "load", "time",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parent / "results"


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds one line a row to `path`, made where missing.

    Raises: ValueError (a row with a key too many or too few: tables would silently lose it).
    """
    lines = []
    for row in rows:
        if set(row) != set(KEYS):
            raise ValueError(f"rows: a row must have the keys {', '.join(KEYS)}, differs in {set(row) ^ set(KEYS)}.")
        lines.append(json.dumps({key: row[key] for key in KEYS}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def load(source: Path = RESULTS) -> list[Row]:
    """The rows of one `.jsonl` file, or of all in a folder, oldest run first.

    Raises: ValueError (a line that is no row: file and line number are named).
    """
    rows = []
    for path in sorted(source.glob("*.jsonl")) if source.is_dir() else [source]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"rows: {path.name}:{number} must be a JSON line, got {line[:60]!r}.") from error
            if not isinstance(row, dict) or set(row) != set(KEYS):
                raise ValueError(f"rows: {path.name}:{number} must have the keys {', '.join(KEYS)}. Remove or redo it.")
            rows.append(row)
    return sorted(rows, key=lambda row: row["run"])


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each (op, case, dtype, device) the rows of its newest run only, in the order measured."""
    newest: dict[tuple[str, ...], str] = {}
    rows = list(rows)
    for row in rows:
        newest[group(row)] = max(newest.get(group(row), ""), row["run"])
    return [row for row in rows if row["run"] == newest[group(row)]]


def group(row: Row) -> tuple[str, ...]:
    """What rows must share to stand side by side in a table."""
    return row["op"], row["mode"], row["case"], row["dtype"], row["device"]["name"]
