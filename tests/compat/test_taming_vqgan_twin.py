"""Our VQGAN against taming-transformers' own, with random weights: names, pictures, codes."""

from __future__ import annotations

import pytest
import torch
from small_vqgans import pictures, twin, yaml_of
from tolerance import assert_argmax_within_budget, assert_same_in_float64, assert_within_budget
from torch import Tensor, nn

from dalle_fast.compat.formats.taming_vqgan import taming_names, vqgan_from
from dalle_fast.models.vqgan import VQGanVAE

KINDS = ("vq", "gumbel")
_WIDEST_SUM = 128 * 9  # of the convolutions of these


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, VQGanVAE]:
    """The published model in float32, and ours with its weights."""
    published = twin(request.param)
    return published, vqgan_from(published.state_dict(), yaml_of(request.param))


def at(models: tuple[nn.Module, VQGanVAE], dtype: torch.dtype) -> tuple[nn.Module, VQGanVAE]:
    published, ours = models
    return published.to(dtype), ours.to(dtype)


def published_pictures(model: nn.Module, codes: Tensor) -> Tensor:
    """In -1..1, as the model has it."""
    codebook = model.quantize.embed if hasattr(model.quantize, "embed") else model.quantize.embedding
    side = int(codes.shape[1] ** 0.5)
    return model.decode(codebook(codes).unflatten(1, (side, side)).permute(0, 3, 1, 2))


def scores(model: nn.Module, images: Tensor) -> Tensor:
    """Of every code [B, n, K], the best the largest: logits, or distances with a minus."""
    z = model.quant_conv(model.encoder(2 * images - 1))
    if hasattr(model.quantize, "proj"):
        return model.quantize.proj(z).flatten(2).mT
    vectors = z.flatten(2).mT
    return -(vectors[:, :, None] - model.quantize.embedding.weight).square().sum(-1)


def some_codes(model: VQGanVAE) -> Tensor:
    n = (model.image_size >> model.num_layers) ** 2
    return torch.randint(0, model.num_tokens, (3, n), generator=torch.Generator().manual_seed(0))


def test_names_are_those_of_the_published_model(models) -> None:
    published, ours = models
    assert set(taming_names(ours).values()) == set(published.state_dict())


def test_pictures_are_equal_in_float64(models) -> None:
    published, ours = at(models, torch.float64)
    codes = some_codes(ours)
    unclamped = published_pictures(published, codes)
    assert (unclamped.abs() > 1).any() and (unclamped.abs() < 1).any()
    wanted = (unclamped.clamp(-1, 1) + 1) / 2
    assert_same_in_float64(ours.decode(codes), wanted, _WIDEST_SUM, "pictures")


@torch.no_grad()
def test_pictures_are_equal_in_float32(models) -> None:
    codes = some_codes(models[1])
    exact = published_pictures(at(models, torch.float64)[0], codes)
    published, ours = at(models, torch.float32)
    own, got = published_pictures(published, codes), ours.decode(codes)
    inside = (exact.abs() < 0.99).to(exact)
    assert_within_budget(((2 * got - 1) * inside.float()), exact * inside, own * inside.float(), "pictures")


def test_codes_are_equal_in_float64(models) -> None:
    published, ours = at(models, torch.float64)
    images = pictures(3).double()
    wanted = scores(published, images).argmax(-1)
    assert len(wanted.unique()) > 5
    assert torch.equal(ours.get_codebook_indices(images), wanted)
    if not ours.is_gumbel:
        assert torch.equal(published.encode(2 * images - 1)[2][2].view(3, -1), wanted)


def test_codes_are_equal_in_float32(models) -> None:
    images = pictures(3)
    exact = scores(at(models, torch.float64)[0], images.double())
    published, ours = at(models, torch.float32)
    assert_argmax_within_budget(ours.get_codebook_indices(images), exact, scores(published, images), "codes")


def test_gumbel_codes_of_the_original_are_noisy_and_ours_are_not(models) -> None:
    published, ours = at(models, torch.float32)
    if not ours.is_gumbel:
        pytest.skip("only a GumbelVQ draws noise")
    images = pictures(2)
    noisy = [published.encode(2 * images - 1)[2][2] for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(ours.get_codebook_indices(images), ours.get_codebook_indices(images))
