"""The benchmark of vocab_cross_entropy: what it refuses, what its costs count."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_vocab_cross_entropy, vocabulary
from benchmarks.bench_vocab_cross_entropy import BENCHMARK, CASES
from benchmarks.harness import Case, verified_jobs

CPU = torch.device("cpu")
TOYS = [case for case in CASES if case.toy]
every_toy = pytest.mark.parametrize("case", TOYS, ids=lambda case: case.label.replace(" ", "-"))


@every_toy
def test_wrong_results_and_nan_are_refused(case: Case) -> None:
    inputs = vocabulary.make_inputs(case, CPU)
    oracle = vocabulary.Oracle(case, inputs)
    right = bench_vocab_cross_entropy._call(case, inputs, "reference")
    assert oracle.complaint(right) is None
    for name, value in right.items():
        for wrong in (math.nan, 0.1):
            broken = value.clone()
            broken[(-1,) * broken.dim()] += wrong
            assert str(oracle.complaint(right | {name: broken})).startswith(f"{name} must")
        assert "must give" in str(oracle.complaint({key: right[key] for key in right if key != name}))


@every_toy
def test_cost_counts_the_tensors_and_their_products(case: Case) -> None:
    inputs = vocabulary.make_inputs(case, CPU)
    with FlopCounterMode(display=False) as counted:
        results = bench_vocab_cross_entropy._call(case, inputs, "reference")
    cost = vocabulary.cost(case)
    assert cost.flops == counted.get_total_flops()
    assert cost.result_bytes == cost.write_bytes == sum(t.nbytes for t in results.values())
    assert cost.read_bytes == sum(t.nbytes for t in inputs) * (2 if case.mode == vocabulary.BOTH else 1)


def test_each_measurement_is_named_once() -> None:
    labels = [case.label for case in CASES]
    assert len(labels) == len(set(labels))


@every_toy
def test_lines_are_verified_and_under_autocast_judged_by_16_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_vocab_cross_entropy, "has_bfloat16_products", lambda: True)
    jobs, found = verified_jobs(BENCHMARK, case, CPU, ("original_lines", "autocast_lines"))
    expected = ["original_lines", *(["autocast_lines"] if case.dtype == torch.bfloat16 else [])]
    assert (list(jobs), found.refused) == (expected, {})


def test_lines_that_leave_the_norm_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_vocab_cross_entropy.F, "layer_norm", lambda x, _, weight, bias: x + 0 * (weight + bias))
    case = TOYS[0]
    inputs = vocabulary.make_inputs(case, CPU)
    got = vocabulary.call_in(case.mode, bench_vocab_cross_entropy.halves_lines(vocabulary.sizes_of(case), CPU), inputs)
    monkeypatch.undo()
    oracle = vocabulary.Oracle(case, inputs)
    assert "must be within" in str(bench_vocab_cross_entropy._check_peer(case, got, oracle, autocast=False))


@pytest.mark.long
def test_compiled_lines_are_verified() -> None:
    """Compiles for some ten seconds."""
    case = replace(TOYS[0], toy=False)
    wanted = ("original_compiled", "halves_compiled")
    jobs, found = verified_jobs(BENCHMARK, case, CPU, wanted)
    assert (tuple(jobs), found.refused, found.absent) == (wanted, {}, {})
