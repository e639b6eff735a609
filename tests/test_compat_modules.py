"""The original's stand-alone layers: containers of layer pairs, attention layers, pixel ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dalle_fast.attention import Attention, SparseAttention, SparseAxialCausalAttention, SparseConvCausalAttention
from dalle_fast.reversible import ReversibleSequence, SequentialSequence
from dalle_fast.vae import map_pixels, unmap_pixels


class Scaled(nn.Module):
    """tanh(W x) * by + plus: something to route arguments to."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, by: float = 1.0, plus: float = 0.0) -> Tensor:
        return self.dropout(self.linear(x)).tanh() * by + plus


def pairs(n: int, **options: float) -> list[tuple[Scaled, Scaled]]:
    torch.manual_seed(0)
    return [(Scaled(**options), Scaled(**options)) for _ in range(n)]


ROUTES = {"by": [(True, False), (False, True), (True, True)], "plus": [(False, True)] * 3}


def test_sequential_sequence_routes_arguments() -> None:
    layers = pairs(3)
    x, y = torch.randn(2, 5, 6), None
    y = SequentialSequence(layers, args_route=ROUTES)(x, by=2.0, plus=0.5, unknown="left out, as the original does")
    for i, (f, g) in enumerate(layers):
        x = x + f(x, by=2.0 if i != 1 else 1.0)
        x = x + g(x, by=2.0 if i != 0 else 1.0, plus=0.5)
    assert torch.equal(y, x)


@pytest.mark.parametrize("training", [True, False])
def test_reversible_sequence_equals_its_formula_gradients_included(training: bool) -> None:
    layers = [(f.double(), g.double()) for f, g in pairs(3)]
    sequence = ReversibleSequence(layers, args_route=ROUTES).train(training)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 6, dtype=torch.float64)
    y = sequence(x, by=2.0, plus=0.5)
    with torch.no_grad():
        torch.testing.assert_close(sequence(x, by=2.0, plus=0.5), y)
    parameters = [x, *sequence.parameters()]
    got = torch.autograd.grad((y * weight).sum(), parameters)

    x1 = x2 = x
    for i, (f, g) in enumerate(layers):
        x1 = x1 + f(x2, by=2.0 if i != 1 else 1.0)
        x2 = x2 + g(x1, by=2.0 if i != 0 else 1.0, plus=0.5)
    wanted_y = (x1 + x2) / 2
    torch.testing.assert_close(y, wanted_y)
    wanted = torch.autograd.grad((wanted_y * weight).sum(), parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_reversible_sequence_drops_the_same_values_twice() -> None:
    """A dropout drawn anew in the backward pass would give the input of another forward pass, and its gradient."""
    layers = [(f.double(), g.double()) for f, g in pairs(3, dropout=0.5)]
    sequence = ReversibleSequence(layers)
    x = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return sequence(x)

    assert torch.autograd.gradcheck(seeded, (x,))


def test_a_module_may_be_both_halves_of_a_pair() -> None:
    shared = Scaled()
    x = torch.randn(1, 2, 6)
    once = x + shared(x)
    assert torch.equal(SequentialSequence([(shared, shared)])(x), once + shared(once))


def test_a_route_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"args_route\['by'\] must have one entry a layer, 2, got 3"):
        SequentialSequence(pairs(2), args_route={"by": ROUTES["by"]})


def seen_by(layer: nn.Module, n: int) -> Tensor:
    """bool [n, n]: which inputs change which outputs of an attention layer with arbitrary weights."""
    torch.manual_seed(0)
    x = torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True)
    y = layer.double().eval()(x)[0].sum(dim=-1)
    return torch.stack([torch.autograd.grad(y[i], x, retain_graph=True)[0][0].ne(0).any(dim=-1) for i in range(n)])


@pytest.mark.parametrize(
    "layer",
    [
        Attention(8, 13, heads=2, dim_head=4),
        Attention(8, 13, causal=False, heads=2, dim_head=4),
        SparseAxialCausalAttention(8, 13, image_size=3, axis=0, heads=2, dim_head=4),
        SparseAxialCausalAttention(8, 13, image_size=3, axis=1, heads=2, dim_head=4),
        SparseConvCausalAttention(8, 13, image_size=3, kernel_size=3, heads=2, dim_head=4),
        SparseAttention(8, 13, heads=2, dim_head=4, block_size=2, text_seq_len=4, num_random_blocks=1),
    ],
    ids=["full", "both ways", "rows", "columns", "conv", "blocks"],
)
def test_a_layer_sees_what_its_pattern_allows(layer: nn.Module) -> None:
    assert torch.equal(seen_by(layer, 13), layer.pattern.dense(13))
    assert torch.equal(seen_by(layer, 6), layer.pattern.dense(6))


def test_a_static_mask_takes_keys_away() -> None:
    mask = torch.rand(13, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    mask.fill_diagonal_(True)
    layer = Attention(8, 13, heads=2, dim_head=4, static_mask=mask)
    assert torch.equal(seen_by(layer, 13), mask.tril())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SparseAxialCausalAttention(8, 13, image_size=3, axis=2),
            "axis must be 0 .rows. or 1 .columns., got 2",
        ),
        (
            lambda: SparseAxialCausalAttention(8, 8, image_size=3),
            r"seq_len must be at least image_size \*\* 2 = 9, got 8",
        ),
        (lambda: SparseConvCausalAttention(8, 13, image_size=3, causal=False), "causal must be True"),
        (lambda: SparseConvCausalAttention(8, 13, image_size=3, kernel_size=4), "kernel must be an odd int"),
    ],
)
def test_impossible_layers_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pixels_come_back() -> None:
    pixels = torch.linspace(0, 1, 11)
    mapped = map_pixels(pixels)
    torch.testing.assert_close(mapped[[0, -1]], torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(unmap_pixels(mapped), pixels)
    assert torch.equal(unmap_pixels(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 1.0]))
