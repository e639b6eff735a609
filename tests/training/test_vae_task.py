"""Training a VAE: what its loss is made of, when codes are placed, what is measured, shown and saved."""

import math

import pytest
import torch
from tiny_tasks import assert_unchanged, batch_of, state, vae_config

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.tasks.vae import VaeTask

VQ = {"quantizer": "vq", "codebook_decay": 0.9, "revive_codes_below": 0.5}
KL = {"start": 0.0, "end": 6.6, "steps": 10, "shape": "cosine"}
COOLING = {"start": 1.0, "end": 0.0625, "steps": 10, "shape": "cosine"}


def task(**settings):
    torch.manual_seed(0)
    return VaeTask(vae_config(**settings))


def images(batch):
    return batch["pixels"].float() / 255


def test_the_loss_is_reconstruction_kl_and_l1_as_the_schedules_say():
    one = task(kl=KL, temperature=COOLING, l1_weight=0.1)
    batch = batch_of(4, first=20)
    loss, parts = one.module(batch, 5, 0.05)
    plain = DiscreteVAE(**{**one.config.model, "kl_div_loss_weight": 1.0})
    plain.load_state_dict(one.model.state_dict())
    temperature = 0.0625 + (1 - 0.0625) / 2
    _, recons, statistics = plain(
        images(batch), return_loss=True, return_recons=True, return_statistics=True,
        temp=temperature, seed=3 * 1_000_003 + 5, first_row=0,
    )  # fmt: skip
    l1 = (recons - plain.norm(images(batch))).abs().mean()
    # 3.3 / 192 of a position's KL at 256x256: 48 numbers a position here, too
    kl = statistics.penalty / (4 * 3 * 16 * 16)
    assert loss.item() == pytest.approx((statistics.reconstruction + 3.3 * kl + 0.1 * l1).item(), rel=1e-5)
    assert parts["temperature"] == pytest.approx(temperature)
    assert parts["kl"].item() == pytest.approx(statistics.penalty.item() / 4, rel=1e-5)
    assert parts["kl_weight"].item() == pytest.approx(3.3)


def test_parts_of_a_batch_meet_the_noise_of_the_whole():
    whole, parts = task(batch=6), task(batch=6)
    loss, _ = whole.module(batch_of(6, first=12), 2, 0.0)
    losses = [parts.module(batch_of(2, first=12 + 2 * i), 2, 0.0)[0] for i in range(3)]
    assert sum(losses).item() / 3 == pytest.approx(loss.item(), rel=1e-5)
    assert whole.figures()["perplexity_drawn"] == parts.figures()["perplexity_drawn"]
    again = batch_of(6, first=12) | {"position": torch.arange(18, 24)}
    assert whole.module(again, 3, 0.0)[0] != loss, "another step draws other noise"


def test_a_bonus_on_the_entropy_of_code_usage_is_taken_off():
    with_bonus, without = task(entropy_weight=0.5), task()
    batch = batch_of(4)
    loss, parts = with_bonus.module(batch, 0, 0.0)
    usage = with_bonus.model(images(batch), return_logits=True).softmax(1).mean((0, 2, 3))
    entropy = -(usage * usage.log()).sum()
    assert parts["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert loss.item() == pytest.approx((without.module(batch, 0, 0.0)[0] - 0.5 * entropy).item(), rel=1e-5)


def test_vq_quantises_nothing_first_then_places_its_codes():
    one = task(model=VQ, plain_steps=2)
    codebook = one.model.codebook
    for step in range(2):
        _, parts = one.module(batch_of(4), step, step / 100)
        assert "commitment" not in parts and not codebook.started and "codes_used" not in one.figures()
    one.module(batch_of(4), 2, 0.02)
    assert codebook.started and one.figures()["codes_used"] > 3


def test_vq_takes_the_micro_batches_of_a_step_together_and_stops_reviving():
    one = task(model=VQ, batch=8)
    one.module(batch_of(2), 0, 0.1)
    assert one.model.codebook.batches_per_update == 4 and one.model.codebook.revive_below == 0.5
    one.module(batch_of(2), 0, 0.8)
    assert one.model.codebook.revive_below == 0.0
    one.module(batch_of(2), 0, 0.2)
    assert one.model.codebook.revive_below == 0.5, "a function of the step alone"


def test_figures_are_those_of_the_codes_since_the_last_call():
    one = task()
    one.module(batch_of(16, first=0), 0, 0.0)
    row = one.figures()
    codes = one.model.get_codebook_indices(images(batch_of(16)))
    assert row["codes_used"] == len(codes.unique()) and math.isfinite(row["error_hard"])
    assert one.figures()["codes_used"] == 0
    vq = task(model=VQ)
    vq.module(batch_of(4), 0, 0.0)
    assert vq.figures()["codes_revived"] == 0


def test_evaluation_is_psnr_of_decoded_codes():
    one = task()
    figures = one.evaluate([batch_of(3), batch_of(2, first=3)])
    pixels = images(batch_of(5))
    codes = one.model.get_codebook_indices(pixels)
    with torch.no_grad():
        error = ((one.model.decode(codes) * 0.5 + 0.5).clamp(0, 1) - pixels).double().square().mean()
    assert figures["psnr"] == pytest.approx(-10 * error.log10().item(), rel=1e-6)
    assert figures["codes_used"] == len(codes.unique())
    assert one.evaluate([]) == {}
    unplaced = task(model=VQ, plain_steps=5)
    assert set(unplaced.evaluate([batch_of(2)])) == {"psnr"}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_originals_above_reconstructions(channels):
    one = task(model={"channels": channels})
    pixels = batch_of(2)["pixels"]
    pixels = torch.cat((pixels, pixels), dim=1)[:, :channels]
    shown = one.pictures({"pixels": pixels})["reconstructions"]
    assert shown.shape == (3, 32, 32) and shown.dtype == torch.uint8
    assert torch.equal(shown[0, :16, 16:], pixels[1, 0])


def test_a_vq_model_is_saved_as_it_is_or_folded(tmp_path):
    for fold in (False, True):
        one = task(model=VQ, fold=fold)
        for step in range(3):
            one.module(batch_of(4, first=4 * step), step, 0.0)
        before = state(one.model)
        one.save(tmp_path / str(fold))
        assert_unchanged(one.model, before)
        saved = DiscreteVAE.from_pretrained(tmp_path / str(fold))
        assert saved.quantizer == ("gumbel" if fold else "vq")
        one.model.codebook.update()
        pixels = images(batch_of(4))
        assert torch.equal(saved.get_codebook_indices(pixels), one.model.get_codebook_indices(pixels))


def test_a_step_moves_every_parameter():
    for settings in ({"kl": KL}, {"model": VQ}):
        one = task(**settings)
        one.module(batch_of(4, first=4), 1, 0.01)[0].backward()
        assert all(parameter.grad.abs().sum() > 0 for _, parameter in one.parameters_for())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": {"kl_div_loss_weight": 0.1}}, r"kl_div_loss_weight must be left out, got 0\.1.*kl\.end"),
        ({"fold": True}, "fold must go with model.quantizer='vq', got 'gumbel'"),
        ({"model": {"widht": 3}}, "model must hold arguments of DiscreteVAE, got others.*widht"),
        ({"model": {"image_size": 20}}, "image_size must be a power of two, got 20"),
    ],
)
def test_wrong_settings_are_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**settings)
