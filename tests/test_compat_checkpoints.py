"""Checkpoints in the original's layout: the keys of its own files, read back by us and, where installed, by it."""

from __future__ import annotations

import pytest
import torch
from golden_cases import FOLDER

from benchmarks import peers
from dalle_fast.compat import load
from dalle_fast.compat.checkpoints import upstream_checkpoint, write_upstream
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

VAE = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4, "num_resnet_blocks": 1}
SIZES = {"dim": 24, "num_text_tokens": 9, "text_seq_len": 4, "depth": 4, "heads": 2, "dim_head": 12}
VARIANTS = {
    "cycle": {"attn_types": ("full", "axial_row", "axial_col", "conv_like")},
    "plain": {"shift_tokens": False, "rotary_emb": False},
    "tied": {"share_input_output_emb": True, "stable": True},
    "shared": {"shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0, 0, 1, 1), "reversible": True},
    "sandwich": {"sandwich_norm": True, "attn_types": "axial_row", "loss_img_weight": 3},
}


def vae(**changes):
    torch.manual_seed(1)
    return DiscreteVAE(**{**VAE, **changes}).eval()


def dalle(**changes):
    torch.manual_seed(2)
    return DALLE(vae=vae(), **{**SIZES, **changes}).eval()


def tokens():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 9, (2, 4), generator=generator), torch.randint(0, 12, (2, 16), generator=generator)


def stored(model, tmp_path):
    write_upstream(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=True)


@pytest.mark.parametrize("file", ["checkpoint_dalle.pt", "checkpoint_vae.pt"])
def test_the_originals_own_files_come_out_as_they_went_in(file):
    theirs = torch.load(FOLDER / file, weights_only=True)
    model = DiscreteVAE(**theirs.get("vae_params", theirs["hparams"]))
    if "vae_params" in theirs:
        model = DALLE(vae=model, **theirs["hparams"])
    model.load_state_dict(theirs["weights"])
    ours = upstream_checkpoint(model)
    assert ours.keys() == theirs.keys()
    for key in theirs.keys() - {"weights", "opt_state"}:
        assert ours[key] == theirs[key], key
        assert type(ours[key]) is type(theirs[key])
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], tensor, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_read_what_we_write(variant, tmp_path):
    model = dalle(**VARIANTS[variant])
    read = stored(model, tmp_path)
    again = DALLE(vae=DiscreteVAE(**read["vae_params"]), **read["hparams"]).eval()
    again.load_state_dict(read["weights"])
    assert torch.equal(again(*tokens()), model(*tokens()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_original_reads_what_we_write(variant, tmp_path):
    if peers.missing():
        pytest.skip(peers.missing())
    original = peers.original()
    model = dalle(**VARIANTS[variant])
    read = stored(model, tmp_path)
    # As its generate.py does.
    theirs = original.DALLE(vae=original.DiscreteVAE(**read["vae_params"]), **read["hparams"])
    theirs.load_state_dict(read["weights"])
    text, codes = tokens()
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(text, codes), model(text, codes))
        torch.testing.assert_close(theirs.vae.decode(codes), model.vae.decode(codes))


def test_a_vae_is_read_back_as_the_original_reads_it(tmp_path):
    model = vae(smooth_l1_loss=True, channels=1)
    write_upstream(model, tmp_path / "vae.pt")
    again = load(tmp_path / "vae.pt").model
    assert again.config == model.config and not again.training
    codes = tokens()[1]
    assert torch.equal(again.decode(codes), model.decode(codes))


def test_what_the_original_lacks_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"must have quantizer='gumbel', got 'vq'.*fold=true"):
        upstream_checkpoint(vae(quantizer="vq"))
    with pytest.raises(ValueError, match=r"got paper_conv, paper_row\. It cannot run"):
        upstream_checkpoint(dalle(attn_types=("paper_row", "paper_conv", "full")))
    with pytest.raises(TypeError, match="must be a DALLE or DiscreteVAE, got Linear"):
        upstream_checkpoint(torch.nn.Linear(1, 1))
