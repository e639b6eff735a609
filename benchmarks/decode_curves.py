"""Plots of decoding, from rows: images a second against the batch, and milliseconds a token against the grid's side.

A dashed line is what the machine's measured ceilings allow for the provider above it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.tables import seconds

DPI = 120
OP, SWEPT, BATCH = "sampler", "grid", "batch"
COLOURS = {
    "ours_cpu": "tab:blue", "ours_cpu_int8": "tab:green", "ours_eager": "tab:olive",
    "static_cache_compiled": "tab:gray", "cycle": "tab:blue", "full": "tab:red", "row": "tab:orange",
}  # fmt: skip
MARKERS = {"float32": "s", "bfloat16": "o"}
OURS = "ours_cpu"


def is_swept(row: Row) -> bool:
    """Whether the row is a point of the curve over grids."""
    return row["op"] == OP and (row["sizes"] or {}).get("sweep") == SWEPT


def curves(rows: Iterable[Row], folder: Path) -> list[Path]:
    """A PNG of grids a (dtype, device), and one of batches a (model, device) that was timed at several."""
    rows = [row for row in rows if row["op"] == OP and row["sizes"]]
    grids: dict[str, list[Row]] = {}
    batches: dict[str, list[Row]] = {}
    for row in rows:
        kind = row["device"]["kind"]
        if is_swept(row):
            grids.setdefault(f"{OP}-sweep_{SWEPT}-{row['dtype']}-{kind}", []).append(row)
        elif BATCH in row["sizes"]:
            model = {name: size for name, size in row["sizes"].items() if name != BATCH}
            batches.setdefault(json.dumps([model, kind]), []).append(row)
    paths = [_drawn(folder / f"{name}.png", members, _draw_grids) for name, members in grids.items()]
    for members in batches.values():
        if len({row["sizes"][BATCH] for row in members}) > 1:
            first = min(members, key=lambda row: row["sizes"][BATCH])
            name = f"{OP}-{first['case']}-{BATCH}-{first['device']['kind']}.png"
            paths.append(_drawn(folder / name, members, _draw_batches))
    return paths


def _drawn(path: Path, rows: list[Row], draw: Callable[[Any, list[Row]], None]) -> Path:
    from matplotlib.figure import Figure  # a second to import: only plotting pays it

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, rows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
    return path


def _draw_batches(axes: Any, rows: list[Row]) -> None:
    for impl, dtype in dict.fromkeys((row["impl"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["impl"], row["dtype"]) == (impl, dtype)]
        style = {"color": COLOURS.get(impl), "marker": MARKERS.get(dtype), "markersize": 4}
        points = images_a_second(mine)
        if len(points) > 1:
            label = impl if impl.endswith("int8") else f"{impl}, {dtype}"
            axes.plot(*zip(*points, strict=True), label=label, **style)
    _ticks(axes, rows, BATCH)
    axes.set_xlabel("pictures of one prompt drawn together")
    axes.set_ylabel("pictures a second")
    axes.set_title(_title(rows[0], f"a picture of {rows[0]['sizes']['grid']}x{rows[0]['sizes']['grid']} tokens"))


def _draw_grids(axes: Any, rows: list[Row]) -> None:
    for impl, pattern in dict.fromkeys((row["impl"], row["sizes"]["pattern"]) for row in rows):
        mine = [row for row in rows if (row["impl"], row["sizes"]["pattern"]) == (impl, pattern)]
        ours = impl == OURS
        style = {"color": COLOURS.get(pattern if ours else impl), "markersize": 4}
        axes.plot(*zip(*token_ms(mine), strict=True), label=f"{impl}, {pattern}", marker="o" if ours else "s", **style)
        if ours:
            axes.plot(*zip(*token_ms(mine, of_ceiling=True), strict=True), linestyle="--", linewidth=1, **style)
    axes.plot([], [], color="black", linestyle="--", linewidth=1, label="what the measured ceilings allow")
    _ticks(axes, rows, SWEPT)
    axes.set_xlabel("side of the image grid, tokens")
    axes.set_ylabel("milliseconds a token")
    axes.set_title(_title(rows[0], f"one picture, {rows[0]['dtype']}"))


def images_a_second(rows: Iterable[Row]) -> list[tuple[int, float]]:
    """(batch, pictures a second), ascending."""
    return sorted((row["sizes"][BATCH], row["sizes"][BATCH] / seconds(row)) for row in rows)


def token_ms(rows: Iterable[Row], *, of_ceiling: bool = False) -> list[tuple[int, float]]:
    """(side, milliseconds a token), ascending; those that the ceilings allow, if asked for."""
    found = []
    for row in rows:
        share = row["values"]["of_ceiling"]["value"] / 100 if of_ceiling else 1.0
        found.append((row["sizes"][SWEPT], 1e3 * row["values"]["step"]["value"] * share))
    return sorted(found)


def _ticks(axes: Any, rows: list[Row], size: str) -> None:
    at = sorted({row["sizes"][size] for row in rows})
    axes.set_xticks(at, [str(one) for one in at])


def _title(row: Row, what: str) -> str:
    sizes, device = row["sizes"], row["device"]
    return (
        f"{row['op']}: {what}, {sizes['depth']} blocks {sizes['dim']} wide, {sizes['text_seq_len']} text tokens\n"
        f"{device['name']}, {device['threads']} threads, torch {row['versions']['torch']}"
    )
