"""Training VAE and DALLE together: whose gradients reach what, and what is read."""

import pytest
import torch
from tiny_tasks import batch_of, dalle_config, tokenizer, vae

from dalle_fast import functional
from dalle_fast.training.tasks.dalle import DalleTask, relax, token_losses

ENCODER, DECODER, EMBEDDING = "vae.encoder.", "vae.decoder.", "image_emb."


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words"))


def task(words, **settings):
    return DalleTask(dalle_config(end_to_end=True, **settings), vae(), words)


def gradients(loss, one):
    named = one.parameters_for()
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: 0.0 if g is None else g.abs().sum().item() for (name, _), g in zip(named, found, strict=True)}


def test_the_token_loss_alone_moves_the_encoder(words):
    one = task(words)
    batch = batch_of(4)
    relaxed = relax(one.model, batch["pixels"].float() / 255, seed=5, first_sample=0)
    losses = token_losses(one.model, batch["text"], relaxed.codes, relaxed.codes, relaxed=relaxed.embeds)
    of_tokens = gradients(losses[1], one)
    assert all(size > 0 for name, size in of_tokens.items() if name.startswith(ENCODER))
    assert not any(size for name, size in of_tokens.items() if name.startswith((DECODER, "vae.codebook")))


def test_what_is_read_is_what_two_stages_read(words):
    one, two = task(words), DalleTask(dalle_config(), vae(), words)
    two.model.load_state_dict(one.model.state_dict())
    batch = batch_of(4)
    loss, parts = one.module(batch, 0, 0.0)
    alone, of_tokens = two.module(batch, 0, 0.0)
    assert parts["image_loss"] == of_tokens["image_loss"] and parts["text_loss"] == of_tokens["text_loss"]
    assert loss.item() == pytest.approx((alone + parts["reconstruction"]).item(), rel=1e-6)
    assert not any(name.startswith("vae.") for name, _ in two.parameters_for())


def test_the_encoders_gradient_is_that_of_the_mean_embedding(words):
    one = task(words)
    model, images = one.model.double(), batch_of(3)["pixels"].double() / 255
    direction = torch.randn(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    relaxed = relax(model, images, seed=5, first_sample=2)
    assert not relaxed.embeds.any()
    last = model.vae.encoder[-1]
    got = torch.autograd.grad((relaxed.embeds * direction).sum(), last.weight)[0]
    features = model.vae.encoder[:-1](model.vae.norm(images))
    mixed, codes, _, _ = functional.gumbel_codebook(
        features, last.weight.flatten(1), last.bias, model.image_emb.weight.detach(),
        temperature=model.vae.temperature, seed=5, first_row=2 * 16, impl="reference",
    )  # fmt: skip
    wanted = torch.autograd.grad((mixed.flatten(2).transpose(1, 2) * direction).sum(), last.weight)[0]
    torch.testing.assert_close(got, wanted)
    assert torch.equal(relaxed.codes, codes.flatten(1))


def test_the_reconstruction_is_the_vaes_own_loss(words):
    one = task(words)
    images = batch_of(3)["pixels"].float() / 255
    relaxed = relax(one.model, images, seed=5, first_sample=0)
    wanted = one.model.vae(images, return_loss=True, seed=5, first_row=0)
    assert relaxed.reconstruction.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_step_moves_all_and_logs_both_errors(words):
    one = task(words, batch=16)
    loss, _ = one.module(batch_of(16), 0, 0.0)
    sizes = gradients(loss, one)
    assert all(sizes.values()), [name for name, size in sizes.items() if not size]
    row = one.figures()
    assert row["error_soft"] != row["error_hard"] and row["codes_used"] >= 1


def test_a_vq_vae_is_refused(words):
    with pytest.raises(ValueError, match=r"end_to_end must have a VAE with quantizer='gumbel'.*fold=true"):
        DalleTask(dalle_config(end_to_end=True), vae(quantizer="vq"), words)
