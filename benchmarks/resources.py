"""`python -m benchmarks.resources`: what every Triton kernel of the launch tables needs of a GPU, without one.

Compiles every launch row for each of its targets (tests/triton_tools/ahead_of_time.py), keeps a JSON line each in
results/resources/triton.jsonl and prints the table. The lines depend on kernels, launch tables and the version of
Triton alone: running it again changes nothing. `--table` prints the kept one.

| key | what |
|---|---|
| kernel, row, target | the @triton.jit function, the launch row, the compute capability (90: sm_90) |
| registers, stack_bytes, spill_store_bytes, spill_load_bytes | of a thread |
| shared_bytes, warps | of a block |
| instructions | {name: number} in the machine code: matrix products, float32 products, local memory, atomics |
| triton | its version, which brings its own assembler |
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.rows import RESULTS

KEPT = RESULTS / "resources" / "triton.jsonl"
TESTS = RESULTS.parent.parent / "tests"
KEYS = (
    "kernel", "row", "target", "registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes", "shared_bytes",
    "warps", "instructions", "triton",
)  # fmt: skip

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 where a gate refuses a kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources", description=(__doc__ or "").partition("| key")[0]
    )
    parser.add_argument("--table", action="store_true", help="compile nothing, print the kept table")
    options = parser.parse_args(arguments)
    refused = []
    if not options.table:
        outcomes = list(compile_all())
        write(map(row_of, outcomes))
        refused = [f"{o['kernel']}, {o['case']}, sm_{o['target']}: {p}" for o in outcomes for p in o["problems"]]
    print(table(read()))
    for sentence in refused:
        print(f"REFUSED: {sentence}", file=sys.stderr)
    return 1 if refused else 0


def compile_all() -> Iterator[dict[str, Any]]:
    """Every launch row, compiled in a process that does not interpret kernels, as it comes.

    Raises: RuntimeError (something cannot be compiled; what, is on the screen).
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_tools.ahead_of_time"]
    refused = False
    with subprocess.Popen(command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            outcome = json.loads(line)
            refused = refused or bool(outcome["problems"])
            yield outcome
    if process.returncode != int(refused):
        raise RuntimeError(f"compiling ahead of time failed with status {process.returncode}.")


def row_of(outcome: dict[str, Any]) -> Row:
    """What is kept of one compilation."""
    found = {**outcome["resources"], "kernel": outcome["kernel"], "row": outcome["case"], "target": outcome["target"]}
    return {key: found[key] for key in KEYS}


def write(rows: Iterable[Row]) -> None:
    """Keeps these rows, a line each, instead of what was there."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read() -> list[Row]:
    """The kept rows, in the order of the launch tables."""
    return [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for each kernel and launch row; for each target registers, shared memory and matrix products."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["kernel"], row["row"]), {})[row["target"]] = _cell(row)
    targets = sorted({target for cells in lines.values() for target in cells})
    text = [
        "Registers a thread / shared memory a block in KiB / matrix instructions; * spills.",
        "",
        "| kernel | row | " + " | ".join(f"sm_{target}" for target in targets) + " |",
        "|---" * (2 + len(targets)) + "|",
    ]
    for (kernel, name), cells in lines.items():
        text.append(f"| {kernel} | {name} | " + " | ".join(cells.get(target, "") for target in targets) + " |")
    return "\n".join(text)


def _cell(row: Row) -> str:
    matrix = [f"{count} {name}" for name, count in row["instructions"].items() if name.endswith("MMA")]
    spills = "*" if row["spill_store_bytes"] or row["spill_load_bytes"] else ""
    parts = [f"{row['registers']}{spills}", f"{row['shared_bytes'] / 1024:.0f}", *matrix[:1]]
    return " / ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
