"""The same benchmarks as pytest-benchmark entries: `pytest benchmarks`, `pytest benchmarks -k toy`.

Every entry is verified first and fails when it is wrong. These times are for comparing two checkouts on one desk
(`--benchmark-autosave`, `--benchmark-compare`); rows for tables come from `python -m benchmarks`.
"""

from typing import Any

import pytest
import torch

from benchmarks import discover
from benchmarks.harness import Benchmark, Case, Provider, verified_jobs
from benchmarks.timing import Clock

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")

ROUNDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = [
    pytest.param(bench, case, provider, id=f"{bench.op}-{case.label}-{provider.name}".replace(" ", "-"))
    for bench in discover().values()
    for case in bench.cases
    if case.device in (None, DEVICE.type)
    for provider in bench.providers
]


@pytest.mark.parametrize(("bench", "case", "provider"), ENTRIES)
def test_speed(benchmark: Any, bench: Benchmark, case: Case, provider: Provider) -> None:
    jobs, report = verified_jobs(bench, case, DEVICE, (provider.name,))
    for reason in report.absent.values():
        pytest.skip(reason)
    assert not report.refused
    job = jobs[provider.name]
    clock = Clock(DEVICE, cold=bench.cold)

    def whole() -> None:
        for call in job.pieces.values():
            call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{bench.op} {case.label}" + (" (sampled pieces only)" if job.extrapolated else "")
    benchmark.pedantic(whole, setup=clock.flush, rounds=1 if case.toy else ROUNDS, warmup_rounds=1)
