"""Compiles Triton kernels for NVIDIA GPUs on a machine without one, reads what came out, and refuses what is bad.

A module `tests/kernels/<op>_cases.py` names what to compile:

    def aot_cases() -> list[AotCase]:
        q = torch.empty(2, 4, 77, 64, dtype=torch.bfloat16, device="meta")
        ...
        return [AotCase("bf16 D64", _attention_fwd, (q, k, ...), {"BLOCK_M": 64}, {"num_warps": 4}, sixteen_bit=True)]

or lets the launchers themselves say what they launch:

        with recorded_launches() as launches:
            forward(*torch.zeros(3, 2, 4, 77, 64, dtype=torch.bfloat16), ...)
        return [AotCase("bf16 D64", *launch, {}, sixteen_bit=True) for launch in launches]

In the folder tests/:

    python -m triton_tools.ahead_of_time            every case for each of its targets; a JSON line each
    python -m triton_tools.ahead_of_time --slice    a representative few
    python -m triton_tools.ahead_of_time --list     what would be compiled

The exit status is 1 where a gate of `triton_tools.gates` says no. It must be a process of its own, TRITON_INTERPRET
unset: what a kernel is, is decided when its module is imported.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from triton_tools.compiled import Resources, read
from triton_tools.digest import digest
from triton_tools.gates import problems

TESTS = Path(__file__).resolve().parent.parent
CASES = TESTS / "kernels"
CACHE = TESTS.parent / "build" / "triton"  # of Triton's own, which looks kernels up by their source
TARGETS = (80, 86, 89, 90, 100, 120)  # compute capabilities, sm_80 ...
SLICE_TARGETS = {True: 90, False: 80}  # with 16-bit operands, without: warp groups here, single warps there
PROCESSES = 2
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: a signal to get when the parent dies


@dataclass(frozen=True)
class AotCase:
    """A launch to compile, specialised as the launch itself would be.

    Args:
        name: the launch row; unique among the cases of one kernel.
        kernel: the @triton.jit function.
        args: its arguments in order, without the constexprs: meta tensors stand for tensors.
        kwargs: its constexprs.   options: of the launch: num_warps, num_stages.
        sixteen_bit: every matrix product in it must be one of 16-bit operands.
        targets: the compute capabilities whose launches look like this.
    """

    name: str
    kernel: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: Mapping[str, int]
    sixteen_bit: bool
    targets: tuple[int, ...] = TARGETS

    @property
    def kernel_name(self) -> str:
        """The function's name."""
        return self.kernel.__name__

    @property
    def digest(self) -> str:
        """Another one wherever the compiled kernel may be another one."""
        return digest(self.kernel, tuple(self.args), {**self.kwargs, **self.options})


@dataclass(frozen=True)
class Task:
    """One compilation, in words that another process understands: a case by the module and the names it is found by."""

    module: str
    kernel: str
    case: str
    target: int
    sixteen_bit: bool
    digest: str


@dataclass(frozen=True)
class Outcome:
    """What one compilation gave; `problems` is empty where every gate lets it pass. `seconds` is short if cached."""

    task: Task
    resources: Resources
    problems: list[str]
    seconds: float


def case_modules() -> list[str]:
    """The modules in tests/kernels that name cases."""
    return sorted(path.stem for path in CASES.glob("*_cases.py"))


def tasks(modules: Iterable[str]) -> Iterator[Task]:
    """Every case of these modules for each of its targets.

    Raises: ValueError (two cases of one kernel have one name).
    """
    for module in modules:
        seen: set[tuple[str, str]] = set()
        for case in _load(module):
            key = case.kernel_name, case.name
            if key in seen:
                raise ValueError(f"{module}: cases of one kernel must differ in name, got {case.name!r} twice.")
            seen.add(key)
            for target in case.targets:
                yield Task(module, *key, target, case.sixteen_bit, case.digest)


def representative(todo: Iterable[Task]) -> list[Task]:
    """Of every kernel the first case with and the first without 16-bit operands, for one target each."""
    first: dict[tuple[str, bool], Task] = {}
    for task in todo:
        if task.target == SLICE_TARGETS[task.sixteen_bit]:
            first.setdefault((task.kernel, task.sixteen_bit), task)
    return list(first.values())


def compile_all(todo: Sequence[Task], processes: int = PROCESSES) -> Iterator[Outcome]:
    """Compiles in several processes; outcomes come in the order of `todo`."""
    if not todo:
        return
    # A fresh interpreter each: Triton and LLVM keep state that a fork would share.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(todo)), context, _begin_worker) as pool:
        yield from pool.map(compile_task, todo)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # A pool whose parent is killed would wait for work forever.
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")


def compile_task(task: Task) -> Outcome:
    """Compiles one case for one target and asks the gates.

    Raises: RuntimeError (the code is no longer what the task was listed for).
    """
    [case] = [case for case in _load(task.module) if (case.kernel_name, case.name) == (task.kernel, task.case)]
    if case.digest != task.digest:
        raise RuntimeError(f"{task.kernel}, {task.case}: its code changed after it was listed. Start again.")
    before = time.perf_counter()
    resources = read(compile_case(case, task.target), task.target)
    seconds = time.perf_counter() - before
    found = problems(resources, sixteen_bit=case.sixteen_bit)
    return Outcome(task, resources, found, seconds)


def compile_case(case: AotCase, target: int) -> Any:
    """Triton's CompiledKernel of one case.

    Raises: RuntimeError (this process interprets kernels).
    """
    from triton.runtime import JITFunction, driver

    if not isinstance(case.kernel, JITFunction):
        raise RuntimeError(
            f"{case.kernel_name}: must be a @triton.jit function to be compiled, got {type(case.kernel).__name__}."
            " Was TRITON_INTERPRET set when its module was imported?"
        )
    driver.set_active(_NoDevice(target))
    return case.kernel.warmup(*case.args, grid=(1,), **case.kwargs, **case.options)


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Within it kernels are not launched but listed: (kernel, args, kwargs), launch options among the kwargs.

    Tensors may be on the CPU: strides and alignment, for which Triton specialises, are those of the call.
    """
    from triton.runtime import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    launch, JITFunction.run = JITFunction.run, note
    try:
        yield launches
    finally:
        JITFunction.run = launch


class _NoDevice:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device: one for each target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@functools.cache
def _load(module: str) -> list[AotCase]:
    for folder in (str(CASES), str(TESTS.parent)):  # of this checkout, whatever is installed
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module(module).aot_cases()


def in_own_process(*arguments: str, tasks: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Runs this module's command line as tests may: the JSON lines it prints, whatever the gates say.

    Args: tasks: for `--stdin`, of those that `--list` gives.
    Raises: RuntimeError (a case cannot be compiled, or anything else went wrong).
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_tools.ahead_of_time", *arguments]
    given = "".join(json.dumps(task) + "\n" for task in tasks)
    done = subprocess.run(command, cwd=TESTS, env=environment, input=given, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    refused = any(line.get("problems") for line in lines)
    if done.returncode != int(refused):
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr}")
    return lines


def main() -> int:
    """Parses the command line, compiles, prints. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", action="append", metavar="MODULE", help="a module with aot_cases(); default: all")
    parser.add_argument("--target", action="append", type=int, metavar="N", help="for sm_N; default: all there are")
    parser.add_argument("--slice", action="store_true", help="a representative few")
    parser.add_argument("--stdin", action="store_true", help="what standard input names, in the lines of --list")
    parser.add_argument("--list", action="store_true", help="say what would be compiled, compile nothing")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET must be unset: an interpreted kernel cannot be compiled.")
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    torch.set_num_threads(1)  # for the launchers: small work, and the processes are the parallelism
    if arguments.stdin:
        todo = [Task(**json.loads(line)) for line in sys.stdin]
    else:
        todo = list(tasks(arguments.cases or case_modules()))
    if arguments.target:
        todo = [task for task in todo if task.target in arguments.target]
    if arguments.slice:
        todo = representative(todo)
    if arguments.list:
        for task in todo:
            print(json.dumps(asdict(task)))
        return 0
    passed = True
    for outcome in compile_all(todo):
        print(json.dumps(asdict(outcome)), flush=True)
        passed = passed and not outcome.problems
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
