"""DiscreteVAE against the original's golden outputs, its mended defects, and what a VAE owes."""

import pytest
import torch
from golden_cases import FOLDER, golden, names
from tolerance import assert_same_in_float64

from dalle_fast import DiscreteVAE
from dalle_fast.functional import gumbel_codebook

SMALL = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4}


def _vae(**changes):
    torch.manual_seed(0)
    return DiscreteVAE(**{**SMALL, **changes})


def _images(batch=2, channels=3, size=16):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", names("vae"))
def test_equals_the_original(name, bottleneck):
    case = golden(name)
    vae = case.build_vae()
    img, noise, temp = case.inputs["img"].requires_grad_(), case.inputs["gumbel_noise"], case.spec["call"]["temp"]
    case.check("logits", vae(img, return_logits=True))
    codes = vae.get_codebook_indices(img)
    case.check("codes", codes)
    case.check("decoded", vae.decode(codes))
    case.check("recon", vae(img, temp=temp, gumbel_noise=noise))
    loss, recon = vae(img, return_loss=True, return_recons=True, temp=temp, gumbel_noise=noise)
    case.check("recon", recon)
    case.check("loss", loss)
    loss.backward()
    case.check("grad.img", img.grad)
    for parameter_name, parameter in vae.named_parameters():
        case.check(f"grad.{parameter_name}", parameter.grad)


def test_the_originals_trainer_checkpoint_loads(bottleneck):
    case = golden("checkpoint_vae")
    checkpoint = torch.load(FOLDER / "checkpoint_vae.pt", weights_only=True)
    vae = DiscreteVAE(**checkpoint["hparams"])
    vae.load_state_dict(checkpoint["weights"])
    images = case.inputs["images"]
    case.check("logits", vae(images, return_logits=True))
    case.check("codes", vae.get_codebook_indices(images))
    case.check("decoded", vae.decode(case.outputs["codes"]))


@pytest.mark.parametrize("bottleneck", ["reference", "cpu"], indirect=True)  # interpreted Triton: seconds
def test_three_steps_of_adam_go_as_the_originals(bottleneck):
    case = golden("checkpoint_vae")
    vae = DiscreteVAE(**case.models["vae"], smooth_l1_loss=True, kl_div_loss_weight=0.0)
    vae.load_state_dict(case.weights)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        noise = case.inputs[f"gumbel_noise_{step}"]
        loss = vae(case.inputs[f"images_{step}"], return_loss=True, temp=1.0, gumbel_noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    case.check("losses", torch.stack(losses))


def test_parameter_names_are_the_originals():
    """The names of 1.6.6, written out: two layers, one residual block."""
    expected = {"codebook.weight"}
    layers = {"encoder": ["0.0", "1.0", "2.net.0", "2.net.2", "2.net.4", "3"]}
    layers["decoder"] = ["0", "1.net.0", "1.net.2", "1.net.4", "2.0", "3.0", "4"]
    for part, modules in layers.items():
        expected |= {f"{part}.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(_vae(num_resnet_blocks=1).state_dict()) == expected


def test_noise_differs_by_call_and_repeats_with_the_seed():
    vae, images = _vae(), _images()
    torch.manual_seed(3)
    first, second = vae(images), vae(images)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(vae(images), first)


def test_noise_repeats_under_checkpointing(bottleneck):
    vae, images = _vae(), _images()

    def gradient(forward):
        torch.manual_seed(4)
        return torch.autograd.grad(forward().square().mean(), vae.codebook.weight)[0]

    checkpointed = gradient(lambda: torch.utils.checkpoint.checkpoint(vae, images, use_reentrant=False))
    assert torch.equal(checkpointed, gradient(lambda: vae(images)))


def test_codes_and_training_flag_survive_each_other(bottleneck):
    vae, images = _vae(), _images()
    for training in (True, False):
        vae.train(training)
        codes = vae.get_codebook_indices(images)
        assert torch.equal(codes, vae.get_codebook_indices(images)), "codes must carry no noise"
        assert torch.equal(codes, vae(images, return_logits=True).argmax(1).flatten(1))
        with pytest.raises(ValueError, match="DiscreteVAE: img must be"):
            vae.get_codebook_indices(images[..., :-1])
        assert all(module.training == training for module in vae.modules())
    assert codes.shape == (2, 16) and codes.dtype == torch.int64 and not codes.requires_grad


def test_images_stay_as_they_are():
    vae, images = _vae(), _images()
    before = images.clone()
    vae(images, return_loss=True).backward()
    assert torch.equal(images, before)


def test_without_normalization():
    """UPSTREAM B12a: normalization=None raised a TypeError in the constructor."""
    plain, normalised = _vae(normalization=None), _vae()
    images = _images()
    assert torch.equal(plain(images * 2 - 1, return_logits=True), normalised(images, return_logits=True))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_other_numbers_of_channels(channels):
    vae = _vae(channels=channels, num_resnet_blocks=1)
    loss, recon = vae(_images(channels=channels), return_loss=True, return_recons=True)
    assert recon.shape == (2, channels, 16, 16) and loss.isfinite()
    assert vae.decode(torch.zeros(1, 16, dtype=torch.long)).shape == (1, channels, 16, 16)
    normed = vae.norm(_images(channels=channels))
    expected = _images(channels=channels)
    expected[:, :3] = expected[:, :3] * 2 - 1  # alpha stays
    assert torch.equal(normed, expected)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_decode_takes_any_square_grid(side):
    assert _vae().decode(torch.zeros(2, side * side, dtype=torch.int32)).shape == (2, 3, 4 * side, 4 * side)


def test_decode_places_codes_in_raster_order():
    """A changed code in the last column of the first row moves pixels near the top right only."""
    vae = _vae()
    codes = torch.zeros(1, 64, dtype=torch.long)
    before = vae.decode(codes)
    codes[0, 7] = 5
    rows, cols = (vae.decode(codes) != before)[0].any(0).nonzero().unbind(-1)
    assert rows.max() < 8 and cols.min() >= 24


@pytest.mark.parametrize("quantizer", ["gumbel", "vq"])
def test_decoding_is_a_gather_equal_to_the_one_hot_product(quantizer):
    vae = _vae(quantizer=quantizer).double()
    codes = torch.randint(0, 12, (2, 16), generator=torch.Generator().manual_seed(2))
    one_hot = torch.nn.functional.one_hot(codes, 12).to(vae.codebook.weight.dtype)
    embeds = (one_hot @ vae.codebook.weight).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    assert_same_in_float64(vae.decode(codes), vae.decoder(embeds), n_terms=6 * 4)


def test_an_empty_batch(bottleneck):
    vae = _vae()
    assert vae(_images(0)).shape == (0, 3, 16, 16)
    assert vae.get_codebook_indices(_images(0)).shape == (0, 16)
    assert vae.decode(torch.zeros(0, 16, dtype=torch.long)).shape == (0, 3, 16, 16)


def test_one_sample_alone_has_the_codes_it_has_in_a_batch():
    vae, images = _vae().double(), _images(4).double()
    together = vae.get_codebook_indices(images)
    assert all(torch.equal(vae.get_codebook_indices(images[i : i + 1])[0], together[i]) for i in range(4))


def test_kl_is_summed_weighted_and_added():
    images = _images()
    noise = torch.zeros(2, 12, 4, 4)
    plain, weighted = _vae(), _vae(kl_div_loss_weight=0.5)
    logits = plain(images, return_logits=True)
    log_q = logits.detach().double().log_softmax(dim=1)
    kl = (log_q.exp() * (log_q + torch.tensor(12.0).log())).sum()
    losses = [vae(images, return_loss=True, gumbel_noise=noise).detach() for vae in (weighted, plain)]
    # 384 float32 terms of the sum, and the difference of two losses of about 1
    assert abs(losses[0] - losses[1] - 0.5 * kl) < 400 * torch.finfo(torch.float32).eps * max(1.0, float(kl))


def test_kl_is_computed_only_where_it_counts(monkeypatch):
    asked = []

    def spy(*args, with_kl, **kwargs):
        asked.append(with_kl)
        return gumbel_codebook(*args, with_kl=with_kl, **kwargs)

    monkeypatch.setattr("dalle_fast.models.dvae.gumbel_codebook", spy)
    plain, weighted = _vae(), _vae(kl_div_loss_weight=0.5)
    plain(_images(), return_loss=True)
    weighted(_images())
    weighted(_images(), return_loss=True)
    assert asked == [False, False, True]


@pytest.mark.parametrize("mode", [{}, {"straight_through": True}, {"straight_through": True, "reinmax": True}])
def test_bfloat16_autocast_and_half_precision_run(mode, bottleneck):
    vae, images = _vae(**mode, kl_div_loss_weight=0.01), _images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = vae(images, return_loss=True)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in vae.parameters())
    assert vae.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bottleneck", ["reference", "cpu"], indirect=True)  # interpreted Triton: minutes
def test_a_few_steps_learn_four_plain_colours(bottleneck):
    vae, images = _vae(), _images(4, size=1).expand(-1, -1, 16, 16)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = vae(images, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 24}, "image_size must be a power of two, got 24"),
        ({"image_size": 2}, "image_size must be at least 2^num_layers = 4, got 2"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_resnet_blocks": -1}, "num_resnet_blocks must be at least 0, got -1"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"normalization": ((0.5,), (0.0,))}, "normalization's stds must not be 0, got (0.0, 0.0, 0.0)"),
        ({"normalization": ((0.5,),)}, "normalization must be (means, stds)"),
    ],
)
def test_refuses_impossible_arguments(changes, message):
    with pytest.raises(ValueError) as raised:
        _vae(**changes)
    assert str(raised.value).startswith(f"DiscreteVAE: {message}")


def _codes(*values):
    return torch.tensor([values])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda vae: vae(_images(size=8)),
            ValueError,
            "DiscreteVAE: img must be [B, 3, 16, 16] (channels, then image_size twice), got [2, 3, 8, 8].",
        ),
        (
            lambda vae: vae(_images(channels=1)),
            ValueError,
            "DiscreteVAE: img must be [B, 3, 16, 16] (channels, then image_size twice), got [2, 1, 16, 16].",
        ),
        (lambda vae: vae(_images()[0]), ValueError, "DiscreteVAE: img must be [B, 3, 16, 16]"),
        (lambda vae: vae(_images().byte()), TypeError, "DiscreteVAE: img must be floating, in 0..1, got torch.uint8."),
        (lambda vae: vae(_images(), temp=0.0), ValueError, "gumbel_codebook: temperature must be a finite number"),
        (
            lambda vae: vae.decode(_codes(0, 3, 12, 1)),
            ValueError,
            "DiscreteVAE.decode: ids must be in 0..11, got 0..12.",
        ),
        (lambda vae: vae.decode(_codes(-1)), ValueError, "DiscreteVAE.decode: ids must be in 0..11, got -1..-1."),
        (lambda vae: vae.decode(_codes(1, 2)), ValueError, "DiscreteVAE.decode: n must be a square number, got 2."),
        (lambda vae: vae.decode(_codes(1.0)), TypeError, "DiscreteVAE.decode: img_seq must be int64 [B, n], got"),
    ],
)
def test_refuses_in_words(call, error, message):
    with pytest.raises(error) as raised:
        call(_vae())
    assert str(raised.value).startswith(message)


def test_pictures_decode_alike_however_many_at_once(monkeypatch):
    vae, images = _vae().double(), _images(5).double()
    codes = vae.get_codebook_indices(images)
    whole, apart = [], []
    for pictures_at_once, results in ((5, whole), (2, apart)):
        monkeypatch.setattr("dalle_fast.models.dvae._AT_ONCE", pictures_at_once * SMALL["hidden_dim"] * 16 * 16)
        loss = vae(images, return_loss=True, seed=3)
        results += [vae.decode(codes), loss, *torch.autograd.grad(loss, list(vae.parameters()))]
    for one, other in zip(whole, apart, strict=True):
        assert_same_in_float64(other, one, n_terms=5 * 16 * 16)
