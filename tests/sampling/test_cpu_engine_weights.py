"""The C++ engine never draws with weights that are no longer the model's, and refuses in words what it cannot do."""

import copy

import pytest
import torch
from cpu_engine_cases import drawn, random_codes, stepped, text_of
from implementations import skip_without
from small_models import prompts, small_dalle
from torch import nn

from dalle_fast import patterns
from dalle_fast.sampling.cpu import CpuEngine


@pytest.fixture(autouse=True)
def with_extension():
    skip_without("cpu", "choose_token")


def seen(model):
    """What the engine makes of a model: logits of steps, one behind the other, and codes drawn."""
    text, codes = text_of(model), random_codes(model)[:, :4]
    logits = stepped(CpuEngine(model, cond_scale=1.5), text, codes)
    return torch.cat((logits.flatten(), codes_of(model).flatten().float()))


def codes_of(model, **settings):
    return drawn(model, prompts(2), cond_scale=1.5, **settings)


def an_optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = model(prompts(2), random_codes(model, 2), return_loss=True)
    loss.backward()
    optimizer.step()


def an_edit_in_place(model):
    with torch.no_grad():
        model.transformer.blocks[1].ff.fn.w_in.weight.mul_(-1)


def an_edit_of_data(model):
    """Neither version nor address changes."""
    weight = model.to_logits.weight
    before = weight._version, weight.data_ptr()
    weight.data[model.num_text_tokens :].mul_(-1)
    assert (weight._version, weight.data_ptr()) == before


def one_bit(model):
    weight = model.transformer.blocks[0].attn.fn.to_qkv.weight
    weight.data.view(torch.int32)[0, 0] ^= 1 << 30


def a_norm(model):
    model.transformer.blocks[2].attn.norm.bias.data += 1.0


def a_scale(model):
    model.transformer.blocks[2].ff.scale.data *= -1


def an_embedding(model):
    model.image_emb.weight.data.neg_()


def an_average_swapped_in(model):
    """As exponential averages of weights do: the same parameters over other memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * parameter.data.roll(1)


def a_state_dict(model):
    other = {name: value.roll(1) for name, value in model.state_dict().items()}
    model.load_state_dict(other)


def an_assigned_state_dict(model):
    model.load_state_dict({name: value.roll(1) for name, value in model.state_dict().items()}, assign=True)


def to_bfloat16_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def a_replaced_submodule(model):
    old = model.transformer.blocks[0].ff.fn.w_out
    model.transformer.blocks[0].ff.fn.w_out = nn.Linear(old.in_features, old.out_features)


def exchanged_blocks(model):
    blocks = model.transformer.blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def another_pattern(model):
    layout = model.layout
    block = model.transformer.blocks[0]
    block.attn.fn.pattern = patterns.make("axial_row", text_len=layout.text_len, grid=layout.grid)


CHANGES = [
    an_optimizer_step, an_edit_in_place, an_edit_of_data, one_bit, a_norm, a_scale, an_embedding,
    an_average_swapped_in, a_state_dict, an_assigned_state_dict, to_bfloat16_and_back, a_replaced_submodule,
    exchanged_blocks, another_pattern,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_stale_weights_are_impossible(change):
    """Bit for bit what a copy gives that no engine has seen."""
    model = small_dalle(torch.float32)
    before = seen(model)
    assert torch.equal(before, seen(model))
    torch.manual_seed(5)
    change(model)
    after = seen(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, seen(copy.deepcopy(model)))


def test_an_engine_takes_new_weights_at_its_next_prefill():
    model = small_dalle(torch.float32)
    text, codes = text_of(model), random_codes(model)[:, :3]
    engine = CpuEngine(model, max_step=3)
    before = stepped(engine, text, codes)
    engine.prefill(text)
    an_edit_of_data(model)
    with torch.no_grad():
        assert torch.equal(engine.step(codes), before[:, 1:])  # a drawing goes on as it began
    assert torch.equal(stepped(engine, text, codes), stepped(CpuEngine(copy.deepcopy(model)), text, codes))


def test_two_models_and_two_dtypes_take_turns():
    one, other = small_dalle(torch.float32), small_dalle(torch.float32)
    an_edit_of_data(other)
    expected = [codes_of(one), codes_of(other), codes_of(one, weight_dtype=torch.int8)]
    assert not torch.equal(expected[0], expected[1])
    for _ in range(2):
        assert torch.equal(codes_of(one), expected[0])
        assert torch.equal(codes_of(other), expected[1])
        assert torch.equal(codes_of(one, weight_dtype=torch.int8), expected[2])


# -- what the engine does not know (the reasons: test_engine_choice.py)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def a_hook(model):
    return model.logits_norm.register_forward_hook(lambda module, inputs, output: -output)


def a_subclass(model):
    model.to_logits.__class__ = Doubled


def a_parametrization(model):
    nn.utils.parametrize.register_parametrization(model.to_logits, "weight", Halved())


@pytest.mark.parametrize("change", [a_hook, a_subclass, a_parametrization])
def test_what_the_engine_does_not_know_takes_part(change):
    model, text = small_dalle(torch.float32), prompts(1)
    before = drawn(model, text, engine="auto")
    assert torch.equal(before, drawn(model, text))
    change(model)
    after = drawn(model, text, engine="auto")
    assert not torch.equal(after, before)
    assert torch.equal(after, drawn(model, text, engine="eager"))
    with pytest.raises(NotImplementedError, match="engine='cpu' cannot run here"):
        drawn(model, text)


def test_a_hook_that_goes_away_brings_the_engine_back():
    model = small_dalle(torch.float32)
    before = codes_of(model)
    a_hook(model).remove()
    assert torch.equal(codes_of(model), before)


# -- bad input


def test_steps_and_rollbacks_beyond_the_bounds_are_refused_and_change_nothing():
    model = small_dalle(torch.float32)
    text, codes = text_of(model), random_codes(model)
    expected = stepped(CpuEngine(model), text, codes[:, :-1])
    engine, seeds = CpuEngine(model, max_step=3, max_rollback=2), torch.arange(3)
    with torch.no_grad():
        engine.prefill(text, codes[:, :5])
        refused = [
            (lambda: engine.step(codes[:, :4]), "a step must add at most max_step=3 positions, got 4"),
            (lambda: engine.step(torch.full((3, 1), 30)), r"image codes must be in 0\.\.29, got 30"),
            (lambda: engine.step(torch.full((3, 1), -1)), "image codes must be in"),
            (lambda: engine.step(codes[:2, 5:6]), r"step: tokens must be \[B=3, M\], .* got \[2, 1\]"),
            (lambda: engine.step(codes[0, 5:6]), r"step: tokens must be \[B=3, M\], .* got \[1\]"),
            (lambda: engine.rollback(3), r"rollback: n must be in 0\.\."),
            (lambda: engine.rollback(-1), r"rollback: n must be in 0\.\."),
            (lambda: engine.rollback(6), r"rollback: n must be in 0\.\."),
            (lambda: engine.draw(codes[:2], 5, 1, None, None), r"draw: codes must be \[B=3, M\]"),
            (lambda: engine.draw(codes[:, :5], 5, 1, None, None), r"draw: codes must be \[B, 64\]"),
            (lambda: engine.draw(codes, 4, 1, None, seeds), "first must be the number of codes read, 5"),
            (lambda: engine.draw(codes, 5, 60, None, seeds), r"count must be in 0\.\.59, got 60"),
            (lambda: engine.draw(codes, 5, 1, None, seeds[:2]), r"draw: seeds must be int64 \[B=3\], got \[2\]"),
            (lambda: engine.prefill(text[:, :3], codes[:, :1]), "codes must follow a text of 6 tokens, got 3"),
            (lambda: engine.prefill(text, codes[:2, :1]), r"prefill: codes must be \[B=3, m\], .* got \[2, 1\]"),
            (lambda: engine.prefill(text[:0]), "at least one prompt"),
            (lambda: engine.prefill(torch.full((1, 6), 99)), "text ids must be in"),
        ]
        for call, message in refused:
            with pytest.raises(ValueError, match=message):
                call()
        assert torch.equal(engine.step(codes[:, 5:6]), expected[:, 6:7])
        engine.rollback(1)
        engine.rollback(1)
        with pytest.raises(ValueError, match="rollback: n must be in"):
            engine.rollback(1)
        assert torch.equal(engine.step(codes[:, 4:6]), expected[:, 5:7])
        for first in range(6, 64, 3):
            engine.step(codes[:, first : first + 3])
        with pytest.raises(ValueError, match="exceed the sequence"):
            engine.step(codes[:, :2])


def test_an_engine_before_prefill_says_what_is_missing():
    engine = CpuEngine(small_dalle(torch.float32))
    for call in (
        lambda: engine.step(torch.zeros(1, 1, dtype=torch.long)),
        lambda: engine.rollback(1),
        lambda: engine.draw(torch.zeros(1, 64, dtype=torch.long), 0, 1, None, None),
    ):
        with pytest.raises(ValueError, match=r"Call prefill before|rollback: n must be in 0\.\.0"):
            call()
