"""DiscreteVAE's counter noise: the oracle's gradient with that noise written out, seeds, numbers of rows, graphs."""

import pytest
import torch
from tolerance import assert_same_in_float64, assert_within_budget

from dalle_fast import DiscreteVAE, rng
from dalle_fast.functional import gumbel_noise

SMALL = {"image_size": 16, "num_tokens": 23, "codebook_dim": 6, "num_layers": 2, "num_resnet_blocks": 1}
MODES = {
    "soft": {},
    "straight_through": {"straight_through": True},
    "reinmax": {"straight_through": True, "reinmax": True},
}
SEED, FIRST_ROW = 11, 5 * 2**20


def vae(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return DiscreteVAE(**{**SMALL, "hidden_dim": 8, "kl_div_loss_weight": 0.01, **changes}).to(dtype)


def pictures(batch=3, dtype=torch.float32):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def written_out(batch=3, side=4):
    """The noise that SEED draws from FIRST_ROW on, [B, K, h, w]."""
    rows = FIRST_ROW + torch.arange(batch * side * side)
    noise = gumbel_noise(SEED, rows, rng.Stream.VAE, SMALL["num_tokens"])
    return noise.unflatten(0, (batch, side, side)).permute(0, 3, 1, 2)


def gradients(model, **noise):
    """Of the loss: by name for the parameters of the bottleneck, those of the encoder before it in one row.

    Those of the decoder are sums of torch's, whose rounding depends on how embeds lie in memory.
    """
    loss = model(pictures(dtype=next(model.parameters()).dtype), return_loss=True, temp=0.7, **noise)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    bottleneck = {name: found.pop(name) for name in ("codebook.weight", "encoder.3.weight", "encoder.3.bias")}
    return bottleneck | {"encoder": torch.cat([g.flatten() for name, g in found.items() if name.startswith("encoder")])}


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_oracle_with_the_same_noise_written_out(mode, impl, bottleneck_takes):
    bottleneck_takes("reference")
    exact = gradients(vae(torch.float64, **MODES[mode]), gumbel_noise=written_out())
    own = gradients(vae(**MODES[mode]), gumbel_noise=written_out())
    bottleneck_takes(impl)
    got = gradients(vae(**MODES[mode]), seed=SEED, first_row=FIRST_ROW)
    for name in exact:
        assert_within_budget(got[name], exact[name], own[name], name)
    other = gradients(vae(**MODES[mode]), seed=SEED, first_row=FIRST_ROW + 1)
    assert not torch.equal(other["codebook.weight"], got["codebook.weight"])


def test_a_seed_repeats_as_a_number_and_as_a_tensor():
    model, images = vae(), pictures()
    first = model(images, seed=SEED)
    assert torch.equal(model(images, seed=SEED), first)
    assert torch.equal(model(images, seed=rng.seeds_to_tensor(SEED)), first)
    assert not torch.equal(model(images, seed=SEED + 1), first)


def test_a_sample_with_its_row_number_draws_what_it_draws_in_the_batch():
    model, images = vae(torch.float64), pictures(dtype=torch.float64)
    together = model(images, seed=SEED)
    alone = torch.cat([model(images[i : i + 1], seed=SEED, first_row=16 * i) for i in range(3)])
    assert_same_in_float64(alone, together, 8 * 16)


def test_rows_are_numbered_by_rank_unless_said_otherwise(monkeypatch):
    model, images = vae(), pictures()
    monkeypatch.setattr(rng, "first_row_of_rank", lambda rows: 1000 * rows)
    assert torch.equal(model(images, seed=SEED), model(images, seed=SEED, first_row=1000 * 3 * 16))
    assert not torch.equal(model(images, seed=SEED), model(images, seed=SEED, first_row=0))


def test_a_training_step_compiles_into_one_graph_and_draws_anew(bottleneck):
    model, images = vae(), pictures()
    graphs = []

    def step(images):
        return model(images, return_loss=True, return_recons=True)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count)
    torch.manual_seed(2)
    first, second = compiled(images), compiled(images)
    assert len(graphs) == 1 and not torch.equal(first[1], second[1])
    torch.manual_seed(2)
    assert torch.equal(step(images)[1], first[1]) and torch.equal(step(images)[1], second[1])


def test_pictures_that_are_not_finite_are_refused_where_they_show():
    images = pictures()
    images[1] = torch.nan
    for call in (lambda: vae()(images), lambda: vae().get_codebook_indices(images)):
        with pytest.raises(ValueError, match=r"features must be finite, got nan at \[b=1, f=0, y=0, x=0\]"):
            call()
