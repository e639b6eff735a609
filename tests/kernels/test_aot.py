"""Every Triton kernel passes the gates for every GPU of its launch rows; the kept table says what it needs.

Compiling all of them takes ten minutes on two cores: `make test` holds the kept table against the code by digest, and
against the compiler by a few of its rows; `make test-long` by each of them for one GPU.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from triton_tools.ahead_of_time import Task, in_own_process
from triton_tools.compiled import Resources
from triton_tools.gates import problems

from benchmarks import resources

GENERATIONS = {80, 90, 100}
KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (or blocked: the bare pass)"
)


def launched_kernels() -> set[str]:
    """The functions that kernels/*.py launch: `name[grid](...)`, `name` decorated with triton.jit, bare or called."""
    launched, kernels = set(), set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
                kernels |= {node.name} if "triton.jit" in decorators else set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    return launched & kernels


def check(outcomes: list[dict]) -> None:
    """The gates let every compiled kernel pass; the kept table holds what was compiled."""
    assert {tuple(outcome["problems"]) for outcome in outcomes} == {()}
    kept = {tuple(row[field.name] for field in fields(Task)): row for row in resources.read()}
    for outcome in outcomes:
        row = kept[tuple(outcome["task"].values())]
        if row["triton"] == outcome["resources"]["triton"]:
            assert resources.row_of(outcome) == row


def test_kept_table_holds_every_launch_row_as_it_is_now():
    """Kernels or launch rows changed: python -m benchmarks.resources."""
    listed = in_own_process("--list")
    assert {task["kernel"] for task in listed} == launched_kernels() != set()
    assert [{key: row[key] for key in listed[0]} for row in resources.read()] == listed


def test_kept_table_passes_the_gates():
    names = [field.name for field in fields(Resources)]
    for row in resources.read():
        assert problems(Resources(**{name: row[name] for name in names}), sixteen_bit=row["sixteen_bit"]) == [], row


def test_representative_slice_compiles_to_what_is_kept():
    outcomes = in_own_process("--slice")
    assert {outcome["task"]["kernel"] for outcome in outcomes} == launched_kernels()
    check(outcomes)


@pytest.mark.long
def test_every_launch_row_compiles_to_what_is_kept():
    rows: dict[tuple[str, str, str], list[dict]] = {}
    for task in in_own_process("--list"):
        if task["target"] in GENERATIONS:
            rows.setdefault((task["module"], task["kernel"], task["case"]), []).append(task)
    # A row is compiled for one of its GPUs, the next row for the next: all for all would take three times as long.
    outcomes = in_own_process("--stdin", tasks=[tasks[i % len(tasks)] for i, tasks in enumerate(rows.values())])
    assert {outcome["task"]["target"] for outcome in outcomes} == GENERATIONS
    assert {outcome["task"]["kernel"] for outcome in outcomes} == launched_kernels()
    check(outcomes)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands in for the compiler: three cases, of which it was asked to compile `asked`; the third is refused."""
    listed = [
        {"module": "m", "kernel": "_k", "case": name, "target": 90, "sixteen_bit": False, "digest": "0"}
        for name in ("one", "two", "bad")
    ]
    asked: list[str] = []

    def answer(*arguments, lines=()):
        if arguments == ("--list",):
            yield from listed
        for task in lines:
            asked.append(task["case"])
            resources_of_it = {"triton": metadata.version("triton"), "registers": 8}
            problem = ["spills: many."] if task["case"] == "bad" else []
            yield {"task": task, "resources": resources_of_it, "problems": problem, "seconds": 0.1}

    monkeypatch.setattr(resources, "KEPT", tmp_path / "kept.jsonl")
    monkeypatch.setattr(resources, "_ahead_of_time", answer)
    return listed, asked


def test_what_is_kept_is_not_compiled_again_and_what_is_refused_is_not_kept(compiler):
    listed, asked = compiler
    assert resources.update(resources.read()) == ["_k, bad, sm_90: spills: many."]
    assert [row["case"] for row in resources.read()] == ["one", "two"]
    listed[0]["digest"] = "1"
    asked.clear()
    assert len(resources.update(resources.read())) == 1
    assert asked == ["one", "bad"]
    del listed[1:]
    asked.clear()
    assert resources.update(resources.read()) == []
    assert (asked, [row["digest"] for row in resources.read()]) == ([], ["1"])
    resources.KEPT.write_text(resources.KEPT.read_text().replace(metadata.version("triton"), "3.0.0"))
    resources.update(resources.read())
    assert asked == ["one"]


def test_table_shows_every_kernel_case_and_target():
    row = {"registers": 200, "shared_bytes": 65_536, "spill_store_bytes": 4, "spill_load_bytes": 0}
    rows = [
        {"kernel": "_fwd", "case": "bf16", "target": 80, "instructions": {"HMMA": 32, "FFMA": 9}, **row},
        {"kernel": "_fwd", "case": "bf16", "target": 90, "instructions": {"HGMMA": 4}, **row, "spill_store_bytes": 0},
        {"kernel": "_sum", "case": "fp32", "target": 90, "instructions": {}, **row},
    ]
    assert resources.table(rows).splitlines()[2:] == [
        "| kernel | case | sm_80 | sm_90 |",
        "|---|---|---|---|",
        "| _fwd | bf16 | 200* / 64 / 32 HMMA | 200 / 64 / 4 HGMMA |",
        "| _sum | fp32 |  | 200* / 64 |",
    ]
