"""The logit-Laplace density: that it is one, that it is the transformed Laplace, its gradients, its shapes."""

import math

import pytest
import torch
from tolerance import assert_same_in_float64, check_against_oracle

from dalle_fast.models.logit_laplace import logit_laplace_loss, logit_laplace_nll, map_pixels, unmap_pixels


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mu", [-3.0, 0.0, 0.4, 2.0])
@pytest.mark.parametrize("log_b", [-3.0, -1.0, 0.0, 0.5])
def test_the_density_integrates_to_one(mu, log_b):
    """Trapezoids over x in (0, 1), narrow near both ends, with mu on an edge, where the density has its kink."""
    x = torch.linspace(mu - 45 * math.exp(max(log_b, 0)), mu + 45 * math.exp(max(log_b, 0)), 400_001).double().sigmoid()
    x = x[(x > 0) & (x < 1)].unique()
    density = (-logit_laplace_nll(x, torch.full_like(x, mu), torch.full_like(x, log_b))).exp()
    assert (density >= 0).all()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-5)


def test_it_is_the_laplace_distribution_through_a_sigmoid():
    mu, log_b, x = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2).sigmoid()
    base = torch.distributions.Laplace(mu, log_b.exp())
    oracle = torch.distributions.TransformedDistribution(base, [torch.distributions.SigmoidTransform()])
    assert_same_in_float64(logit_laplace_nll(x, mu, log_b), -oracle.log_prob(x), n_terms=32)


def test_the_loss_is_the_mean_over_pixels_and_channels():
    maps, x = draw(2, 6, 4, 5), draw(2, 3, 4, 5, seed=1).sigmoid()
    by_hand = 0.0
    for b in range(2):
        for c in range(3):
            for p in range(20):
                m, s = maps[b, c].flatten()[p].item(), math.exp(maps[b, 3 + c].flatten()[p].item())
                v = x[b, c].flatten()[p].item()
                by_hand -= math.log(math.exp(-abs(math.log(v / (1 - v)) - m) / s) / (2 * s * v * (1 - v)))
    assert logit_laplace_loss(maps, x).item() == pytest.approx(by_hand / 120, rel=1e-12)


def test_gradients():
    maps, x = draw(2, 4, 3, 3).requires_grad_(), draw(2, 2, 3, 3, seed=1).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(logit_laplace_loss, (maps, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_is_within_the_budget_and_16_bits_are_computed_in_it(dtype):
    maps, x = draw(3, 6, 4, 4), map_pixels(torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(3)))

    def losses(maps):
        rows = [logit_laplace_loss(row[None], pixels[None].to(torch.promote_types(maps.dtype, torch.float32)))
                for row, pixels in zip(maps, x, strict=True)]  # fmt: skip
        return torch.stack(rows)

    def oracle(maps):
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        mu, b = wide[:, :3], wide[:, 3:].exp()
        pixels = x.to(wide.dtype)
        density = (-(torch.log(pixels / (1 - pixels)) - mu).abs() / b).exp() / (2 * b * pixels * (1 - pixels))
        return -density.log().mean((1, 2, 3))

    check_against_oracle(losses, oracle, (maps,), dtype)


def test_the_best_map_is_the_picture_itself():
    x = map_pixels(torch.rand(1, 3, 4, 4, dtype=torch.float64))
    best = torch.cat((x.logit(), torch.full_like(x, -2.0)), dim=1)
    away = best + torch.cat((torch.full_like(x, 0.1), torch.zeros_like(x)), dim=1)
    assert logit_laplace_loss(best, x) < logit_laplace_loss(away, x)
    assert_same_in_float64(unmap_pixels(best[:, :3].sigmoid()), (x - 0.1) / 0.8, n_terms=8)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"maps must be \[2, 6, 4, 4\] for pictures \[2, 3, 4, 4\], got \[2, 3, 4, 4\]"
    ):
        logit_laplace_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5))
