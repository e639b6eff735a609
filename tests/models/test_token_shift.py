"""Token shift against its definition, token by token; its gradients."""

import pytest
import torch

from dalle_fast.layout import TokenLayout
from dalle_fast.models.token_shift import shift_tokens


def _by_definition(x, layout):
    channels, cols = x.shape[2], layout.grid_cols
    half, quarter = -(-channels // 2), -(-channels // 4)

    def token(position, low, high):
        return x[:, position, low:high] if position is not None else torch.zeros_like(x[:, 0, low:high])

    tokens = []
    for i in range(x.shape[1]):
        place = i - layout.text_len
        if place < 0:
            parts = [token(i - 1 if i else None, 0, half), token(i, half, channels)]
        else:
            above = token(i - cols if place >= cols else None, 0, quarter)
            left = token(i - 1 if place % cols else None, quarter, 2 * quarter)
            parts = [above, left, token(i, 2 * quarter, channels)]
        tokens.append(torch.cat(parts, dim=1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 16])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (5, 1), (1, 6)])
@pytest.mark.parametrize("text_len", [1, 4])
def test_every_length_is_shifted_as_defined_and_so_is_the_gradient(text_len, grid, channels):
    layout = TokenLayout(text_len, grid)
    for n in range(1, layout.length + 1):
        x, weight = torch.randn(2, 2, n, channels, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        x.requires_grad_()
        both = shift_tokens(x, layout), _by_definition(x, layout)
        assert torch.equal(*both)
        assert torch.equal(*(torch.autograd.grad(shifted, x, weight)[0] for shifted in both))


def test_gradients_of_gradients_and_any_strides():
    layout = TokenLayout(4, (3, 5))
    x = torch.randn(2, 6, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: shift_tokens(t, layout), x)
    assert torch.autograd.gradgradcheck(lambda t: shift_tokens(t, layout), x)
    assert torch.equal(shift_tokens(x, layout), shift_tokens(x.detach().contiguous(), layout))


def test_compiles_whole():
    layout = TokenLayout(4, (3, 5))
    x = torch.randn(2, 17, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(lambda t: shift_tokens(t, layout), fullgraph=True, backend="aot_eager")
    both = compiled(x), shift_tokens(x, layout)
    assert torch.equal(*both)
    assert torch.equal(*(torch.autograd.grad(shifted.square().sum(), x)[0] for shifted in both))
