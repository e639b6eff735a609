"""Attention layers on every implementation: what they keep for the backward pass, checkpointing, compilation."""

import pytest
import torch
from small_models import ALL_TYPES, prompts, small_dalle
from tolerance import assert_within_budget
from torch.utils.checkpoint import checkpoint

from dalle_fast import patterns
from dalle_fast.models.attention import Attention
from dalle_fast.models.clip import CLIP
from dalle_fast.models.rotary import rotary_angles

TEXT_LEN, GRID = 33, (8, 9)
# Tracing goes through the oracle's cache of dense masks and warns that it does not keep it.
through_a_cache = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def layer_and_input(name="axial_col", batch=2, heads=2, width=16):
    """An attention layer in training, x [B, N, C] that requires a gradient, and rotary angles."""
    torch.manual_seed(3)
    pattern = patterns.make(name, text_len=TEXT_LEN, grid=GRID)
    layer = Attention(24, pattern=pattern, heads=heads, dim_head=width)
    x = torch.randn(batch, pattern.layout.max_inputs, 24, requires_grad=True)
    return layer, x, rotary_angles(pattern.layout, width)


def gradients(function, layer, x):
    """Gradients of the layer's parameters and of x for the sum of squares of what `function` returns."""
    inputs = [*layer.parameters(), x]
    for t in inputs:
        t.grad = None
    function(x).square().sum().backward()  # not autograd.grad, which reentrant checkpointing forbids
    return [t.grad for t in inputs]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kept_for_backward(layer, x, rotary):
    """Numbers of elements that a forward pass keeps beside parameters and angles, one for each piece of memory."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, rotary=rotary)
    constants = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), rotary)}
    return [size for address, size in kept.items() if address not in constants]


@pytest.mark.parametrize("name", ["full", *ALL_TYPES[1:], "paper_row", "paper_conv", "block_sparse"])
def test_a_layer_keeps_nothing_of_the_size_of_its_scores(name, attention):
    layer, x, rotary = layer_and_input(name)
    kept = kept_for_backward(layer, x, rotary)
    batch, n, _ = x.shape
    if attention == "reference":
        assert max(kept) >= batch * n * n, "the oracle keeps its scores: or this test sees nothing"
    else:
        # x, q with k and v in one piece, o, two numbers a query and head
        assert sum(kept) <= batch * n * (24 + 3 * 32 + 32 + 2 * 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant, attention):
    layer, x, rotary = layer_and_input()
    mask = torch.rand(2, TEXT_LEN) > 0.3

    def attend(x):
        return layer(x, mask=mask, rotary=rotary)

    checkpointed = gradients(lambda x: checkpoint(attend, x, use_reentrant=use_reentrant), layer, x)
    assert same(checkpointed, gradients(attend, layer, x))


def test_autocast_equals_a_layer_in_sixteen_bits(attention):
    layer, x, rotary = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, rotary=rotary)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer.bfloat16()(x.bfloat16(), rotary=rotary))


@through_a_cache
def test_a_layer_compiles_into_one_graph(attention):
    layer, x, rotary = layer_and_input("conv_like")
    mask = torch.rand(2, TEXT_LEN) > 0.3

    def attend(x):
        return layer(x, mask=mask, rotary=rotary)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert same(gradients(compiled, layer, x), gradients(attend, layer, x))


def training_step(model, run):
    """Of one batch: the loss, and the gradients of all parameters in one row, so that the largest set the scale."""
    text, codes = prompts(2), torch.randint(0, 30, (2, 64), generator=torch.Generator().manual_seed(1))
    loss = run(text, codes, return_loss=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


TWO_LAYERS = {"depth": 2, "attn_types": ("axial_row", "conv_like")}


@through_a_cache
def test_a_whole_model_compiles_into_one_graph(attention):
    dalle = small_dalle(torch.float32, **TWO_LAYERS).train()
    torch.compiler.reset()
    compiled = torch.compile(dalle, fullgraph=True, backend="aot_eager")
    assert same(training_step(dalle, compiled), training_step(dalle, dalle))


@pytest.mark.long
def test_a_whole_model_compiles_to_machine_code():
    dalle, exact = (small_dalle(dtype, **TWO_LAYERS).train() for dtype in (torch.float32, torch.float64))
    exact.load_state_dict(dalle.state_dict())
    torch.compiler.reset()
    got = training_step(dalle, torch.compile(dalle, fullgraph=True))[1]
    assert_within_budget(got, training_step(exact, exact)[1], training_step(dalle, dalle)[1])


@through_a_cache
@pytest.mark.parametrize("name", ["axial_row", "block_sparse"])
def test_equal_layers_share_one_compiled_graph(name, attention):
    """Patterns are guarded by value: compiled block by block, a deep model must not compile each of its blocks."""
    layers = [layer_and_input(name)[0] for _ in range(3)]
    _, x, rotary = layer_and_input(name)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    for layer in layers:
        layer.compile(fullgraph=True, backend=count)
        layer(x, rotary=rotary)
    assert len(graphs) == 1


def test_clip_runs_on_it_with_its_masks(attention):
    torch.manual_seed(0)
    clip = CLIP(
        dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=20, text_enc_depth=1, text_seq_len=6, text_heads=1,
        visual_enc_depth=1, visual_heads=1, visual_image_size=8, visual_patch_size=4,
    )  # fmt: skip
    text, images = torch.randint(1, 20, (3, 6)), torch.rand(3, 3, 8, 8)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    changed = torch.where(mask, text, 7)
    with torch.no_grad():
        assert torch.equal(clip(text, images, text_mask=mask), clip(changed, images, text_mask=mask))
        assert not torch.equal(clip(text, images), clip(changed, images))
