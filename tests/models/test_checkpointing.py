"""Recomputing blocks in the backward pass: the same bits from less memory."""

import pytest
import torch
from small_models import prompts, small_dalle


def step(dalle, *, bits16=False):
    """Loss and gradients of a training step, and how many bytes the forward pass kept for the backward one."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    dalle.train().zero_grad()
    codes = torch.randint(30, (2, 64), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bits16):
            loss = dalle(prompts(2), codes, return_loss=True)
        loss.backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in dalle.parameters()}
    n_bytes = sum(size for place, size in kept.items() if place not in own)
    return [loss.detach(), *(p.grad for p in dalle.parameters() if p.grad is not None)], n_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bits16", [False, True])
def test_checkpointing_gives_the_same_bits(dropout, bits16):
    dalle = small_dalle(torch.float32, attn_dropout=dropout, ff_dropout=dropout)
    plain, _ = step(dalle, bits16=bits16)
    dalle.transformer.checkpointing = True
    again, _ = step(dalle, bits16=bits16)
    assert len(plain) == len(again) > 20
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_keeps_blocks_inputs_alone():
    shallow, deep = (small_dalle(torch.float32, depth=depth) for depth in (4, 8))
    for dalle in (shallow, deep):
        dalle.transformer.checkpointing = True
    more = step(deep)[1] - step(shallow)[1]
    positions, width, blocks = 2 * (6 + 64 - 1), 32, 4
    assert 0 < more <= blocks * 4 * positions * width


def test_checkpointing_leaves_reversible_models_and_drawing_alone():
    reversible = small_dalle(torch.float32, reversible=True)
    plain, _ = step(reversible)
    reversible.transformer.checkpointing = True
    for one, other in zip(plain, step(reversible)[0], strict=True):
        assert torch.equal(one, other)
    dalle = small_dalle(torch.float64)
    drawn = dalle.generate_images(prompts(2), seed=0, engine="eager")
    dalle.transformer.checkpointing = True
    assert torch.equal(drawn, dalle.generate_images(prompts(2), seed=0, engine="eager"))
