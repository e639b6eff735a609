"""The benchmark of a training step: what it refuses, what its costs count, what the peers owe."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_training_step, decoding, peers
from benchmarks.bench_training_step import BENCHMARK
from benchmarks.harness import verified_jobs
from benchmarks.plain_transformer import by_hand

CPU = torch.device("cpu")
TOY, TOY_BFLOAT16 = (case for case in BENCHMARK.cases if case.toy)


@pytest.fixture(scope="module")
def inputs() -> bench_training_step.Inputs:
    return bench_training_step.Inputs(TOY, CPU)


@pytest.fixture(scope="module")
def expected(inputs: bench_training_step.Inputs) -> bench_training_step.Expected:
    return bench_training_step.Expected(TOY, inputs)


def test_wrong_losses_and_gradients_are_refused(
    inputs: bench_training_step.Inputs, expected: bench_training_step.Expected
) -> None:
    right = bench_training_step._prepare_ours(TOY, inputs, CPU).result()
    assert bench_training_step._check(TOY, right, expected) is None
    for name, value in right.items():
        for wrong in (math.nan, 1e-2 * value.abs().max().item()):
            broken = value.clone()
            broken[(-1,) * broken.dim()] += wrong
            complaint = str(bench_training_step._check(TOY, right | {name: broken}, expected))
            assert complaint.startswith(f"{name} must be within")
    assert "must give" in str(bench_training_step._check(TOY, {"loss": right["loss"]}, expected))


OURS = ["ours", "ours_checkpointing", "ours_reversible"]


def test_ours_that_keep_fewer_activations_are_right() -> None:
    jobs, found = verified_jobs(BENCHMARK, TOY, CPU, OURS)
    assert (list(jobs), found.refused, found.absent) == (OURS, {}, {})
    loss = {impl: job.result()["loss"] for impl, job in jobs.items()}
    assert torch.equal(loss["ours"], loss["ours_checkpointing"])
    assert not torch.equal(loss["ours"], loss["ours_reversible"])


def test_ours_under_autocast_is_right(inputs: bench_training_step.Inputs) -> None:
    jobs, found = verified_jobs(BENCHMARK, TOY_BFLOAT16, CPU, OURS)
    assert (list(jobs), found.refused, found.absent) == (OURS, {}, {})
    in_float32 = bench_training_step._prepare_ours(TOY, inputs, CPU).result()
    assert not torch.equal(jobs["ours"].result()["loss"], in_float32["loss"])


def test_judging_leaves_the_models_as_they_were(
    inputs: bench_training_step.Inputs, expected: bench_training_step.Expected
) -> None:
    assert expected.of_ours[0]["loss"].dtype == expected.of_plain[0]["loss"].dtype == torch.float64
    for model in (inputs.model, inputs.plain):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_plain_transformer_is_what_is_written_by_hand(
    inputs: bench_training_step.Inputs, expected: bench_training_step.Expected
) -> None:
    tokens, labels = inputs.sequence()
    parameters = bench_training_step._trained(inputs.plain)
    with torch.autocast("cpu", enabled=False) as context:
        got = bench_training_step._gradients(lambda: inputs.plain(tokens, labels), parameters, context)
    assert bench_training_step._check_plain(TOY, got, expected) is None
    changed = tokens.clone()
    changed[:, -1] = 0
    assert not torch.equal(by_hand(inputs.plain, changed, labels), by_hand(inputs.plain, tokens, labels))


def test_cost_counts_the_products_of_a_step() -> None:
    """Those of the plain model with a dense mask, less the pairs and the logits that ours leaves out."""
    case = replace(TOY, sizes=TOY.sizes | {"attn_types": ("full",)})
    inputs = bench_training_step.Inputs(case, CPU)
    tokens, labels = inputs.sequence()
    with FlopCounterMode(display=False) as counted:
        by_hand(inputs.plain, tokens, labels).backward()
    sizes, n = case.sizes, tokens.shape[1]
    all_pairs, pairs = n * n, n * (n + 1) // 2
    logits = n * inputs.model.total_tokens
    needed = sizes["text_seq_len"] * inputs.model.num_text_tokens + decoding.n_image(case) * sizes["codes"]
    of_pairs = 12 * sizes["depth"] * sizes["heads"] * sizes["dim_head"] * (all_pairs - pairs)
    of_head = 6 * sizes["dim"] * (logits - needed)
    assert BENCHMARK.cost(case).flops == counted.get_total_flops() - of_pairs - of_head


def test_cost_counts_the_bytes_of_every_gradient(inputs: bench_training_step.Inputs) -> None:
    gradients = bench_training_step._trained(inputs.model).values()
    assert BENCHMARK.cost(TOY).result_bytes == sum(p.nbytes for p in gradients)


@pytest.mark.skipif(peers.missing() is not None, reason=f"the original is not installed: {peers.missing()}")
def test_the_original_is_verified() -> None:
    jobs, found = verified_jobs(BENCHMARK, TOY, CPU, ("original",))
    assert (list(jobs), found.refused, found.absent) == (["original"], {}, {})


@pytest.mark.long
def test_the_compiled_peer_is_verified() -> None:
    """Compiles for some ten seconds."""
    jobs, found = verified_jobs(BENCHMARK, replace(TOY, toy=False), CPU, ("plain_compiled",))
    assert (list(jobs), found.refused, found.absent) == (["plain_compiled"], {}, {})
