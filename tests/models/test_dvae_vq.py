"""DiscreteVAE with quantizer="vq": its loss, its codes, learning, saving, inside DALLE."""

import pytest
import torch
from tolerance import assert_same_in_float64

from dalle_fast import DALLE, DiscreteVAE
from dalle_fast.models.quantiser import VectorQuantiser

SMALL = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4}


def vq(**changes):
    torch.manual_seed(0)
    return DiscreteVAE(**{**SMALL, "quantizer": "vq", **changes})


def pictures(batch=2, size=16, seed=1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_encoder_ends_in_the_width_of_the_codebook():
    vae = vq(num_resnet_blocks=1)
    assert vae.encoder[-1].weight.shape == (6, 4, 1, 1)
    assert isinstance(vae.codebook, VectorQuantiser) and vae.codebook.weight.shape == (12, 6)
    assert "codebook.weight" not in dict(vae.named_parameters())
    plain = DiscreteVAE(**SMALL, num_resnet_blocks=1)
    others = {name for name in plain.state_dict() if not name.startswith("codebook.")}
    assert {name for name in vae.state_dict() if not name.startswith("codebook.")} == others


def test_what_it_trains_on_is_what_its_codes_decode_to():
    vae, images = vq().double(), pictures().double()
    for _ in range(3):
        recons = vae(images)
        codes = vae.get_codebook_indices(images)
        assert codes.shape == (2, 16) and codes.dtype == torch.int64
        assert_same_in_float64(vae.decode(codes), recons, n_terms=6 * 4)
        assert torch.equal(vae.eval()(images), recons)
        vae.train()


def test_the_loss_is_that_of_the_pictures_and_the_commitment():
    vae, images = vq(commitment_loss_weight=0.5, smooth_l1_loss=True), pictures()
    loss, recons, statistics = vae(images, return_loss=True, return_recons=True, return_statistics=True)
    z = vae.encoder(vae.norm(images))
    quantised = vae.codebook.weight[statistics.codes].permute(0, 3, 1, 2)
    assert torch.equal(statistics.penalty, torch.nn.functional.mse_loss(z, quantised))
    assert torch.equal(statistics.reconstruction, torch.nn.functional.smooth_l1_loss(recons, vae.norm(images)))
    assert torch.equal(loss, statistics.reconstruction + 0.5 * statistics.penalty)
    assert statistics.codes is statistics.noisy_codes
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("normalised", [False, True])
def test_a_few_steps_learn_four_plain_colours(normalised):
    vae, images = vq(normalised_codes=normalised), pictures(4, size=1).expand(-1, -1, 16, 16)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = vae(images, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert vae.codebook.updates == 39


def test_bfloat16_autocast_trains():
    vae, images = vq(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            loss = vae(images, return_loss=True)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in vae.parameters())
    assert vae.codebook.weight.dtype == torch.float32 and vae.codebook.weight.isfinite().all()
    assert vae.bfloat16().eval()(images.bfloat16()).dtype == torch.bfloat16


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path):
    vae = vq(codebook_decay=0.5, revive_codes_below=0.5, normalised_codes=True, commitment_loss_weight=1.0)
    for seed in range(15):
        vae(pictures(seed=seed))
    vae.save_pretrained(tmp_path / "vae")
    again = DiscreteVAE.from_pretrained(tmp_path / "vae")
    assert again.config == vae.config and again.quantizer == "vq"
    again.train()
    for seed in range(15, 30):
        assert torch.equal(vae(pictures(seed=seed)), again(pictures(seed=seed)))
    state = again.state_dict()
    assert vae.codebook.revived > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())


def test_compiled_it_learns_the_same_and_is_one_graph_in_evaluation():
    plain, compiled = (vq(codebook_decay=0.5, revive_codes_below=0.5) for _ in range(2))
    torch.compiler.reset()
    run = torch.compile(compiled, backend="aot_eager")
    for seed in range(15):
        assert torch.equal(run(pictures(seed=seed)), plain(pictures(seed=seed)))
    state = compiled.state_dict()
    assert plain.codebook.revived > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    plain.eval()
    for function in (plain, plain.get_codebook_indices):
        whole = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(whole(pictures()), function(pictures()))


def test_dalle_draws_with_it_and_teaches_it_nothing(tmp_path):
    vae = vq()
    vae(pictures())  # an update is due
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    dalle = DALLE(vae=vae, dim=24, num_text_tokens=30, text_seq_len=5, depth=1, heads=2, dim_head=12)
    text = torch.randint(1, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    dalle.train()(text, pictures(), return_loss=True).backward()
    assert dalle.generate_images(text, seed=0).shape == (2, 3, 16, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    dalle.save_pretrained(tmp_path / "dalle")
    again = DALLE.from_pretrained(tmp_path / "dalle")
    assert torch.equal(again.generate_images(text, seed=0), dalle.eval().generate_images(text, seed=0))


def test_an_empty_batch():
    vae = vq()
    assert vae(pictures(0)).shape == (0, 3, 16, 16)
    assert vae.get_codebook_indices(pictures(0)).shape == (0, 16)
    assert not vae.codebook.started


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantizer": "vqgan"}, "quantizer must be one of 'gumbel', 'vq', got 'vqgan'."),
        ({"quantizer": "vq", "reinmax": True}, "reinmax must be left out with quantizer='vq', got True."),
        ({"quantizer": "vq", "straight_through": True}, "straight_through must be left out with quantizer='vq', got"),
        ({"quantizer": "vq", "temperature": 1.0}, "temperature must be left out with quantizer='vq', got 1.0."),
        ({"quantizer": "vq", "kl_div_loss_weight": 0.1}, "kl_div_loss_weight must be left out with quantizer='vq'"),
        (
            {"codebook_decay": 0.9},
            "codebook_decay must be left out with quantizer='gumbel', got 0.9. It is an argument",
        ),
        ({"normalised_codes": True}, "normalised_codes must be left out with quantizer='gumbel', got True."),
        ({"revive_codes_below": 0.0}, "revive_codes_below must be left out with quantizer='gumbel', got 0.0."),
        ({"commitment_loss_weight": 1.0}, "commitment_loss_weight must be left out with quantizer='gumbel', got 1.0."),
    ],
)
def test_refuses_arguments_of_the_other_quantizer(arguments, message):
    with pytest.raises(ValueError) as raised:
        DiscreteVAE(**SMALL, **arguments)
    assert str(raised.value).startswith(f"DiscreteVAE: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temp": 0.5}, "DiscreteVAE: temp must be left out with quantizer='vq', got 0.5. It takes the nearest code"),
        ({"gumbel_noise": torch.zeros(2, 12, 4, 4)}, "DiscreteVAE: gumbel_noise must be left out with quantizer='vq'"),
        ({"first_row": 0}, "DiscreteVAE: first_row must be left out with quantizer='vq', got 0."),
        ({"seed": 0}, "DiscreteVAE: seed must be left out with quantizer='vq', got 0."),
        ({"return_logits": True}, "DiscreteVAE: return_logits must be left out with quantizer='vq', got True."),
        ({"return_statistics": True}, "DiscreteVAE: return_statistics must come with return_loss=True, got False."),
    ],
)
def test_refuses_what_has_no_meaning_for_it(arguments, message):
    vae = vq()
    with pytest.raises(ValueError) as raised:
        vae(pictures(), **arguments)
    assert str(raised.value).startswith(message)
    assert not vae.codebook.started
