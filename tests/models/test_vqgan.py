"""VQGanVAE as a VAE of DALLE: codes, pictures, batches, dtypes, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_vqgans import architecture, pictures, small_vqgan
from tolerance import assert_same_in_float64
from torch import nn

import dalle_fast
from dalle_fast import DALLE
from dalle_fast.models.vqgan import VQGanArchitecture, VQGanVAE

KINDS = ("vq", "gumbel")


def codes_for(model: VQGanVAE, batch: int) -> torch.Tensor:
    n = (model.image_size >> model.num_layers) ** 2
    return torch.randint(0, model.num_tokens, (batch, n), generator=torch.Generator().manual_seed(1))


def test_public_name() -> None:
    from dalle_fast.vae import VQGanVAE as of_the_originals_module

    assert dalle_fast.VQGanVAE is of_the_originals_module is VQGanVAE


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_best_scored(kind: str) -> None:
    model = small_vqgan(kind).double()
    images = pictures(2).double()
    z = model.to_codebook(model.encoder(2 * images - 1)).flatten(2).mT
    if kind == "vq":
        scores = -torch.cdist(z, model.codebook.weight, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        scores = z @ model.to_logits.weight.flatten(1).T + model.to_logits.bias
    codes = model.get_codebook_indices(images)
    assert codes.dtype == torch.int64 and codes.shape == (2, 16 if kind == "vq" else 64)
    assert torch.equal(codes, scores.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_alone_equals_the_same_in_a_batch(kind: str, dtype: torch.dtype, restored_threads: None) -> None:
    model, images = small_vqgan(kind).to(dtype), pictures(5).to(dtype)
    codes = model.get_codebook_indices(images)
    drawn = model.decode(codes)
    assert drawn.dtype == dtype and drawn.shape == images.shape
    torch.set_num_threads(3)
    assert torch.equal(model.get_codebook_indices(images.to(memory_format=torch.channels_last)), codes)
    for i in (0, 4):
        assert torch.equal(model.get_codebook_indices(images[i : i + 1]), codes[i : i + 1])
        assert torch.equal(model.decode(codes[i : i + 1]), drawn[i : i + 1])


def test_16_bit_models_compute_in_float32() -> None:
    model = small_vqgan("gumbel").to(torch.bfloat16)
    wide = VQGanVAE(architecture=model.architecture)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    images, codes = pictures(2).to(torch.bfloat16), codes_for(model, 2)
    assert torch.equal(model.get_codebook_indices(images), wide.get_codebook_indices(images.float()))
    assert torch.equal(model.decode(codes), wide.decode(codes).to(torch.bfloat16))


def test_pictures_are_in_0_to_1() -> None:
    model = small_vqgan("vq")
    drawn = model.decode(codes_for(model, 2))
    assert drawn.min() == 0 and drawn.max() == 1 and ((drawn > 0) & (drawn < 1)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_pictures_have_no_codes(kind: str) -> None:
    model = small_vqgan(kind)
    codes = model.get_codebook_indices(pictures(2)[:0])
    assert codes.shape == (0, 16 if kind == "vq" else 64) and codes.dtype == torch.int64
    assert model.decode(codes).shape == (0, 3, 64, 64)


def test_the_decoder_passes_gradients_and_the_encoder_none() -> None:
    model = small_vqgan("vq")
    model.decode(codes_for(model, 1)).sum().backward()
    assert model.codebook.weight.grad is not None and model.encoder.conv_in.weight.grad is None
    assert not model.get_codebook_indices(pictures(1)).requires_grad


def test_norm_eps_reaches_every_norm() -> None:
    norms = [m for m in small_vqgan("vq", norm_eps=1e-5).modules() if isinstance(m, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-5} and {norm.num_groups for norm in norms} == {32}
    assert small_vqgan("vq").architecture.norm_eps == 1e-6


def test_dalle_trains_and_draws_with_it() -> None:
    vae = small_vqgan("gumbel")
    dalle = DALLE(dim=16, vae=vae, num_text_tokens=20, text_seq_len=4, depth=1, heads=1, dim_head=16)
    assert dalle.image_seq_len == 64 and not any(p.requires_grad for p in vae.parameters())
    text = torch.randint(1, 20, (2, 4))
    loss = dalle(text, pictures(2), return_loss=True)
    assert torch.equal(loss, dalle(text, vae.get_codebook_indices(pictures(2)), return_loss=True))
    drawn, codes = dalle.generate_images(text, seed=0, return_tokens=True)
    assert torch.equal(drawn, vae.decode(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_comes_back(kind: str, tmp_path: Path) -> None:
    model = small_vqgan(kind)
    model.save_pretrained(tmp_path / "vae")
    stored = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert stored["class"] == "VQGanVAE" and stored["arguments"]["architecture"]["quantizer"] == kind
    assert stored["preprocessing"] == {"image_size": 64, "channels": 3, "value_range": [0.0, 1.0]}
    again = VQGanVAE.from_pretrained(tmp_path / "vae")
    assert again.architecture == model.architecture and again.config == model.config and not again.training
    codes = codes_for(model, 1)
    assert torch.equal(again.decode(codes), model.decode(codes))


def test_saved_dalle_brings_it_along(tmp_path: Path) -> None:
    dalle = DALLE(dim=16, vae=small_vqgan("vq"), num_text_tokens=20, text_seq_len=4, depth=1, heads=1, dim_head=16)
    dalle.save_pretrained(tmp_path / "model")
    again = DALLE.from_pretrained(tmp_path / "model")
    assert isinstance(again.vae, VQGanVAE) and not any(p.requires_grad for p in again.vae.parameters())
    codes = codes_for(again.vae, 1)
    assert torch.equal(again.vae.decode(codes), dalle.vae.decode(codes))


def test_it_is_not_trained_here() -> None:
    with pytest.raises(NotImplementedError, match=r"not trained here. Call get_codebook_indices and decode"):
        small_vqgan("vq")(pictures(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "ema"}, "quantizer must be 'vq' or 'gumbel', got 'ema'"),
        ({"num_tokens": 0}, "num_tokens must be an integer from 1, got 0"),
        ({"image_size": 64.0}, "image_size must be an integer from 1, got 64.0"),
        ({"multipliers": []}, "multipliers must be one number a level"),
        ({"multipliers": 2}, "multipliers must be a list of integers, got 2"),
        ({"multipliers": [1, "2"]}, "multipliers must be integers from 1"),
        ({"attention_levels": [5]}, "attention_levels must be of 0..4, got"),
        ({"hidden_dim": 48}, "hidden_dim must be a multiple of 32"),
        ({"image_size": 40}, "image_size must be a multiple of 16"),
        ({"quantizer": "gumbel"}, "z_channels must be codebook_dim = 16 with quantizer='gumbel', got 24"),
        ({"dropout": 0.1}, "unknown: dropout; missing: none"),
    ],
)
def test_impossible_architectures_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQGanVAE(architecture=architecture("vq", **changes))


def test_an_incomplete_architecture_is_named() -> None:
    incomplete = architecture("vq")
    del incomplete["channels"]
    with pytest.raises(ValueError, match="unknown: none; missing: channels"):
        VQGanVAE(architecture=incomplete)
    assert VQGanVAE(architecture=VQGanArchitecture(**architecture("vq"))).channels == 3


def test_pictures_and_codes_that_do_not_fit_are_named() -> None:
    model = small_vqgan("vq")
    with pytest.raises(ValueError, match=r"VQGanVAE: img must be \[B, 3, 64, 64\]"):
        model.get_codebook_indices(pictures(1, 32))
    with pytest.raises(ValueError, match=r"VQGanVAE.decode: ids must be in 0..39, got 40..40"):
        model.decode(torch.full((1, 16), 40))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_sees_and_draws_what_the_cpu_does(kind: str) -> None:
    model, images = small_vqgan(kind).double().requires_grad_(False), pictures(2).double()
    codes = model.get_codebook_indices(images)
    drawn = model.decode(codes)
    model.cuda()
    assert torch.equal(model.get_codebook_indices(images.cuda()).cpu(), codes)
    assert_same_in_float64(model.decode(codes.cuda()).cpu(), drawn, n_terms=128 * 9)
