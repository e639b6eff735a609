"""The engine's interface: prefill, steps of M tokens, rollback, text steps; caches of the size their patterns need."""

import pytest
import torch
from small_models import prompts, small_dalle

from dalle_fast.models.cache import DecodeCache
from dalle_fast.models.transformer import Transformer
from dalle_fast.sampling.eager import EagerEngine, UncachedEngine

TYPES = ("full", "axial_row", "axial_col", "conv_like", "sparse", "paper_row", "paper_conv")


@pytest.mark.parametrize("grid", [(3, 7), (7, 3), (1, 6), (6, 1)])
@pytest.mark.parametrize("shift_tokens", [True, False])
@pytest.mark.parametrize(("max_step", "max_rollback"), [(1, 0), (1, 4), (3, 0), (5, 6)])
def test_steps_and_rollbacks_in_any_order_equal_one_pass(grid, shift_tokens, max_step, max_rollback):
    """Non-square grids through the transformer's API, rings that wrap, rollbacks over row ends; float64."""
    torch.manual_seed(0)
    n = 4 + grid[0] * grid[1]
    model = Transformer(
        dim=24,
        depth=len(TYPES),
        seq_len=n,
        heads=2,
        dim_head=12,
        attn_types=TYPES,
        image_fmap_size=grid,
        shift_tokens=shift_tokens,
    ).double()
    for block in model.blocks:
        torch.nn.init.uniform_(block.attn.scale, 0.3, 0.8)
    x = torch.randn(2, n, 24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(max_step)
    with torch.no_grad():
        expected = model(x)
        cache = DecodeCache(model.layout, max_step=max_step, max_rollback=max_rollback)
        prefix = 5 + int(torch.randint(3, (), generator=generator))
        torch.testing.assert_close(model(x[:, :prefix], cache=cache), expected[:, :prefix], rtol=0, atol=1e-12)
        since_rollback = 0
        while cache.offset < n:
            m = min(1 + int(torch.randint(max_step, (), generator=generator)), n - cache.offset)
            start = cache.offset
            out = model(x[:, start : start + m], cache=cache)
            torch.testing.assert_close(out, expected[:, start : start + m], rtol=0, atol=1e-12)
            since_rollback += m
            if max_rollback and since_rollback > 6 and cache.offset < n:
                cache.rollback(min(max_rollback, cache.offset - prefix))
                since_rollback = 0


def test_a_transformer_decodes_text_token_by_token():
    torch.manual_seed(1)
    model = Transformer(
        dim=24, depth=4, seq_len=6 + 9, heads=2, dim_head=12, attn_types=TYPES[:4], image_fmap_size=3, shift_tokens=True
    ).double()
    x = torch.randn(1, 15, 24, dtype=torch.float64)
    with torch.no_grad():
        expected, cache = model(x), DecodeCache(model.layout)
        steps = torch.cat([model(x[:, i : i + 1], cache=cache) for i in range(15)], dim=1)
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-12)


def test_engines_agree_on_steps_of_many_tokens_and_rollback():
    model, prompt = small_dalle(), None
    prompt = model.padded_text(prompts(2))
    codes = torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(4))
    engines = EagerEngine(model, max_step=9, max_rollback=3), UncachedEngine(model)
    with torch.no_grad():
        logits = [engine.prefill(prompt, codes[:, :3]) for engine in engines]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
        for first, last, back in ((3, 12, 2), (10, 11, 0), (11, 20, 3), (17, 20, 0)):
            logits = [engine.step(codes[:, first:last]) for engine in engines]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
            for engine in engines:
                engine.rollback(back)


def test_sparse_caches_hold_what_their_patterns_need():
    """Keys and values of one sample, float64, 2 heads of 16: text 6, grid 8 x 8, against 70 positions for `full`."""
    slots = {"full": 64, "axial_row": 8, "axial_col": 64, "conv_like": 4 * 9 + 1}
    for name, image in slots.items():
        model = small_dalle(attn_types=name)
        engine = EagerEngine(model)
        with torch.no_grad():
            engine.prefill(model.padded_text(prompts(1)))
        assert engine.nbytes == 4 * 2 * 2 * (6 + image) * 16 * 8  # depth, k and v, heads, slots, width, bytes


def test_bad_use_is_refused_in_words():
    model = small_dalle()
    prompt = model.padded_text(prompts(1))
    with torch.no_grad():
        engine = EagerEngine(model, max_step=2, max_rollback=1)
        with pytest.raises(ValueError, match=r"rollback: n must be in 0\.\.0"):
            engine.rollback(1)
        engine.prefill(prompt)
        with pytest.raises(ValueError, match="max_step=2"):
            engine.step(torch.zeros(1, 3, dtype=torch.long))
        engine.step(torch.zeros(1, 2, dtype=torch.long))
        with pytest.raises(ValueError, match="made for rollbacks of 1"):
            engine.rollback(2)
        engine.rollback(1)
        with pytest.raises(ValueError, match=r"n must be in 0\.\.0"):
            engine.rollback(1)
        with pytest.raises(ValueError, match="exceed the sequence"):
            EagerEngine(model, max_step=70).prefill(prompt, torch.zeros(1, 66, dtype=torch.long))
        with pytest.raises(ValueError, match="rollback: n must be"):
            uncached = UncachedEngine(model)
            uncached.prefill(prompt)
            uncached.rollback(1)
    with pytest.raises(ValueError, match="max_step must be >= 1"):
        DecodeCache(model.layout, max_step=0)
    with pytest.raises(ValueError, match="at least one id"):
        small_dalle(shared_attn_ids=())
    with pytest.raises(ValueError, match="cannot be combined"):
        model.transformer(
            torch.zeros(1, 3, 32, dtype=torch.float64),
            mask=torch.ones(1, 6, dtype=torch.bool),
            cache=DecodeCache(model.layout),
        )


def test_a_text_step_may_not_cross_into_the_image():
    model = small_dalle()
    engine = EagerEngine(model, max_step=4)
    with torch.no_grad():
        engine.prefill(model.padded_text(prompts(1))[:, :3])
        with pytest.raises(ValueError, match="cross from text to image"):
            engine.step(torch.ones(1, 3, dtype=torch.long))


def test_weights_changed_between_steps_take_part_at_once():
    model, prompt = small_dalle(), None
    prompt, token = model.padded_text(prompts(1)), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        engine = EagerEngine(model, max_rollback=1)
        engine.prefill(prompt)
        before = engine.step(token)
        engine.rollback(1)
        model.to_logits.bias.data += 1.0
        torch.testing.assert_close(engine.step(token), before + 1.0, rtol=0, atol=1e-12)
