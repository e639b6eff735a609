"""Benchmarks of dalle_fast: one `bench_*.py` an op or a job, one harness, rows of JSON, tables and plots from them.

python -m benchmarks            verify, measure, append rows to benchmarks/results, print the table
python -m benchmarks --smoke    the same at toy sizes in seconds; reports no speed
python -m benchmarks table      the table again, from the rows
python -m benchmarks plot       pictures, from the rows
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Benchmark

PREFIX = "bench_"
OURS = ("benchmarks", "dalle_fast", "tests")


def discover(absent: dict[str, str] | None = None) -> dict[str, "Benchmark"]:
    """Every `BENCHMARK` declared by a `bench_*.py` of this folder, by the name of its op.

    Args: absent: filled with {op: why} of those that import a package which is not installed.
    """
    found = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(PREFIX)):
        try:
            benchmark = importlib.import_module(f"{__name__}.{name}").BENCHMARK
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package in OURS:
                raise
            if absent is not None:
                absent[name.removeprefix(PREFIX)] = f"needs {package}, which is not installed."
            continue
        found[benchmark.op] = benchmark
    return found
