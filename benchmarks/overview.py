"""One line a case, from rows: our kernel, how many times as long every peer takes, and what it needs at its peak.

Only for benchmarks of ops with kernels of ours; ratios are of medians of one run, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.rows import Row, group, latest
from benchmarks.tables import MIB, duration, markdown, seconds

KERNELS = ("cuda", "triton", "cpu")  # ours: the first of these that was measured


def overview(rows: Iterable[Row]) -> str:
    """Markdown: a table an (op, device); empty where no case has a time of ours."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in latest(rows):
        if "median" in row["values"]:
            cases.setdefault(group(row), {})[row["impl"]] = row
    tables: dict[tuple[str, str], list[tuple[Row, dict[str, Row]]]] = {}
    for members in cases.values():
        ours = next((members[name] for name in KERNELS if name in members), None)
        if ours is not None:
            tables.setdefault((ours["op"], ours["device"]["name"]), []).append((ours, members))
    return "\n\n".join(_one_table(*key, every) for key, every in tables.items())


def _one_table(op: str, device: str, every: list[tuple[Row, dict[str, Row]]]) -> str:
    peers = list(dict.fromkeys(name for _, members in every for name in members if name not in KERNELS))
    ratios = (f"{peer} / ours" for peer in peers)
    head = ("case", "mode", "dtype", "ours", *ratios, "% of ceiling", "peak", "of result", "beyond")
    body = [_line(ours, members, peers) for ours, members in every]
    runs = dict.fromkeys(f"{ours['run']}, {(ours['commit'] or 'no commit')[:10]}" for ours, _ in every)
    threads = "/".join(dict.fromkeys(str(ours["device"]["threads"]) for ours, _ in every))
    return "\n".join(
        [
            f"### {op}: ours beside the others ({device}, {threads} threads)",
            "",
            *markdown([head, *body]),
            "",
            "NAME / ours: how many times as long NAME takes. of result: the peak over the size of the results; beyond:"
            " what it exceeds them by.",
            f"{'; '.join(runs)}.",
        ]
    )


def _line(ours: Row, members: dict[str, Row], peers: list[str]) -> tuple[str, ...]:
    values = ours["values"]
    peak, beyond = (values.get(name, {}).get("value") for name in ("peak", "peak_beyond_result"))
    return (
        ours["case"],
        ours["mode"],
        ours["dtype"],
        f"{duration(seconds(ours))} ({ours['impl']})",
        *(f"{seconds(members[peer]) / seconds(ours):.2f}" if peer in members else "" for peer in peers),
        f"{values['of_ceiling']['value']:.1f}" if "of_ceiling" in values else "",
        "" if peak is None else f"{peak / MIB:.1f} MiB",
        f"{values['peak_of_result']['value']:.2f}x" if "peak_of_result" in values else "",
        "" if beyond is None else f"{beyond / MIB:.1f} MiB",
    )
