"""The benchmark of GEGLU: what it refuses, what its costs count."""

import math

import pytest
import torch

from benchmarks import bench_geglu
from benchmarks.bench_geglu import BENCHMARK, CASES

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [case for case in CASES if case.toy], ids=lambda case: str(case.dtype))
def test_wrong_results_are_refused_and_tensors_counted(case):
    inputs = BENCHMARK.inputs(case, CPU)
    expected = BENCHMARK.expected(case, inputs)
    right = bench_geglu._call(case, inputs, "reference")
    assert BENCHMARK.check(case, right, expected) is None
    for name, value in right.items():
        for wrong in (math.nan, 0.5):
            broken = value.clone()
            broken[-1, -1] += wrong
            assert f"{name} must be within" in str(BENCHMARK.check(case, right | {name: broken}, expected))
    cost = BENCHMARK.cost(case)
    assert cost.result_bytes == cost.write_bytes == sum(t.nbytes for t in right.values())
    assert cost.read_bytes == 2 * inputs.x.nbytes + inputs.dout.nbytes
