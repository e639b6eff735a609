"""`python -m benchmarks.resources`: what every Triton kernel of the launch tables needs of a GPU, without one.

Compiles every launch row for each of its targets (tests/triton_tools/ahead_of_time.py), keeps a JSON line each in
results/resources/triton.jsonl and prints the table. What is kept already of the same code is not compiled again, but
for `--all`. The lines depend on kernels, launch tables and the version of Triton alone.

| key | what |
|---|---|
| module, kernel, case | where the case is named, the @triton.jit function, the launch row |
| target | the compute capability (90: sm_90) |
| sixteen_bit | its products must be of 16-bit operands |
| digest | of code, constants and kinds of arguments: another one where the kernel is |
| registers, stack_bytes, spill_store_bytes, spill_load_bytes | of a thread |
| shared_bytes, warps | of a block |
| instructions | {name: number} in the machine code: matrix products, float32 products, local memory, atomics |
| dots | [type of the left operand, precision] of its kinds of tl.dot |
| tf32, atomics | instructions of the PTX |
| triton | its version, which brings its own assembler |
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

from benchmarks.rows import RESULTS

KEPT = RESULTS / "resources" / "triton.jsonl"
TESTS = RESULTS.parent.parent / "tests"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 where a gate refuses a kernel."""
    about = (__doc__ or "").partition("\n\n|")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=about)
    parser.add_argument("--all", action="store_true", help="compile what is kept already, too")
    parser.add_argument("--table", action="store_true", help="compile nothing, print the kept table")
    options = parser.parse_args(arguments)
    refused = [] if options.table else update([] if options.all else read())
    print(table(read()))
    for sentence in refused:
        print(f"REFUSED: {sentence}", file=sys.stderr)
    return 1 if refused else 0


def update(known: Iterable[Row]) -> list[str]:
    """Keeps a row for everything there is to compile, taken from `known` or compiled, and nothing else.

    Returns: what the gates refuse, a sentence each; such a kernel is not kept.
    Raises: RuntimeError (something cannot be compiled; what, is on the screen).
    """
    version = metadata.version("triton")
    rows = {_task_of(row): row for row in known if row["triton"] == version}
    wanted = list(_ahead_of_time("--list"))
    todo = [task for task in wanted if _task_of(task) not in rows]
    refused = []
    for done, outcome in enumerate(_ahead_of_time("--stdin", lines=todo) if todo else (), start=1):
        row = row_of(outcome)
        name = f"{row['kernel']}, {row['case']}, sm_{row['target']}"
        print(f"{done}/{len(todo)} {name}: {outcome['seconds']:.1f} s", file=sys.stderr)
        if outcome["problems"]:
            refused += [f"{name}: {problem}" for problem in outcome["problems"]]
        else:
            rows[_task_of(row)] = row
    kept = [rows[_task_of(task)] for task in wanted if _task_of(task) in rows]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return refused


def row_of(outcome: Row) -> Row:
    """What is kept of one compilation."""
    return {**outcome["task"], **outcome["resources"]}


def read() -> list[Row]:
    """The kept rows, in the order of the launch tables; none where nothing was compiled yet."""
    return [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()] if KEPT.exists() else []


def _task_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("module", "kernel", "case", "target", "sixteen_bit", "digest"))


def _ahead_of_time(*arguments: str, lines: Iterable[Row] = ()) -> Iterator[Row]:
    """The JSON lines that the compiler's command prints, as they come, given some; it must not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_tools.ahead_of_time", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=TESTS, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.writelines(json.dumps(line) + "\n" for line in lines)
        process.stdin.close()
        refused = False
        for line in process.stdout:
            outcome = json.loads(line)
            refused = refused or bool(outcome.get("problems"))
            yield outcome
    if process.returncode != int(refused):
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}.")


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for each kernel and launch row; for each target registers, shared memory and matrix products."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["kernel"], row["case"]), {})[row["target"]] = _cell(row)
    targets = sorted({target for cells in lines.values() for target in cells})
    text = [
        "Registers a thread / shared memory a block in KiB / matrix instructions; * spills.",
        "",
        "| kernel | case | " + " | ".join(f"sm_{target}" for target in targets) + " |",
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
