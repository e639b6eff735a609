"""The benchmarks of decoding: what they refuse, what their costs count, what the peers owe."""

import copy
import math
from pathlib import Path

import pytest
import torch
from test_benchmark_tables import written_row
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_choose_token,
    bench_prefill,
    bench_ranking,
    bench_sampler,
    decode_curves,
    decoding,
    decoding_peers,
    int8_loss,
    peers,
    report,
)
from benchmarks.decoding import Inputs, Oracle, Places
from benchmarks.harness import Case, verified_jobs
from dalle_fast import _extension
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.reference import choose_token as reference

CPU = torch.device("cpu")
TOY, TOY_BFLOAT16 = (case for case in bench_sampler.BENCHMARK.cases if case.toy)
ODD = next(case for case in bench_sampler.BENCHMARK.cases if case.name == "odd")
BATCH = Case("batch", TOY.sizes | {"batch": 3})

needs_extension = pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))


@pytest.fixture(scope="module")
def toy() -> tuple[Inputs, Oracle]:
    inputs = Inputs(TOY, CPU)
    oracle = Oracle(TOY, inputs)
    assert 0 < oracle.budget < 1e-4
    return inputs, oracle


def test_every_declared_case_has_a_model() -> None:
    modules = bench_choose_token, bench_prefill, bench_ranking, bench_sampler
    grids = {case.sizes["grid"] for module in modules for case in module.BENCHMARK.cases if "grid" in case.sizes}
    for grid in grids:
        DiscreteVAE(image_size=8 * grid, num_layers=3, num_tokens=4, codebook_dim=4, hidden_dim=4)


# ------------------------------------------------------------------------------------------------ what is refused


@needs_extension
def test_wrong_tokens_are_refused(toy: tuple[Inputs, Oracle]) -> None:
    inputs, oracle = toy
    got = bench_sampler._prepare_cpu(TOY, inputs, CPU, weight_dtype=None).result()
    assert bench_sampler._check_tokens(TOY, got, oracle) is None
    for which in ("greedy", "sampled"):
        broken = got | {which: got[which].clone()}
        broken[which][0, -1] = (broken[which][0, -1] + 1) % TOY.sizes["codes"]
        assert f"{which} tokens must lead, token 15 of sample 0" in str(
            bench_sampler._check_tokens(TOY, broken, oracle)
        )


@needs_extension
def test_weights_of_8_bits_are_judged_by_what_they_hold(toy: tuple[Inputs, Oracle]) -> None:
    inputs8 = Inputs(TOY_BFLOAT16, CPU)
    oracle8 = Oracle(TOY_BFLOAT16, inputs8)
    got = bench_sampler._prepare_cpu(TOY_BFLOAT16, inputs8, CPU, weight_dtype=torch.int8).result()
    assert bench_sampler._check_tokens(TOY_BFLOAT16, got, oracle8, int8=True) is None
    moved = oracle8.of_int8.exact - oracle8.exact
    assert moved.abs().max() > 0 and not torch.equal(toy[1].of_int8.exact, toy[1].exact)


def test_rounding_to_8_bits_is_to_the_nearest_of_255(toy: tuple[Inputs, Oracle]) -> None:
    model = copy.deepcopy(toy[0].model)
    with torch.no_grad():
        model.to_logits.weight[0] = 0.0
    rounded = decoding.rounded_to_int8(model)
    for name, weight in model.transformer.named_parameters():
        got = rounded.transformer.get_parameter(name)
        if weight.dim() != 2:
            assert torch.equal(got, weight)
            continue
        for own, theirs in zip(weight.split(128, dim=1), got.split(128, dim=1), strict=True):
            step = own.abs().amax(dim=1, keepdim=True) / 127
            assert bool(((theirs - own).abs() <= 0.5001 * step).all()) and not torch.equal(own, theirs)
            assert torch.allclose(theirs / step, (theirs / step).round(), rtol=0, atol=1e-3)
    assert not rounded.to_logits.weight[0].any()


@pytest.mark.parametrize("prepare", [bench_sampler._prepare_uncached, bench_sampler._prepare_eager])
def test_wrong_logits_are_refused(toy: tuple[Inputs, Oracle], prepare: object) -> None:
    inputs, oracle = toy
    got = prepare(TOY, inputs, CPU).result()
    assert decoding.check_logits(TOY, got, oracle) is None
    first = min(got)
    for wrong in (math.nan, 4 * oracle.budget):
        broken = {position: logits.clone() for position, logits in got.items()}
        broken[first][0, 1] += wrong
        assert f"logits of token {first}" in str(decoding.check_logits(TOY, broken, oracle))


@pytest.mark.skipif(peers.missing() is not None, reason=f"the original is not installed: {peers.missing()}")
def test_original_is_verified_and_refused_with_its_cache_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("original", "original_mended", "original_mended_masks")
    jobs, found = verified_jobs(bench_sampler.BENCHMARK, TOY, CPU, wanted)
    assert (tuple(jobs), found.refused, found.absent) == (wanted, {}, {})
    monkeypatch.setattr(peers, "mend_cache", lambda model: model)
    jobs, found = verified_jobs(bench_sampler.BENCHMARK, TOY, CPU, wanted)
    assert tuple(jobs) == ("original",)
    assert len(found.refused) == 2


# ------------------------------------------------------------------------------------------------ the static cache


@pytest.mark.parametrize("case", [BATCH, ODD, TOY_BFLOAT16], ids=["batch", "odd", "bfloat16"])
def test_static_cache_owes_the_oracles_logits(case: Case) -> None:
    """Uncompiled; at positions of a filled cache, whose runs leave it as it was."""
    inputs = Inputs(case, CPU)
    oracle = Oracle(case, inputs)
    job = decoding_peers.static_cache_job(case, inputs)
    for _ in range(2):
        assert decoding_peers._check_static_cache(case, job.result(), oracle) is None
        for call in job.pieces.values():
            call()
        if "image" in job.pieces:  # it puts what it drew into the cache
            break
    broken = {position: logits + 40 * oracle.budget for position, logits in job.result().items()}
    assert "must be within" in str(decoding_peers._check_static_cache(case, broken, oracle))


def test_static_cache_draws_from_its_prompt(toy: tuple[Inputs, Oracle]) -> None:
    """A whole image of one's own, each token among the best of what the oracle says, with its noise switched off."""
    inputs, oracle = toy
    decoder = decoding_peers.StaticCacheDecoder(inputs.model, 1)
    decoder.drawn = lambda logits: logits.argmax(dim=-1)
    drawn = [decoder.drawn(decoder.prefill(inputs.prompt))]
    for place in torch.arange(decoding.n_image(TOY) - 1):
        drawn.append(decoder.step(drawn[-1], place)[0])
    assert oracle.complaint_of_tokens(torch.stack(drawn, dim=1), 0.0, "greedy") is None


# ------------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize("case", [TOY, ODD, BATCH], ids=["toy", "odd", "batch"])
def test_cost_counts_the_weights_of_the_model_and_the_keys_of_its_windows(case: Case) -> None:
    """A step reads every matrix of the transformer and the image rows of the head; the text once for all samples."""
    inputs = Inputs(case, CPU)
    matrices = [p for p in inputs.model.transformer.parameters() if p.dim() == 2]
    matrices.append(inputs.model.to_logits.weight[-case.sizes["codes"] :])
    sizes = case.sizes
    text_len = sizes["text_seq_len"] + 1
    keys = 0
    for layer in range(sizes["depth"]):
        pattern = inputs.model.transformer.blocks[layer].attn.fn.pattern
        for query in range(text_len, pattern.layout.max_inputs):
            keys += text_len + sizes["batch"] * (len(pattern.window(query)) - text_len)
    cache = 2 * sizes["heads"] * sizes["dim_head"] * keys
    steps = sizes["grid"] ** 2
    cost = decoding.cost(case)
    assert cost.read_bytes == 4 * (steps * sum(p.numel() for p in matrices) + cache)
    assert (cost.items, cost.unit, cost.steps) == (sizes["batch"], "images", steps)
    scales = sum(4 * len(p) * -(-p.shape[1] // 128) for p in matrices)
    assert decoding.weight_bytes(case, torch.int8) == sum(p.numel() for p in matrices) + scales
    eight = decoding.cost(case, torch.int8)
    assert eight.read_bytes == steps * decoding.weight_bytes(case, torch.int8) + 4 * cache


def test_cost_of_a_prompt_counts_its_products(toy: tuple[Inputs, Oracle]) -> None:
    case = next(case for case in bench_prefill.CASES if case.toy)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        inputs = Inputs(case, CPU)
        hidden = inputs.model.transformer(inputs.model.embed_text(inputs.prompt))
        inputs.model.image_logits(hidden[:, -1:])
    sizes = case.sizes
    n, inner = sizes["text_seq_len"] + 1, sizes["heads"] * sizes["dim_head"]
    attention = 4 * inner * sizes["depth"] * n * (n + 1) // 2
    by_op = counted.get_flop_counts()["Global"]
    # the products of attention are of an op that the counter does not know, or (its oracle) of keys that no token sees
    dense = sum(by_op.get(op, 0) for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    assert bench_prefill.cost(case).flops == counted.get_total_flops() - dense + attention


def test_cost_of_pixels_and_ranks_counts_their_products() -> None:
    case = next(case for case in bench_ranking.CASES if case.toy)
    models = bench_ranking.Models(case, CPU)
    tokens = models.tokens_of_all()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        images = models.model.vae.decoder(models.model.vae._embeds(tokens, case.sizes["grid"]))
        models.clip._text_latents(models.text, None)
        models.clip._image_latents(images)
    latents = 2 * (1 + len(images)) * case.sizes["clip_dim"] ** 2
    counted_flops = counted.get_total_flops() - latents
    assert bench_ranking.cost(case).flops == pytest.approx(counted_flops, rel=0.02)


def test_ranking_refuses_wrong_pixels_and_scores() -> None:
    case = next(case for case in bench_ranking.CASES if case.toy)
    models = bench_ranking.Models(case, CPU)
    expected = bench_ranking.Expected(case, models)
    got = bench_ranking._prepare(case, models, CPU).result()
    assert expected.complaint(got) is None
    for name in got:
        broken = got | {name: got[name].clone()}
        broken[name][(-1,) * broken[name].dim()] += 1e-3
        assert str(expected.complaint(broken)).startswith(f"{name} must be within")


# ------------------------------------------------------------------------------------------------ sampled positions


def test_extrapolation_is_exact_for_a_line() -> None:
    points = [(1, 5.0), (4, 11.0), (5, 13.0), (11, 25.0)]
    assert decoding.sum_interpolated(points) == sum(3 + 2 * p for p in range(1, 12))


def test_runs_of_tokens_make_a_whole_image() -> None:
    case = Case("line", TOY.sizes | {"grid": 10})
    drawn: list[tuple[int, int]] = []
    places = Places(first=1, run=8, count=3)
    job = decoding.sampled_job(case, lambda p, n: drawn.append((p, n)), {"prompt": lambda: None}, places)
    assert places.of(case) == [1, 47, 92]
    for call in job.pieces.values():
        call()
    assert drawn == [(1, 8), (47, 8), (92, 8)]
    seconds = {f"token {p}": 8 * 2.0 for p in (1, 47, 92)} | {"prompt": 5.0}
    assert job.combine(seconds) == 2.0 * 99 + 5.0, "tokens 1 .. 99 at two seconds each, token 0 from the prompt"
    assert "8 tokens from each of 1, 47, 92 of 100" in str(job.extrapolated)


# ------------------------------------------------------------------------------------------------ one token


@pytest.mark.parametrize("case", bench_choose_token.CASES, ids=lambda case: case.name)
def test_torch_lines_choose_the_oracles_tokens(case: Case) -> None:
    inputs = bench_choose_token._inputs(case, CPU)
    expected = bench_choose_token._expected(case, inputs)
    filters = bench_choose_token._filters(case)
    got = bench_choose_token.torch_lines(inputs.logits, inputs.noise, **filters)
    assert bench_choose_token._check(case, got, expected) is None
    assert "tokens must be" in str(bench_choose_token._check(case, got + 1, expected))
    drawn = bench_choose_token.torch_lines(inputs.logits, None, **filters)
    kept = reference.filtered(inputs.logits, **filters).gather(1, drawn[:, None])
    assert bool(kept.isfinite().all())


# ------------------------------------------------------------------------------------------------ the loss


def test_losses_of_rounded_weights_stand_beside_that_of_the_model(toy: tuple[Inputs, Oracle]) -> None:
    model = toy[0].model
    text, codes = toy[0].text.expand(3, -1), torch.randint(TOY.sizes["codes"], (3, decoding.n_image(TOY)))
    found = int8_loss.losses(model, text, codes)
    assert list(found) == ["float32", "bfloat16", "int8"] and len(set(found.values())) == 3
    exact = decoding._image_logits(copy.deepcopy(model).double(), toy[0], codes, TOY.sizes["codes"])
    wanted = torch.nn.functional.cross_entropy(exact.flatten(0, 1), codes.flatten()).item()
    assert found["float32"] == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------------------------------------ plots


def decoded_row(impl: str, dtype: str, seconds: float, **sizes: object) -> dict:
    row = written_row(impl, seconds) | {
        "op": "sampler",
        "case": "-".join(map(str, sizes.values())),
        "dtype": dtype,
        "sizes": TOY.sizes | {"attn_types": list(TOY.sizes["attn_types"])} | sizes,
    }
    row["values"]["step"] = {"value": seconds / 100, "unit": "s"}
    row["values"]["of_ceiling"] = {"value": 40.0, "unit": "%"}
    return row


def test_curves_are_drawn_over_batches_and_grids(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    batches = [
        decoded_row(impl, dtype, 2.0 + batch, batch=batch)
        for impl in ("ours_cpu", "ours_cpu_int8", "static_cache_compiled")
        for dtype in ("float32", "bfloat16")
        for batch in (1, 4)
    ]
    grids = [
        decoded_row("ours_cpu", "bfloat16", grid**2, grid=grid, pattern=name, sweep="grid")
        for grid in (16, 32)
        for name in ("cycle", "row")
    ]
    alone = decoded_row("ours_cpu", "float32", 2.0, batch=1, dim=64)
    paths = report.plot([*batches, *grids, alone], tmp_path)
    drawn = {path.name for path in paths}
    assert {"sampler-sweep_grid-bfloat16-cpu.png", "sampler-1-batch-cpu.png"} <= drawn
    assert not any("sweep" in name and "forward" in name for name in drawn)
    assert decode_curves.images_a_second(reversed(batches[:2])) == [(1, 1 / 3.0), (4, 4 / 6.0)]
    assert decode_curves.token_ms(grids[:3:2], of_ceiling=True) == [(16, 1024.0), (32, 4096.0)]
