"""The benchmark of sparse attention: what it refuses, what its costs count, what its peers owe."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import attention, attention_peers, bench_sparse_attention, peers
from benchmarks.bench_sparse_attention import BENCHMARK
from benchmarks.harness import Case, verified_jobs
from dalle_fast.functional import sparse_attention
from dalle_fast.patterns import AttentionPattern

CPU = torch.device("cpu")


def attention_case(label: str) -> Case:
    return next(case for case in bench_sparse_attention.CASES if case.label == label)


TOY_BACKWARD = "toy_axial_row forward+backward float32"


@pytest.mark.parametrize("result", range(4))
def test_attention_refuses_a_wrong_result_and_nan(result: int) -> None:
    case = attention_case(TOY_BACKWARD)
    inputs = attention.make_inputs(case, CPU)
    oracle = attention.Oracle(case, inputs)
    right = bench_sparse_attention._attend(case, inputs, "reference")
    pattern = attention.pattern_of(case)
    assert oracle.complaint(right, pattern) is None
    for wrong in (math.nan, 1e-3):
        broken = [x.clone() for x in right]
        broken[result][-1, -1, 7, 3] += wrong
        assert str(oracle.complaint(tuple(broken), pattern)).startswith(f"{attention.NAMES[result]} must be within")


def test_attention_is_judged_by_its_own_pattern() -> None:
    case = attention_case("toy_axial_col forward bfloat16")
    inputs = attention.make_inputs(case, CPU)
    oracle = attention.Oracle(case, inputs)
    causal = attention.causal_pattern(case)
    got = attention.attend_in(
        attention.FORWARD, functools.partial(sparse_attention, pattern=causal, impl="reference"), inputs
    )
    assert oracle.complaint(got, causal) is None
    assert oracle.complaint(got, attention.pattern_of(case), attention_peers.PEER_SLACK) is not None


def test_attention_is_judged_on_few_heads_of_a_large_case(monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention_case("toy_axial_row forward float32")
    sizes = case.sizes
    monkeypatch.setattr(attention, "JUDGED_SCORES", 2 * sizes["n"] ** 2)
    attention._right.cache_clear()
    inputs = attention.make_inputs(case, CPU)
    (out,) = bench_sparse_attention._attend(case, inputs, "reference")
    oracle, pattern = attention.Oracle(case, inputs), attention.pattern_of(case)
    assert oracle.complaint((out,), pattern) is None
    assert attention._right(pattern, *oracle._question).slices == (5, 2)
    out[-1, -1, -1, -1] += 1.0
    assert oracle.complaint((out,), pattern) is not None
    attention._right.cache_clear()


@pytest.mark.parametrize("case", [c for c in bench_sparse_attention.CASES if c.toy and c.dtype == torch.float32])
def test_attention_cost_counts_the_pairs_of_the_dense_mask(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROWS", 7)
    sizes = case.sizes
    pairs = int(attention.pattern_of(case).dense(sizes["n"]).sum()) * sizes["batch"] * sizes["heads"]
    attention.n_pairs.cache_clear()
    cost = attention.cost(case)
    assert cost.flops == (4 if case.mode == attention.FORWARD else 14) * sizes["head_dim"] * pairs
    results = bench_sparse_attention._attend(case, attention.make_inputs(case, CPU), "reference")
    assert cost.result_bytes == sum(x.numel() * x.element_size() for x in results)


def test_attention_cases_name_each_measurement_once() -> None:
    for device in ("cpu", "cuda"):
        labels = [case.label for case in bench_sparse_attention.CASES if case.device in (None, device)]
        assert len(labels) == len(set(labels))


@pytest.mark.parametrize("mode", [attention.FORWARD, attention.BOTH])
@pytest.mark.skipif(peers.missing() is not None, reason=f"the original is not installed: {peers.missing()}")
def test_layers_of_the_original_are_verified(mode: str) -> None:
    for name in bench_sparse_attention.EVERY:
        case = attention_case(f"toy_square_{name} {mode} float32")
        jobs, found = verified_jobs(BENCHMARK, case, CPU, ("original_layer",))
        assert (list(jobs), found.refused, found.absent) == (["original_layer"], {}, {})


class OriginalAttention(torch.nn.Module):
    """An attention class with the constructor of the original's, which computes `pattern` by our reference."""

    pattern: AttentionPattern

    def __init__(self, dim: int, seq_len: int, heads: int, dim_head: int, image_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = torch.nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = torch.nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, rotary_pos_emb: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        out = sparse_attention(q, k, v, pattern=self.pattern, impl="reference")
        return self.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", [attention.FORWARD, attention.BOTH])
def test_layers_of_the_original_are_judged_by_our_reference(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention_case(f"toy_square_axial_row {mode} float32")
    monkeypatch.setattr(peers, "missing", lambda: None)
    monkeypatch.setattr(peers, "attention_class", lambda pattern: (OriginalAttention, {}))
    for pattern, is_right in ((attention.pattern_of(case), True), (attention.causal_pattern(case), False)):
        monkeypatch.setattr(OriginalAttention, "pattern", pattern, raising=False)
        jobs, found = verified_jobs(BENCHMARK, case, CPU, ("original_layer",))
        assert (bool(jobs), bool(found.refused), found.absent) == (is_right, not is_right, {})


@pytest.mark.long
def test_flex_is_verified() -> None:
    """Compiles for ten seconds."""
    case = replace(attention_case("toy_conv_like forward float32"), toy=False)
    jobs, found = verified_jobs(BENCHMARK, case, CPU, ("flex",))
    assert (list(jobs), found.refused, found.absent) == (["flex"], {}, {})
