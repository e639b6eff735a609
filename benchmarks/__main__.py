"""`python -m benchmarks`: measure and print the table; `table`, `plot` and `ceilings` on their own.

Nothing but torch is needed to measure (`make gpu` runs this on a bare Python); plots need matplotlib.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import discover
from benchmarks.ceilings import DTYPES, Ceilings
from benchmarks.harness import Benchmark, Report, Session, Settings, run
from benchmarks.machine import describe_device
from benchmarks.overview import overview
from benchmarks.report import plot, table
from benchmarks.rows import RESULTS, Row, append, load

BUSY = 0.5  # more than this load a core before the run: times mean little


class UsageError(Exception):
    """A wrong argument; the message says which and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 where a result was refused, 2 for a wrong argument."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures dalle_fast beside its peers, after verifying both; appends rows and prints tables.",
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="toy sizes, in seconds: verifies and runs everything, reports no speed")
    add("--only", action="append", default=[], metavar="OP", help="run this benchmark (repeatable; default: all)")
    add("--case", action="append", default=[], help="run these cases, * for any letters (repeatable; with one --only)")
    add("--impl", action="append", default=[], help="run this implementation (repeatable; with one --only)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--threads", type=_at_least_one, help="threads torch may use; default: its own choice")
    add("--budget", type=float, help="seconds of timing a case; default: the benchmark's own choice")
    add("--rounds", type=_at_least_one, default=5, help="rounds a case at least (default: 5)")
    add("--within", type=float, metavar="SECONDS", help="begin no case later than this; the last are left out")
    add("--out", type=Path, default=RESULTS, help="folder the rows are appended in")
    parser.set_defaults(command=_measure)

    commands = parser.add_subparsers(title="from rows, and of the machine")
    tables = commands.add_parser("table", help="print the newest run of every benchmark, from rows")
    tables.add_argument("--brief", action="store_true", help="one line a case only")
    tables.set_defaults(command=_table)
    plots = commands.add_parser("plot", help="draw the newest run of every benchmark, from rows")
    plots.add_argument("--out", type=Path, default=RESULTS / "plots", help="folder of the PNGs")
    plots.set_defaults(command=_plot)
    for command in (tables, plots):
        command.add_argument("--rows", type=Path, default=RESULTS, help="a .jsonl file or a folder")
        command.add_argument("--only", action="append", default=[], metavar="OP", help="this benchmark (repeatable)")
    ceilings = commands.add_parser("ceilings", help="measure what this machine can do at best")
    ceilings.add_argument("--device", default="cpu")
    ceilings.add_argument("--megabytes", type=int, action="append", help="working set to stream (repeatable)")
    ceilings.set_defaults(command=_ceilings)
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}.")
    return int(text)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must name a device of torch, got {name!r}: cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"torch {torch.__version__} sees no GPU on this machine; use --device cpu.")
    return device


# ------------------------------------------------------------------------------------------------ measuring


def _measure(options: argparse.Namespace) -> int:
    ends = None if options.within is None else time.monotonic() + options.within
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    wanted = _wanted(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    session = Session.begin(_device(options.device), smoke=options.smoke)
    settings = Settings(
        smoke=options.smoke,
        budget_s=options.budget,
        min_rounds=options.rounds,
        cases=tuple(options.case),
        providers=tuple(options.impl),
        ends=ends,
    )
    if not options.smoke and session.load is not None and session.load > BUSY * torch.get_num_threads():
        print(f"The load of this machine is {session.load}: others work, times will mean little.", file=sys.stderr)
    report = Report()
    for benchmark in wanted:
        try:
            for found in run(benchmark, settings, session):
                if found.rows and not options.smoke:
                    append(options.out / f"{benchmark.op}.jsonl", found.rows)
                report.extend(found)
        except ValueError as error:
            raise UsageError(str(error)) from error
    _print_report(report)
    return 1 if report.refused else 0


def _wanted(options: argparse.Namespace) -> list[Benchmark]:
    absent: dict[str, str] = {}
    known = discover(absent)
    for op in options.only:
        if op not in known and op not in absent:
            raise UsageError(f"--only must be one of {', '.join(known)}, got {op!r}.")
    if (options.case or options.impl) and len(options.only) != 1:
        raise UsageError("--case and --impl name things of one benchmark: give it with one --only.")
    wanted = options.only or [*known, *absent]
    for op in wanted:
        if op in absent:
            print(f"absent: {op}: {absent[op]}")
    return [known[op] for op in wanted if op in known]


def _print_report(report: Report) -> None:
    print(_tables(report.rows))
    reasons = dict.fromkeys((label.rpartition(" ")[2], why) for label, why in report.absent.items())
    for provider, reason in reasons:
        labels = [k for k, why in report.absent.items() if (k.rpartition(" ")[2], why) == (provider, reason)]
        where = labels[0] if len(labels) == 1 else f"{provider} in {len(labels)} cases"
        print(f"\nabsent: {where}: {reason}")
    if report.unbegun:
        print(f"\nno time was left for {len(report.unbegun)} cases: {', '.join(report.unbegun)}")
    for label, reason in report.refused.items():
        print(f"\nREFUSED: {label}: {reason}")


def _tables(rows: list[Row]) -> str:
    return "\n\n".join(part for part in (table(rows), overview(rows)) if part)


# ------------------------------------------------------------------------------------------------ from rows


def _rows(options: argparse.Namespace) -> list[Row]:
    if not options.rows.exists():
        raise UsageError(f"--rows must be a .jsonl file or a folder of them, got {options.rows}.")
    try:
        return [row for row in load(options.rows) if not options.only or row["op"] in options.only]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _table(options: argparse.Namespace) -> int:
    rows = _rows(options)
    print(overview(rows) or table(rows) if options.brief else _tables(rows))
    return 0


def _plot(options: argparse.Namespace) -> int:
    try:
        paths = plot(_rows(options), options.out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UsageError("plot: needs matplotlib. Install it: pip install matplotlib.") from error
    for path in paths:
        print(path)
    return 0


def _ceilings(options: argparse.Namespace) -> int:
    ceilings = Ceilings(_device(options.device))
    print(describe_device(ceilings.device)["name"])
    for size in (*(n * 10**6 for n in options.megabytes or (16, 75, 151)), None):
        at = "memory" if size is None else f"{size / 1e6:.0f} MB"
        print(f"read {at}: {ceilings.stream_read(size) / 1e9:.1f} GB/s")
        print(f"write {at}: {ceilings.stream_write(size) / 1e9:.1f} GB/s")
    for name, dtype in DTYPES.items():
        print(f"matrix product {name}: {ceilings.matrix_product(dtype) / 1e12:.3f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
