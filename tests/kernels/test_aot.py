"""Every Triton kernel passes the gates for every GPU of its launch rows; the kept table says what it needs."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from triton_tools.ahead_of_time import case_modules, in_own_process

from benchmarks import resources

KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (or blocked: the bare pass)"
)


@pytest.fixture(scope="module")
def listed():
    """Every compilation there is to do: module, kernel, case, target."""
    return in_own_process("--list")


def launched_kernels() -> set[str]:
    """The functions that kernels/*.py launch: `name[grid](...)`, `name` decorated with triton.jit."""
    launched, kernels = set(), set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                kernels.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    return launched & kernels


def refusals(outcomes: list[dict]) -> list[str]:
    return [f"{o['kernel']}, {o['case']}, sm_{o['target']}: {problem}" for o in outcomes for problem in o["problems"]]


def test_every_launched_kernel_has_cases(listed):
    assert launched_kernels(), "no launch found: has kernels/ another way to launch?"
    assert launched_kernels() == {task["kernel"] for task in listed}


def test_representative_slice_passes_the_gates():
    assert case_modules()
    outcomes = in_own_process("--slice")
    assert {outcome["kernel"] for outcome in outcomes} == launched_kernels()
    assert refusals(outcomes) == []


def test_kept_table_covers_every_launch_row(listed):
    kept = {(row["kernel"], row["row"], row["target"]) for row in resources.read()}
    assert kept == {(task["kernel"], task["case"], task["target"]) for task in listed}


@pytest.mark.long
def test_whole_launch_table_passes_the_gates_and_is_what_the_kept_table_says():
    import triton

    outcomes = in_own_process()
    assert refusals(outcomes) == []
    rows, kept = [resources.row_of(outcome) for outcome in outcomes], resources.read()
    if {row["triton"] for row in kept} == {triton.__version__}:
        assert rows == kept, "kernels or launch rows changed: python -m benchmarks.resources"
