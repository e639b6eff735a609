"""Cells and lines that the tables and plots of rows share."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rows import Row

MIB = 2**20


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first line is its head, without the columns in which nobody has anything to say."""
    kept = [i for i in range(len(lines[0])) if any(cells[i] for cells in lines[1:])]
    cut = [[cells[i] for i in kept] for cells in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*cut, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cut]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def seconds(row: Row, name: str = "median") -> float:
    """A time of the row."""
    return float(row["values"][name]["value"])


def duration(value: float) -> str:
    """Seconds in three digits."""
    scale, unit = (1.0, "s") if value >= 1 else (1e3, "ms")
    return f"{value * scale:.3g} {unit}" if value < 100 else f"{value:.0f} s"
