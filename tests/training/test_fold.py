"""A vq VAE folded into a gumbel one: the same codes, the same pictures."""

import pytest
import torch
from tiny_tasks import batch_of, vae
from tolerance import assert_same_in_float64

from dalle_fast.training.tasks.fold import fold, folded


def test_folded_logits_choose_the_nearest_row():
    torch.manual_seed(0)
    projection = torch.nn.Conv2d(7, 5, 1).double()
    codebook = torch.randn(30, 5, dtype=torch.float64)
    features = torch.randn(2, 7, 6, 4, dtype=torch.float64)
    weight, bias = fold(codebook, projection)
    logits = torch.nn.functional.conv2d(features, weight.double(), bias.double())
    z = projection(features).permute(0, 2, 3, 1).reshape(-1, 5)
    distances = torch.cdist(z, codebook)
    two = distances.topk(2, largest=False).values
    # Weights and biases are stored in float32: only a tie closer than their rounding may be decided otherwise.
    scale = (weight.abs().max() * features.abs().sum(1).max() + bias.abs().max()).item()
    clear = (two[:, 1].square() - two[:, 0].square()) / 2 > 2 * scale * torch.finfo(torch.float32).eps
    assert clear.float().mean() > 0.99
    assert torch.equal(logits.argmax(1).flatten()[clear], distances.argmin(1)[clear])


def test_a_folded_vae_has_the_codes_and_pictures_of_the_quantiser():
    trained = vae(quantizer="vq", codebook_decay=0.5, smooth_l1_loss=True)
    images = batch_of(6)["pixels"].float() / 255
    for _ in range(3):
        trained(images, return_loss=True)
    trained.codebook.update()
    result = folded(trained)
    assert result.quantizer == "gumbel" and result.config["smooth_l1_loss"] and not result.training
    codes = trained.get_codebook_indices(images)
    assert len(codes.unique()) > 3
    assert torch.equal(result.get_codebook_indices(images), codes)
    assert_same_in_float64(result.double().decode(codes), trained.double().decode(codes), n_terms=54)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="must have quantizer='vq', got 'gumbel'"):
        folded(vae())
    with pytest.raises(ValueError, match="normalised_codes=False, got True"):
        folded(vae(quantizer="vq", normalised_codes=True))
