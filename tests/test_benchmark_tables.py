"""Tables and plots of benchmarks are made of rows, and of nothing else."""

from pathlib import Path

import pytest

from benchmarks import curves, report, rows
from benchmarks.overview import overview


def written_row(impl: str, seconds: float, *, run_id: str = "2026-01-02T00:00:00Z", extrapolated: str | None = None):
    """A row written by hand: what tables and plots may rely on."""
    return dict.fromkeys(rows.KEYS) | {
        "run": run_id, "op": "answer", "impl": impl, "mode": "forward", "case": "real", "dtype": "float32",
        "cold": True,        "values": {name: {"value": seconds, "unit": "s"} for name in ("median", "p20", "p80")},
        "extrapolated": extrapolated, "baseline": "slow", "ceilings": {}, "commit": "c0ffee", "dirty": False,
        "device": {"kind": "cpu", "name": "Abacus", "cores": 2, "threads": 2}, "versions": {"torch": "2"},
    }  # fmt: skip


def test_table_is_made_of_rows_of_the_newest_run() -> None:
    old = written_row("slow", 50.0, run_id="2025-01-02T00:00:00Z")
    text = report.table([old, written_row("slow", 8.0, extrapolated="from two tokens"), written_row("fast", 0.5)])
    cells = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "16.00x" in cells["fast"] and "500 ms" in cells["fast"]
    assert "1.00x" in cells["slow"] and "extrapolated" in cells["slow"]
    assert "50 s" not in text
    assert "Abacus" in text and "c0ffee" in text and "slow: extrapolated from two tokens." in text


def test_table_of_nothing_says_what_to_do() -> None:
    assert "python -m benchmarks" in report.table([])


def test_plot_is_made_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    paths = report.plot([written_row("slow", 8.0, extrapolated="from two"), written_row("fast", 0.5)], tmp_path)
    assert [path.name for path in paths] == ["answer-forward-real-float32-cpu.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="got none"):
        report.plot([written_row("slow", 8.0) | {"values": {}}], tmp_path)


def test_overview_sets_ours_beside_each_peer() -> None:
    ours = written_row("cpu", 0.25)
    ours["values"] |= {"peak": {"value": 3 * 2**20, "unit": "B"}, "peak_of_result": {"value": 1.5, "unit": "x"}}
    ours["values"]["peak_beyond_result"] = {"value": 2**20, "unit": "B"}
    text = overview([written_row("slow", 2.0), ours, written_row("fast", 0.125)])
    head, _, line = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(head.split("|"), line.split("|"), strict=True))
    found = {key.strip(): cell.strip() for key, cell in cells.items() if key.strip()}
    assert found == {
        "case": "real", "mode": "forward", "dtype": "float32", "ours": "250 ms (cpu)", "slow / ours": "8.00",
        "fast / ours": "0.50", "peak": "3.0 MiB", "of result": "1.50x", "beyond": "1.0 MiB",
    }  # fmt: skip
    assert overview([written_row("slow", 2.0), written_row("fast", 0.5)]) == ""


def swept_row(impl: str, side: int, pattern: str, seconds: float) -> rows.Row:
    sizes = {"batch": 1, "heads": 2, "n": side * side, "head_dim": 4, "text_len": 1, "grid": [side, side]}
    row = written_row(impl, seconds) | {
        "case": f"grid{side}_sweep_{pattern}",
        "sizes": sizes | {"pattern": pattern, "sweep": "side", "side": side},
        "ceilings": {"matrix_product": {"value": 2.0, "unit": "TFLOP/s", "at": "float32"}},
    }
    row["values"]["of_ceiling"] = {"value": 40.0, "unit": "%"}
    return row


def test_sweep_is_drawn_as_one_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    swept = [
        swept_row(impl, side, pattern, side**power * 1e-6)
        for side in (16, 32)
        for pattern in ("axial_row", "conv_like")
        for impl, power in (("cpu", 2), ("slow", 4))
    ]
    paths = report.plot([*swept, written_row("slow", 8.0)], tmp_path)
    assert [path.name for path in paths] == [
        "answer-forward-sweep_side-float32-cpu.png",
        "answer-forward-real-float32-cpu.png",
    ]
    assert paths[0].stat().st_size < 200_000


def test_curves_are_medians_and_formulas() -> None:
    row = swept_row("cpu", 3, "axial_row", 0.5)
    assert curves._exact_s(row) == pytest.approx(0.4 * 0.5)
    assert curves._causal_s(row) == pytest.approx(4 * 4 * 2 * (9 * 10 / 2) / 2e12)
    points = curves._points([swept_row("slow", 4, "full", s) for s in (3.0, 1.0, 2.0)] + [row], curves.seconds)
    assert points == [(3, 0.5), (4, 2.0)]
