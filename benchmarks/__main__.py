"""`python -m benchmarks`: measure and print the table; `table`, `plot` and `ceilings` on their own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click
import torch

from benchmarks import discover
from benchmarks.ceilings import DTYPES, Ceilings
from benchmarks.harness import Report, Session, Settings, run
from benchmarks.machine import describe_device
from benchmarks.report import plot, table
from benchmarks.rows import RESULTS, append, load

BUSY = 0.5  # more than this load a core before the run: times mean little


@click.group(invoke_without_command=True)
@click.option("--smoke", is_flag=True, help="Toy sizes, in seconds: verifies and runs everything, reports no speed.")
@click.option("--only", "ops", multiple=True, help="Run this benchmark (repeatable; default: all).")
@click.option("--case", "cases", multiple=True, help="Run this case (repeatable; with one --only).")
@click.option("--impl", "providers", multiple=True, help="Run this implementation (repeatable; with one --only).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="Threads torch may use; default: its own choice.")
@click.option("--budget", default=20.0, show_default=True, help="Seconds of timing a case.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds a case at least.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder the rows are appended in.")
@click.pass_context
def main(
    context: click.Context,
    smoke: bool,
    ops: tuple[str, ...],
    cases: tuple[str, ...],
    providers: tuple[str, ...],
    device: str,
    threads: int | None,
    budget: float,
    rounds: int,
    out: Path,
) -> None:
    """Measures dalle_fast beside its peers, after verifying both; appends rows and prints the table."""
    if context.invoked_subcommand is not None:
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    known = discover()
    for op in ops:
        if op not in known:
            raise click.UsageError(f"--only must be one of {', '.join(known)}, got {op!r}.")
    if (cases or providers) and len(ops) != 1:
        raise click.UsageError("--case and --impl name things of one benchmark: give it with one --only.")
    if threads is not None:
        torch.set_num_threads(threads)
    session = Session.begin(_device(device), smoke=smoke)
    settings = Settings(smoke=smoke, budget_s=budget, min_rounds=rounds, cases=cases, providers=providers)
    if not smoke and session.load is not None and session.load > BUSY * torch.get_num_threads():
        click.echo(f"The load of this machine is {session.load}: others are working, times will mean little.", err=True)
    report = Report()
    for op in ops or known:
        try:
            for found in run(known[op], settings, session):
                if not smoke:
                    append(out / f"{op}.jsonl", found.rows)
                report.extend(found)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    click.echo(table(report.rows))
    for reason in dict.fromkeys(report.absent.values()):
        labels = [label for label, why in report.absent.items() if why == reason]
        click.echo(f"\nabsent: {', '.join(labels)}: {reason}")
    for label, reason in report.refused.items():
        click.echo(f"\nREFUSED: {label}: {reason}")
    context.exit(1 if report.refused else 0)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.UsageError(f"--device must name a device of torch, got {name!r}: cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(f"torch {torch.__version__} sees no GPU on this machine; use --device cpu.")
    return device


SOURCE = click.option(
    "--rows", "source", type=click.Path(exists=True, path_type=Path), default=RESULTS, help="A .jsonl file or a folder."
)


@main.command("table")
@SOURCE
def table_command(source: Path) -> None:
    """Prints the newest run of every benchmark, from rows."""
    click.echo(table(load(source)))


@main.command("plot")
@SOURCE
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "plots", help="Folder of the PNGs.")
def plot_command(source: Path, out: Path) -> None:
    """Draws the newest run of every benchmark, from rows."""
    try:
        paths = plot(load(source), out)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise click.ClickException("plot: needs matplotlib. Install it: pip install matplotlib.") from error
    for path in paths:
        click.echo(path)


@main.command("ceilings")
@click.option("--device", default="cpu", show_default=True)
@click.option("--megabytes", default=(16, 75, 151), multiple=True, show_default=True, help="Working sets to stream.")
def ceilings_command(device: str, megabytes: tuple[int, ...]) -> None:
    """Measures what this machine can do at best."""
    ceilings = Ceilings(_device(device))
    click.echo(describe_device(ceilings.device)["name"])
    for size in (*(n * 10**6 for n in megabytes), None):
        at = "memory" if size is None else f"{size / 1e6:.0f} MB"
        click.echo(f"read {at}: {ceilings.stream_read(size) / 1e9:.1f} GB/s")
        click.echo(f"write {at}: {ceilings.stream_write(size) / 1e9:.1f} GB/s")
    for name, dtype in DTYPES.items():
        click.echo(f"matrix product {name}: {ceilings.matrix_product(dtype) / 1e12:.3f} TFLOP/s")


if __name__ == "__main__":
    main()
