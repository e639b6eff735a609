"""Training the discrete VAE as a VQ-VAE: the quantiser is what is folded in, resuming changes nothing."""

import pytest
import torch
from tolerance import assert_same_in_float64

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.dvae import VaeRecipe, VqTrainer, augment, fold, train_vae
from dalle_fast.training.loop import Budget, learning_rate_scale

TINY = VaeRecipe(batch=4, warmup_steps=1, plain_steps=2, save_seconds=0.0, log_steps=1, evaluate_steps=4)


def tiny_vae():
    torch.manual_seed(0)
    return DiscreteVAE(image_size=16, num_tokens=12, codebook_dim=5, num_layers=2, num_resnet_blocks=1, hidden_dim=6)


def pictures(n=6):
    return torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


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


def test_the_trained_vae_is_the_quantiser_it_was_trained_as(tmp_path):
    vae = tiny_vae()
    model = train_vae(vae, pictures(), pictures(2), tmp_path, Budget(steps=6), TINY).eval()
    pixels = pictures().float() / 255
    _, codes, _ = model(vae.norm(pixels))
    own = vae.get_codebook_indices(pixels)
    assert len(own.unique()) > 1
    assert torch.equal(own, codes.flatten(1))
    quantised = vae.codebook(own).unflatten(1, codes.shape[1:]).permute(0, 3, 1, 2)
    vae.double()
    assert_same_in_float64(vae.decode(own), vae.decoder(quantised.double()), n_terms=9 * 6)


def test_training_reduces_the_error(tmp_path):
    rows = []
    recipe = VaeRecipe(batch=4, warmup_steps=1, plain_steps=10, log_steps=1, evaluate_steps=1000)
    flat = pictures()[:, :, :1, :1].expand(-1, -1, 16, 16).contiguous()
    train_vae(tiny_vae(), flat, flat, tmp_path, Budget(steps=60), recipe, rows.append)
    assert rows[-1]["mse"] < 0.8 * rows[0]["mse"]


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path):
    whole = tiny_vae()
    train_vae(whole, pictures(), pictures(2), tmp_path / "whole", Budget(steps=8), TINY)

    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_vae(tiny_vae(), pictures(), pictures(2), tmp_path / "parts", Budget(steps=8), TINY, stop)
    resumed = tiny_vae()
    train_vae(resumed, pictures(), pictures(2), tmp_path / "parts", Budget(steps=8), TINY)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_augment_moves_pictures_and_keeps_their_pixels():
    batch = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    seen = set()
    for seed in range(40):
        moved = augment(batch, torch.Generator().manual_seed(seed))
        assert moved.shape == batch.shape
        inside = moved[moved != 1.0]
        assert set(inside.tolist()) <= set(batch.flatten().tolist())
        seen.add(tuple(moved.flatten().tolist()))
    assert len(seen) > 10


@pytest.mark.parametrize("limits", [{}, {"steps": 3, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}])
def test_a_budget_is_one_positive_number(limits):
    with pytest.raises(ValueError, match="exactly one of steps and minutes"):
        Budget(**limits)


def test_the_schedule_warms_up_and_ends_at_nothing():
    scales = [learning_rate_scale(step, step / 100, 10) for step in range(101)]
    assert scales[0] == 0.1
    assert max(scales) == max(scales[5:15])
    assert scales[100] == pytest.approx(0, abs=1e-12)


def test_trainer_works_on_the_modules_of_the_vae():
    vae = tiny_vae()
    trainer = VqTrainer(vae)
    assert trainer.decoder is vae.decoder
    assert trainer.projection.weight.shape == (5, 6, 1, 1)


def test_trainer_refuses_a_vae_without_logits():
    with pytest.raises(ValueError, match="vae must have quantizer='gumbel' to fold into, got 'vq'"):
        VqTrainer(DiscreteVAE(image_size=16, num_tokens=12, codebook_dim=5, num_layers=2, quantizer="vq"))
