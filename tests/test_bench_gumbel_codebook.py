"""The benchmark of gumbel_codebook: what it refuses, what its costs count, what does not fit."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_gumbel_codebook, codebook, codebook_peers
from benchmarks.bench_gumbel_codebook import BENCHMARK, CASES
from benchmarks.harness import Case, verified_jobs

CPU = torch.device("cpu")
TOYS = [case for case in CASES if case.toy]


def codebook_case(label: str) -> Case:
    return next(case for case in CASES if case.label == label)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_wrong_results_codes_and_nan_are_refused(kind: str) -> None:
    case = codebook_case(f"toy_{kind} forward+backward float32")
    inputs = codebook.make_inputs(case, CPU)
    oracle = codebook.Oracle(case, inputs)
    right = bench_gumbel_codebook._call(case, inputs, "reference")
    assert oracle.complaint(right) is None
    for name, value in right.items():
        wrongs = (1,) if name.endswith("codes") else (math.nan, 1e-3)
        for wrong in wrongs:
            broken = value.clone()
            broken[(-1,) * broken.dim()] += wrong
            broken = broken % case.sizes["codes"] if name.endswith("codes") else broken
            assert str(oracle.complaint(right | {name: broken})).startswith(f"{name} must")
    assert "must give" in str(oracle.complaint({name: right[name] for name in right if name != "kl"}))
    assert "must give" in str(oracle.complaint({name: right[name] for name in right if name != "codes"}))


def test_a_case_with_two_codes_that_tie_is_refused() -> None:
    scores = torch.zeros(1, 3, 2, 2)
    both = {"codes": scores, "noisy_codes": scores}
    exact = {name: x.double() for name, x in both.items()}
    assert codebook._score_budgets(exact, both, scores, must_differ=False)["codes"] == 0
    with pytest.raises(RuntimeError, match="must differ"):
        codebook._score_budgets(exact, both, scores, must_differ=True)


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.label.replace(" ", "-"))
def test_cost_counts_the_tensors_and_their_products(case: Case) -> None:
    batch, height, width, n_features, n_codes, dim = codebook.sizes_of(case)
    inputs = codebook.make_inputs(case, CPU)
    results = bench_gumbel_codebook._call(case, inputs, "reference")
    cost = codebook.cost(case)
    assert cost.result_bytes == cost.write_bytes == sum(x.numel() * x.element_size() for x in results.values())
    parameters = sum(x.numel() * x.element_size() for x in inputs[:4])
    embeds = inputs.dembeds.numel() * inputs.dembeds.element_size()
    hard, backward = case.sizes["straight_through"], case.mode == codebook.BOTH
    assert cost.read_bytes == parameters * (1 + backward) + embeds * backward * (1 if hard else 2)
    products = {(False, False): (1, 1), (True, False): (1, 0), (False, True): (4, 3), (True, True): (4, 1)}
    of_features, of_codebook = products[hard, backward]
    pairs = batch * height * width * n_codes
    assert cost.flops == 2 * pairs * (of_features * n_features + of_codebook * dim)


def test_each_measurement_is_named_once() -> None:
    for device in ("cpu", "cuda"):
        labels = [case.label for case in CASES if case.device in (None, device)]
        assert len(labels) == len(set(labels))


def test_what_does_not_fit_is_absent_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    case = codebook_case("b64_soft forward+backward float32")
    monkeypatch.setattr(codebook_peers, "_free_bytes", lambda device: 16 * 10**9)
    reason = codebook_peers.too_large("original_lines", case, CPU)
    assert reason is not None and "about 15 GB for logits, noise and probabilities" in reason
    assert "16 GB are free" in reason
    monkeypatch.setattr(codebook_peers, "_free_bytes", lambda device: 64 * 10**9)
    assert codebook_peers.too_large("original_lines", case, CPU) is None


def test_few_lines_are_compiled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook_peers, "_free_bytes", lambda device: None)

    def is_compiled(case: Case) -> bool:
        return codebook_peers._missing(case, torch.device("cuda"), autocast=True, compiled=True) is None

    compiled = [case.label for case in CASES if case.device == "cuda" and is_compiled(case)]
    assert compiled == [f"b8_soft {codebook.BOTH} bfloat16"]


def test_free_memory_is_what_the_system_says(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook_peers, "MEMINFO", tmp_path / "meminfo")
    assert codebook_peers._free_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       7 kB\n")
    assert codebook_peers._free_bytes(CPU) == 7 * 1024


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.label.replace(" ", "-"))
def test_lines_under_autocast_are_judged_by_16_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook_peers, "has_bfloat16_products", lambda: True)
    jobs, found = verified_jobs(BENCHMARK, case, CPU, ("autocast_lines",))
    runs = case.dtype == torch.bfloat16 and not case.sizes["straight_through"]
    assert (bool(jobs), bool(found.absent), found.refused) == (runs, not runs, {})


def test_lines_of_another_temperature_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook_peers, "TEMPERATURE", 2.0)
    monkeypatch.setattr(codebook_peers, "has_bfloat16_products", lambda: True)
    case = codebook_case("toy_soft forward+backward bfloat16")
    jobs, found = verified_jobs(BENCHMARK, case, CPU, ("original_lines", "autocast_lines"))
    assert (jobs, len(found.refused)) == ({}, 2)


@pytest.mark.long
def test_compiled_lines_are_verified() -> None:
    """Compiles for ten seconds."""
    case = replace(codebook_case("toy_soft forward+backward float32"), toy=False)
    jobs, found = verified_jobs(BENCHMARK, case, CPU, ("original_compiled",))
    assert (list(jobs), found.refused, found.absent) == (["original_compiled"], {}, {})
