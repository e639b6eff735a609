"""The benchmark of a training step of the discrete VAE: what it refuses, what its costs count, what a peer owes."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_dvae_step, codebook, peers
from benchmarks.bench_dvae_step import BENCHMARK
from benchmarks.harness import verified_jobs
from dalle_fast.models import dvae

CPU = torch.device("cpu")
TOY = next(case for case in BENCHMARK.cases if case.toy)


@pytest.fixture(scope="module")
def inputs() -> bench_dvae_step.Inputs:
    return bench_dvae_step.Inputs(TOY, CPU)


def test_wrong_losses_and_gradients_are_refused(inputs: bench_dvae_step.Inputs) -> None:
    expected = bench_dvae_step.Expected(TOY, inputs)
    right = bench_dvae_step._step(TOY, inputs, "reference")
    assert expected.complaint(right) is None
    for name, value in right.items():
        for wrong in (math.nan, 1e-3 * value.abs().max().item()):
            broken = value.clone()
            broken[(-1,) * broken.dim()] += wrong
            assert str(expected.complaint(right | {name: broken})).startswith(f"{name} must be within")
    assert "must give" in str(expected.complaint({"loss": right["loss"]}))


def test_a_step_is_of_the_implementation_asked_for(
    inputs: bench_dvae_step.Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = dvae.gumbel_codebook
    monkeypatch.setattr(
        bench_dvae_step.op, "gumbel_codebook", lambda *args, impl, **kw: asked.append(impl) or real(*args, **kw)
    )
    bench_dvae_step._step(TOY, inputs, "triton")
    assert asked == ["triton"] and dvae.gumbel_codebook is real


def test_statistics_count_whole_rounds(inputs: bench_dvae_step.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    added, read = [], []
    monkeypatch.setattr(bench_dvae_step.TrainingStatistics, "add", lambda *given: added.append(given))
    monkeypatch.setattr(bench_dvae_step.TrainingStatistics, "row", lambda self: read.append(self))
    job = bench_dvae_step._prepare_statistics(TOY, inputs, CPU)
    job.pieces["steps"]()
    assert (len(added), len(read)) == (8, 1), "one hard error of 16 pictures, two pictures a step"
    assert job.combine({"steps": 4.0}) == 0.5


def test_cost_counts_what_the_step_computes_and_one_product_more(inputs: bench_dvae_step.Inputs) -> None:
    """The oracle stores its logits; the cost counts them again for the backward, as that of the op does."""
    with FlopCounterMode(display=False) as counted:
        results = bench_dvae_step._step(TOY, inputs, "reference")
    cost = BENCHMARK.cost(TOY)
    sizes = codebook.sizes_of(bench_dvae_step.bottleneck(TOY))
    again = 2 * sizes.batch * sizes.positions * sizes.codes * sizes.features
    assert cost.flops == counted.get_total_flops() + again
    assert cost.result_bytes == sum(x.numel() * x.element_size() for x in results.values()) - 4  # the loss


@pytest.mark.skipif(peers.missing() is not None, reason=f"the original is not installed: {peers.missing()}")
def test_the_original_is_verified_with_given_noise(inputs: bench_dvae_step.Inputs) -> None:
    jobs, found = verified_jobs(BENCHMARK, TOY, CPU, ("original",))
    assert (list(jobs), found.refused, found.absent) == (["original"], {}, {})
    expected = bench_dvae_step.Expected(TOY, inputs)
    with_its_own = jobs["original"].pieces["step"]()
    assert bench_dvae_step._check_original(TOY, with_its_own, expected) is not None
