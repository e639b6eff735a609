"""The optimiser of a training: which parameters are decayed, which are Muon's, and that Muon is Muon."""

import pytest
import torch
from torch import nn

pytest.importorskip("pydantic")

from dalle_fast import DALLE, DiscreteVAE
from dalle_fast.training.config import OptimiserConfig
from dalle_fast.training.muon import orthogonalise
from dalle_fast.training.optimisers import MuonAndAdamW, is_decayed, make_optimiser


@pytest.fixture(scope="module")
def named():
    vae = DiscreteVAE(image_size=8, num_tokens=8, codebook_dim=4, num_layers=1, hidden_dim=4)
    dalle = DALLE(
        dim=16, vae=vae, num_text_tokens=12, text_seq_len=4, depth=1, heads=2, dim_head=8, rotary_emb=False
    )  # fmt: skip
    return [(name, parameter) for name, parameter in dalle.named_parameters() if parameter.requires_grad]


def test_only_weight_matrices_decay(named):
    decayed = {name.removeprefix("transformer.blocks.0.") for name, p in named if is_decayed(name, p)}
    assert decayed == {
        "attn.fn.to_qkv.weight", "attn.fn.to_out.weight", "ff.fn.w_in.weight", "ff.fn.w_out.weight",
        "to_logits.weight",
    }  # fmt: skip
    assert is_decayed("to_visual_embedding.weight", torch.ones(4, 4))
    assert not is_decayed("codebook.weight", torch.ones(4, 4))
    optimiser = make_optimiser(OptimiserConfig(weight_decay=0.1), named)
    of = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert all(of[id(p)] == (0.1 if is_decayed(name, p) else 0.0) for name, p in named)


def test_muon_takes_the_matrices_of_transformers_map_by_map(named):
    optimiser = make_optimiser(OptimiserConfig(name="muon", weight_decay=0.1), named)
    maps = {id(p): group["maps"] for group in optimiser.param_groups for p in group["params"]}
    taken = {name.rpartition("fn.")[2]: maps[id(p)] for name, p in named if maps[id(p)]}
    assert taken == {"to_qkv.weight": 3, "to_out.weight": 1, "w_in.weight": 2, "w_out.weight": 1}


def test_a_muon_step_is_orthogonal_and_the_rest_adamws():
    generator = torch.Generator().manual_seed(0)
    matrix, bias = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((12, 8), (8,)))
    twin = nn.Parameter(bias.detach().clone())
    named = [("transformer.w_in.weight", matrix), ("bias", bias)]
    optimiser = make_optimiser(OptimiserConfig(name="muon", learning_rate=0.1, weight_decay=0.5), named)
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        before = matrix.detach().clone()
        matrix.grad, bias.grad = (torch.randn(p.shape, generator=generator) for p in (matrix, bias))
        twin.grad = bias.grad.clone()
        optimiser.step()
        adamw.step()
    assert torch.equal(bias, twin)
    update = (before * (1 - 0.1 * 0.5) - matrix) / (0.1 * 0.2 * 8**0.5)
    for part in update.split(6):
        values = torch.linalg.svdvals(part.detach())
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_resumes_from_its_state():
    def trained(steps: int, start=None, state=None):
        matrix = nn.Parameter(torch.eye(4) if start is None else start.clone())
        optimiser = make_optimiser(OptimiserConfig(name="muon"), [("transformer.to_out.weight", matrix)])
        if state is not None:
            optimiser.load_state_dict(state)
        for _ in range(steps):
            matrix.grad = orthogonalise((matrix.detach() + torch.arange(16.0).view(4, 4))[None])[0]
            optimiser.step()
        return matrix.detach(), optimiser.state_dict()

    assert torch.equal(trained(4)[0], trained(2, *trained(2))[0])


def test_no_parameters_and_closures_are_refused():
    with pytest.raises(ValueError, match="must have parameters to train, got none"):
        make_optimiser(OptimiserConfig(), [])
    optimiser = make_optimiser(OptimiserConfig(name="muon"), [("bias", nn.Parameter(torch.ones(2)))])
    assert isinstance(optimiser, MuonAndAdamW)
    with pytest.raises(TypeError, match="closure must be None"):
        optimiser.step(lambda: None)
    assert type(make_optimiser(OptimiserConfig(name="adam"), [("a", nn.Parameter(torch.ones(2)))])) is torch.optim.Adam
