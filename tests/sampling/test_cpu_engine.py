"""The C++ engine computes what the model does: logits within the budget of float64, tokens those of its logits."""

from functools import cache

import pytest
import torch
from cpu_engine_cases import CPU_TYPES, OPTIONS, drawn, held_as, on_grid, one_pass, random_codes, stepped, text_of
from implementations import skip_without
from small_models import prompts, small_dalle
from tolerance import assert_within_budget

from dalle_fast import rng
from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.eager import EagerEngine
from dalle_fast.sampling.filters import Filters

GRIDS = [(3, 7), (7, 3), (1, 6), (6, 1), (5, 5)]


@pytest.fixture(autouse=True)
def with_extension():
    skip_without("cpu", "choose_token")


@cache
def case(name):
    """Model, text, codes, and its logits (exact, own) for each guidance."""
    model, double = small_dalle(torch.float32, **OPTIONS[name]), small_dalle(torch.float64, **OPTIONS[name])
    double.load_state_dict(model.state_dict())
    text, codes = text_of(model), random_codes(model)[:, :-1]
    expected = {scale: tuple(one_pass(m, text, codes, scale) for m in (double, model)) for scale in (1.0, 2.5)}
    return model, text, codes, expected


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_the_models(isa, name):
    model, text, codes, expected = case(name)
    for cond_scale, (exact, own) in expected.items():
        engine = CpuEngine(model, cond_scale=cond_scale, max_step=9)
        assert_within_budget(stepped(engine, text, codes, (5, 1, 9)), exact, own, f"guided by {cond_scale}")


@pytest.mark.parametrize(("name", "cond_scale"), [("cycle", 1.0), *((name, 2.5) for name in OPTIONS)])
def test_tokens_are_those_of_the_exact_logits(name, cond_scale):
    """Each is what the filters choose from float64's logits behind those before it: so all are what uncached drawing
    in float64 gives."""
    model, double = case(name)[0], small_dalle(torch.float64, **OPTIONS[name])
    double.load_state_dict(model.state_dict())
    filters = Filters(temperature=0.9, top_k=20, top_p=0.95)
    codes = drawn(model, prompts(3), cond_scale=cond_scale, temperature=0.9, top_k=20, top_p=0.95)
    assert codes.unique().numel() > 5
    logits = one_pass(double, model.padded_text(prompts(3)), codes[:, :-1], cond_scale)
    seeds = rng.seeds_to_tensor([11, 12, 13])
    for p in range(codes.shape[1]):
        expected = filters.token(logits[:, p].float(), seeds, p, rng.Stream.IMAGE_SAMPLING)
        assert torch.equal(codes[:, p], expected), f"token {p}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ["cycle", "no_rotary", "dim_head_100", "sandwich"])
def test_logits_of_narrow_weights(isa, name, dtype):
    """float64 and bfloat16 compute with the very weights that the engine holds."""
    model, text, codes, _ = case(name)
    held = held_as(model, dtype)
    exact, own = one_pass(held.double(), text, codes), one_pass(held.bfloat16(), text, codes).float()
    got = stepped(CpuEngine(model, weight_dtype=dtype, max_step=3), text, codes, (3, 1))
    assert_within_budget(got, exact, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype):
    """bfloat16 stays so, float16 is held as float32; tables are read in their own type."""
    model = small_dalle(torch.float32).to(dtype)
    text, codes = text_of(model), random_codes(model)[:, :-1]
    exact = one_pass(small_dalle(torch.float32).to(dtype).double(), text, codes)
    own = one_pass(model.bfloat16() if dtype == torch.bfloat16 else small_dalle(torch.float32), text, codes).float()
    assert_within_budget(stepped(CpuEngine(small_dalle(torch.float32).to(dtype)), text, codes), exact, own)


@pytest.mark.parametrize("options", [{}, {"rotary_emb": False, "dim": 40}, {"shift_tokens": False}])
def test_texts_are_read_token_by_token(isa, options):
    model, double = small_dalle(torch.float32, **options), small_dalle(torch.float64, **options)
    double.load_state_dict(model.state_dict())
    text, codes = text_of(model), random_codes(model)
    results = []
    with torch.no_grad():
        for engine in (CpuEngine(model, max_step=2), EagerEngine(double, max_step=2), EagerEngine(model, max_step=2)):
            of_text = [
                engine.prefill(text[:, :2]),
                *engine.step(text[:, 2:4]).unbind(1),
                engine.step(text[:, 4:5])[:, 0],
            ]
            of_image = [engine.step(text[:, 5:])[:, 0], *engine.step(codes[:, :2]).unbind(1)]
            results.append((torch.stack(of_text), torch.stack(of_image)))
    for got, exact, own in zip(*results, strict=True):
        assert_within_budget(got, exact, own)


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_of_any_shape(isa, grid):
    model = on_grid(grid)
    text, codes = text_of(model), random_codes(model)[:, :-1]
    exact, own = one_pass(on_grid(grid).double(), text, codes), one_pass(model, text, codes)
    assert_within_budget(stepped(CpuEngine(model, max_step=4), text, codes, (4, 1, 3)), exact, own)


# -- order of reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("grid", "shift_tokens"), [*((grid, True) for grid in GRIDS), ((3, 7), False)])
def test_steps_and_rollbacks_in_any_order_give_the_bits_of_one_pass(grid, shift_tokens, dtype):
    """Rings that wrap (dilation 2 among them), steps and rollbacks over row ends."""
    model = on_grid(grid, shift_tokens=shift_tokens)
    text, codes = text_of(model), random_codes(model)[:, :-1]
    n = codes.shape[1]
    expected = stepped(CpuEngine(model, weight_dtype=dtype), text, codes)
    all_at_once = CpuEngine(model, weight_dtype=dtype, max_step=n)
    assert torch.equal(stepped(all_at_once, text, codes, (n,)), expected)
    generator = torch.Generator().manual_seed(grid[0])
    for max_step, max_rollback in ((1, 4), (3, 0), (5, 6)):
        first = int(torch.randint(min(3, n), (), generator=generator))
        engine = CpuEngine(model, weight_dtype=dtype, max_step=max_step, max_rollback=max_rollback)
        with torch.no_grad():
            assert torch.equal(engine.prefill(text, codes[:, :first]), expected[:, first])
            at = furthest = first
            for _ in range(60):
                if at == n:
                    break
                m = min(1 + int(torch.randint(max_step, (), generator=generator)), n - at)
                assert torch.equal(engine.step(codes[:, at : at + m]), expected[:, at + 1 : at + 1 + m])
                at += m
                furthest = max(furthest, at)
                if max_rollback and torch.rand((), generator=generator) < 0.4:
                    back = min(max_rollback - (furthest - at), at - first)
                    back = int(torch.randint(back + 1, (), generator=generator))
                    engine.rollback(back)
                    at -= back


@pytest.mark.parametrize("first", [0, 1, 7, 8, 9, 40, 63])
def test_known_codes_give_the_bits_of_steps(first):
    model = small_dalle(torch.float32)
    text, codes = text_of(model), random_codes(model)[:, :-1]
    for cond_scale in (1.0, 3.0):
        expected = stepped(CpuEngine(model, cond_scale=cond_scale), text, codes)[:, first:]
        assert torch.equal(stepped(CpuEngine(model, cond_scale=cond_scale), text, codes, first=first), expected)


def test_drawing_equals_choosing_and_stepping():
    """Whole images, rows, single tokens; known codes among them; logits behind a draw are those of steps."""
    model, filters, seeds = on_grid((5, 5), CPU_TYPES[:4]), Filters(), torch.tensor([3, -4, 5])
    text, n = text_of(model), 25
    known = random_codes(model)
    known[torch.rand(known.shape, generator=torch.Generator().manual_seed(2)) < 0.7] = -1
    engine, codes = CpuEngine(model), known.clone()
    with torch.no_grad():
        logits = engine.prefill(text)
        for p in range(n):
            token = filters.token(logits, seeds, p, rng.Stream.IMAGE_SAMPLING)
            codes[:, p] = torch.where(known[:, p] >= 0, known[:, p], token)
            logits = engine.step(codes[:, p : p + 1])[:, 0] if p + 1 < n else logits
        for counts in ((n,), (5,) * 5, (1,) * n, (1, 0, 7, 17)):
            engine, again, first = CpuEngine(model, max_rollback=1), known.clone(), 0
            engine.prefill(text)
            for count in counts:
                engine.draw(again, first, count, filters, seeds)
                first += count
            assert torch.equal(again, codes)
        engine, again = CpuEngine(model, max_rollback=3), known.clone()
        engine.prefill(text)
        engine.draw(again, 0, 10, filters, seeds)
        engine.rollback(3)
        assert torch.equal(engine.step(again[:, 7:8]), stepped(CpuEngine(model), text, codes[:, :8])[:, 8:9])
        again[:, 8:] = known[:, 8:]
        engine.draw(again, 8, n - 8, filters, seeds)
        assert torch.equal(again, codes)


def test_an_engine_is_used_again():
    """Another prefill starts afresh, whatever was read before, and keeps texts it knows."""
    model = small_dalle(torch.float32)
    codes = random_codes(model)[:, :9]
    text, other = text_of(model), model.padded_text(prompts(3).flip(1))
    expected = [stepped(CpuEngine(model), t, codes) for t in (text, other)]
    engine = CpuEngine(model)
    for t, logits in ((text, 0), (other, 1), (text, 0), (text, 0)):
        assert torch.equal(stepped(engine, t, codes), expected[logits])
    assert torch.equal(stepped(engine, other[:1], codes[:1]), expected[1][:1])
    mixed = torch.cat((text[:2], other[:1]))
    assert torch.equal(
        stepped(engine, mixed, codes), torch.cat((expected[0][:2], stepped(engine, other[:1], codes[2:])))
    )
