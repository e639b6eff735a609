"""The plot of a sweep, from rows: time against the side of the grid, beside what the ceilings allow.

A row belongs to a sweep where its sizes say `sweep`, the name of the size that grows. Dashed lines are the time that
the machine's measured matrix product needs: for the pairs that a pattern allows (a share of it is in every row), and
for every key up to the query, (n + 1) n / 2 pairs, which a kernel that knows no pattern computes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.tables import seconds

DPI = 120
COLOURS = {"axial_row": "tab:blue", "axial_col": "tab:orange", "conv_like": "tab:green"}
PEER = "tab:gray"
FLOPS_A_PAIR = 4  # forward, a channel

Points = list[tuple[int, float]]


def is_swept(row: Row) -> bool:
    """Whether the row is a point of a curve."""
    return "sweep" in (row["sizes"] or {})


def curves(rows: Iterable[Row], folder: Path) -> list[Path]:
    """One PNG an (op, mode, dtype, device) of the timed rows of a sweep."""
    from matplotlib.figure import Figure  # a second to import: only plotting pays it

    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        parts = row["op"], row["mode"], f"sweep_{row['sizes']['sweep']}", row["dtype"], row["device"]["kind"]
        sweeps.setdefault("-".join(parts), []).append(row)
    paths = []
    for name, members in sweeps.items():
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        _draw(figure.add_subplot(), members)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def _draw(axes: Any, members: list[Row]) -> None:
    first = members[0]
    baseline = [row for row in members if row["impl"] == first["baseline"]]
    ours = [row for row in members if row["impl"] != first["baseline"]]
    for impl, pattern in dict.fromkeys((row["impl"], row["sizes"]["pattern"]) for row in ours):
        mine = [row for row in ours if (row["impl"], row["sizes"]["pattern"]) == (impl, pattern)]
        colour = COLOURS.get(pattern)
        _line(axes, _points(mine, seconds), label=f"{pattern} ({impl})", color=colour, marker="o")
        _line(axes, _points(mine, _exact_s), color=colour, linestyle="--", linewidth=1)
    if baseline:
        _line(axes, _points(baseline, seconds), label=f"{first['baseline']}: N$^2$", color=PEER, marker="s")
        _line(axes, _points(baseline, _causal_s), color=PEER, linestyle="--", linewidth=1)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="exact work / measured matrix product")
    sides = sorted({row["sizes"][row["sizes"]["sweep"]] for row in members})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.set_xlabel("side of the image grid, tokens")
    axes.set_ylabel("milliseconds")
    sizes = first["sizes"]
    axes.set_title(
        f"{first['op']} {first['mode']}, {first['dtype']}, batch {sizes['batch']}, {sizes['heads']} heads of"
        f" {sizes['head_dim']}, {sizes['text_len']} text tokens\n{first['device']['name']},"
        f" {first['device']['threads']} threads, torch {first['versions']['torch']}",
        fontsize=9,
    )
    axes.legend(fontsize=8)


def _line(axes: Any, points: Points, **style: Any) -> None:
    axes.plot([x for x, _ in points], [1e3 * y for _, y in points], markersize=4, **style)


def _points(rows: list[Row], of: Any) -> Points:
    """(swept size, median of the rows at it), ascending."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["sizes"][row["sizes"]["sweep"]], []).append(of(row))
    return sorted((size, statistics.median(values)) for size, values in found.items())


def _exact_s(row: Row) -> float:
    """Seconds that the ceilings allow for the pairs of the pattern."""
    return seconds(row) * row["values"]["of_ceiling"]["value"] / 100


def _causal_s(row: Row) -> float:
    """Seconds that the matrix product needs for every key up to the query."""
    sizes = row["sizes"]
    pairs = sizes["batch"] * sizes["heads"] * sizes["n"] * (sizes["n"] + 1) / 2
    return FLOPS_A_PAIR * sizes["head_dim"] * pairs / (row["ceilings"]["matrix_product"]["value"] * 1e12)
