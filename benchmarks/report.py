"""Tables and plots from rows, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks import decode_curves
from benchmarks.curves import DPI, curves, is_swept
from benchmarks.rows import Row, group, latest
from benchmarks.tables import MIB, duration, markdown, seconds

COLUMNS = (
    "impl",
    "median",
    "p20..p80",
    "vs baseline",
    "rate",
    "a step",
    "GB/s",
    "TFLOP/s",
    "% of ceiling",
    "peak",
    "notes",
)


def table(rows: Iterable[Row]) -> str:
    """Markdown: one table a (benchmark, case, dtype, device), its newest run, the baseline's ratio beside each time."""
    parts = []
    for members in _groups(latest(rows)).values():
        body = [_cells(row, _baseline_seconds(members)) for row in members]
        parts.append("\n".join([_title(members[0]), "", *markdown([COLUMNS, *body]), "", _footnote(members)]))
    return "\n\n".join(parts) if parts else "No rows yet: python -m benchmarks measures some."


def plot(rows: Iterable[Row], folder: Path) -> list[Path]:
    """One PNG a (benchmark, case, dtype, device): a bar an implementation, whiskers p20 to p80, extrapolated hatched.

    Cases of a sweep share one, of curves; decoding has some over batches besides.

    Raises: ValueError (no timed row).
    """
    from matplotlib.figure import Figure  # a second to import: only plotting pays it

    timed = [row for row in latest(rows) if "median" in row["values"]]
    if not timed:
        raise ValueError("plot: rows must hold a timed one, got none. Measure first: python -m benchmarks.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = decode_curves.curves(timed, folder)
    paths += curves([row for row in timed if is_swept(row) and not decode_curves.is_swept(row)], folder)
    for key, members in _groups(row for row in timed if not is_swept(row)).items():
        members = sorted(members, key=lambda row: -seconds(row))
        figure = Figure(figsize=(8, 1.4 + 0.45 * len(members)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(members):
            middle = seconds(row)
            whiskers = [[max(middle - seconds(row, "p20"), 0)], [max(seconds(row, "p80") - middle, 0)]]
            hatch = "//" if row["extrapolated"] else None
            colour = "tab:grey" if row["impl"] == row["baseline"] else "tab:blue"
            axes.barh(place, middle, xerr=whiskers, hatch=hatch, color=colour, edgecolor="white", capsize=3)
            axes.annotate(duration(middle), (middle, place), (6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(members)), [row["impl"] for row in members])
        axes.margins(x=0.15)
        axes.set_xlabel("seconds; hatched: extrapolated")
        axes.set_title(_title(members[0]).lstrip("# "), fontsize=9)
        name = "-".join(part.replace(" ", "_").replace("/", "_") for part in (*key[:4], members[0]["device"]["kind"]))
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def _groups(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    return groups


def _title(row: Row) -> str:
    device = row["device"]
    where = f"{device['name']}, {device['cores']} cores, {device['threads']} threads"
    return f"### {row['op']} {row['case']}, {row['mode']}, {row['dtype']} ({where})"


def _footnote(members: list[Row]) -> str:
    first = members[0]
    commit = (first["commit"] or "no commit")[:10] + (" + changes" if first["dirty"] else "")
    notes = [f"{first['run']}, torch {first['versions']['torch']}, {commit}."]
    ceilings: dict[str, dict] = {}
    for row in members:
        ceilings |= row["ceilings"]
    for kind, ceiling in ceilings.items():
        notes.append(f"{kind} {ceiling['value']:.3g} {ceiling['unit']} ({ceiling['at']}).")
    sources = {row["extrapolated"] for row in members if row["extrapolated"]}
    for source in sorted(sources):
        whose = ", ".join(row["impl"] for row in members if row["extrapolated"] == source)
        notes.append(f"{whose}: extrapolated {source}.")
    return " ".join(notes)


def _cells(row: Row, baseline_s: float | None) -> tuple[str, ...]:
    values = row["values"]
    if "median" not in values:
        return (row["impl"], *[""] * (len(COLUMNS) - 2), "verified, not timed")
    middle = seconds(row)
    notes = [note for note, holds in (("extrapolated", row["extrapolated"]), ("cold", row["cold"])) if holds]
    return (
        row["impl"],
        duration(middle),
        f"{duration(seconds(row, 'p20'))}..{duration(seconds(row, 'p80'))}",
        f"{baseline_s / middle:.2f}x" if baseline_s else "",
        f"{values['rate']['value']:.3g} {values['rate']['unit']}" if "rate" in values else "",
        duration(values["step"]["value"]) if "step" in values else "",
        f"{values['bandwidth']['value']:.3g}" if "bandwidth" in values else "",
        f"{values['throughput']['value']:.3g}" if "throughput" in values else "",
        f"{values['of_ceiling']['value']:.1f}" if "of_ceiling" in values else "",
        _peak(values),
        ", ".join(notes),
    )


def _peak(values: dict) -> str:
    peak = values.get("peak", {}).get("value")
    return "" if peak is None else f"{peak / MIB:.1f} MiB"


def _baseline_seconds(members: list[Row]) -> float | None:
    for row in members:
        if row["impl"] == row["baseline"] and "median" in row["values"]:
            return seconds(row)
    return None
