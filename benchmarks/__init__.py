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


def discover() -> dict[str, "Benchmark"]:
    """Every `BENCHMARK` declared by a `bench_*.py` of this folder, by the name of its op."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("bench_"))
    found = [importlib.import_module(f"{__name__}.{name}").BENCHMARK for name in names]
    return {benchmark.op: benchmark for benchmark in found}
