"""Parameter names: ours, those of dalle_pytorch 1.6.6, and those of its older releases."""

from __future__ import annotations

import pytest
import torch
from golden_cases import golden, names

from dalle_fast import CLIP, DALLE, DiscreteVAE
from dalle_fast.compat import translate, upstream_names
from dalle_fast.transformer import Transformer

VAE = {"image_size": 32, "num_tokens": 16, "codebook_dim": 48, "num_layers": 2, "hidden_dim": 8, "num_resnet_blocks": 1}
TINY = {"dim": 48, "num_text_tokens": 20, "text_seq_len": 6, "depth": 1, "heads": 2, "dim_head": 24}

# layout of a default model by release: `.fn` wrappers around attention and feed-forward, index of the head's norm, what
# the constructor defaults were, and buffers in the file
RELEASES = {
    "0.9.0": (2, 2, 0, {"shift_tokens": False, "rotary_emb": False}, {"logits_mask": (1, 70, 42)}),
    "0.10.0": (2, 2, 0, {"shift_tokens": False, "rotary_emb": False}, {}),
    "0.12.1": (2, 2, 1, {"shift_tokens": False, "rotary_emb": False}, {}),
    "0.12.5": (2, 2, 0, {"shift_tokens": False, "rotary_emb": False}, {}),
    "1.0.0": (3, 3, 0, {"shift_tokens": True, "rotary_emb": False}, {}),
    "1.0.1": (2, 2, 0, {"shift_tokens": False, "rotary_emb": False}, {}),
    "1.0.5": (3, 3, 0, {"shift_tokens": True, "rotary_emb": True}, {"transformer.pos_emb": (1, 1, 70, 24)}),
    "1.1.2": (3, 3, 0, {"shift_tokens": True, "rotary_emb": True}, {"transformer.pos_emb": (1, 71, 24)}),
    "1.4.0": (5, 4, 0, {"shift_tokens": True, "rotary_emb": True}, {"transformer.pos_emb": (1, 71, 24)}),
    "1.6.6 without shift": (3, 2, 0, {"shift_tokens": False, "rotary_emb": True}, {"transformer.pos_emb": (1, 71, 24)}),
}
AXIAL = {"image_row_emb": (1, 8, 1, 48), "image_col_emb": (1, 1, 8, 48)}


def dalle(**changes: object) -> DALLE:
    return DALLE(vae=DiscreteVAE(**VAE), **{**TINY, **changes})


def random_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


def as_released(ours: dict[str, torch.Tensor], release: str, spelling: str = "weights_{}") -> dict[str, torch.Tensor]:
    """Our state dict as that release would have written it."""
    n_attn, n_ff, head, _, buffers = RELEASES[release]
    written = {name: torch.zeros(shape) for name, shape in buffers.items()}
    leaves = {"fn.to_qkv.": "to_qkv.", "fn.to_out.": "to_out.0.", "fn.w_in.": "net.0.", "fn.w_out.": "net.3."}
    for name, tensor in ours.items():
        if name.startswith("transformer.blocks.0."):
            branch, leaf = name.removeprefix("transformer.blocks.0.").split(".", 1)
            depth = {"scale": 0, "norm.weight": 1, "norm.bias": 1}.get(leaf, n_attn if branch == "attn" else n_ff)
            for mine, theirs in leaves.items():
                leaf = leaf.replace(mine, theirs)
            name = f"transformer.layers.layers.0.{int(branch == 'ff')}." + "fn." * depth + leaf
        elif name in AXIAL:
            axis = list(AXIAL).index(name)
            name, tensor = f"image_pos_emb.{spelling.format(axis)}", tensor.reshape(AXIAL[name])
        elif name.startswith("logits_norm."):
            name = name.replace("logits_norm.", f"to_logits.{head}.")
        elif name.startswith("to_logits."):
            name = name.replace("to_logits.", f"to_logits.{head + 1}.")
        written[name] = tensor
    return written


@pytest.mark.parametrize("spelling", ["weights_{}", "weights.{}"])
@pytest.mark.parametrize("release", RELEASES)
def test_state_dict_of_a_release_loads(release: str, spelling: str) -> None:
    model = dalle(**RELEASES[release][3])
    ours = random_state(model)
    model.load_state_dict(as_released(ours, release, spelling))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("name", [n for n in names("dalle_loss") if "weights_file" not in golden(n).spec])
def test_upstream_names_of_dalle_are_those_in_its_files(name: str) -> None:
    case = golden(name)
    model = case.build_dalle()
    mapping, ours = upstream_names(model), model.state_dict()
    assert mapping.keys() == ours.keys()
    for mine, theirs in mapping.items():
        assert torch.equal(ours[mine].flatten(), case.weights[theirs].flatten()), (mine, theirs)
    left_out = case.weights.keys() - mapping.values()
    assert left_out <= {"transformer.pos_emb"} | {
        f"{k}_emb.linear.{p}" for k in ("text", "image") for p in ("weight", "bias")
    }


def test_upstream_names_of_clip_and_transformer() -> None:
    case = golden("clip")
    clip = case.build_clip()
    mapping = upstream_names(clip)
    assert set(mapping.values()) == case.weights.keys()
    text_transformer = upstream_names(clip.text_transformer)
    assert {f"text_transformer.{v}" for v in text_transformer.values()} == {
        v for v in mapping.values() if v.startswith("text_tr")
    }


@pytest.mark.parametrize("reversible", [False, True])
def test_a_transformer_alone_reads_its_part_of_a_file(reversible: bool) -> None:
    case = golden("dalle_reversible" if reversible else "dalle_full")
    transformer = case.build_dalle().transformer
    below = {k.removeprefix("transformer."): v for k, v in case.weights.items() if k.startswith("transformer.")}
    again = Transformer(**transformer.config)
    again.load_state_dict(below)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in transformer.state_dict().items())


def test_upstream_names_of_a_vae_are_its_own() -> None:
    vae = DiscreteVAE(**VAE)
    assert upstream_names(vae) == {name: name for name in vae.state_dict()}


def test_own_names_stay_and_unknown_names_are_reported() -> None:
    model = dalle()
    ours = random_state(model)
    assert translate(model, ours).keys() == ours.keys()
    ours["transformer.layers.layers.0.0.fn.surprise"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="surprise"):
        model.load_state_dict(ours)
    assert model.load_state_dict(ours, strict=False).unexpected_keys == ["transformer.layers.layers.0.0.fn.surprise"]


def test_upstream_names_into_a_clip() -> None:
    clip = CLIP(
        dim_text=16,
        dim_image=16,
        dim_latent=8,
        num_text_tokens=20,
        text_enc_depth=1,
        text_seq_len=6,
        text_heads=1,
        visual_enc_depth=1,
        visual_heads=1,
        visual_image_size=16,
        visual_patch_size=8,
    )
    ours, mapping = random_state(clip), upstream_names(clip)
    clip.load_state_dict({mapping[name]: tensor for name, tensor in ours.items()})
    assert all(torch.equal(tensor, ours[name]) for name, tensor in clip.state_dict().items())


@pytest.mark.parametrize("option", ["shift_tokens", "reversible"])
@pytest.mark.parametrize("trained_with", [True, False])
def test_weights_trained_with_another_option_are_refused(option: str, trained_with: bool) -> None:
    trained = dalle(**{option: trained_with})
    mapping = upstream_names(trained)
    weights = {mapping[name]: tensor for name, tensor in trained.state_dict().items()}
    other = dalle(**{option: not trained_with})
    before = random_state(other)
    other.load_state_dict(before)
    with pytest.raises(
        ValueError, match=rf"{option}={trained_with} must go into a model built so, got one with .*={not trained_with}"
    ):
        other.load_state_dict(weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_another_shape_is_named_with_both_shapes() -> None:
    wide = dalle(num_text_tokens=30)
    mapping = upstream_names(wide)
    weights = {mapping[name]: tensor for name, tensor in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"text_emb.weight: expected \[26, 48\], found \[36, 48\]"):
        dalle().load_state_dict(weights)


def test_weights_from_before_padding_ids_are_named() -> None:
    weights = as_released(random_state(dalle(shift_tokens=False, rotary_emb=False)), "0.10.0")
    weights["text_emb.weight"] = weights["text_emb.weight"][:20]
    with pytest.raises(ValueError, match=r"before 0\.9\.0"):
        dalle(shift_tokens=False, rotary_emb=False).load_state_dict(weights)


def test_a_file_instead_of_its_dict_is_named() -> None:
    with pytest.raises(TypeError, match="must map names to tensors, got str"):
        dalle().load_state_dict("dalle.pt")
    with pytest.raises(ValueError, match=r"Pass checkpoint\['weights'\]"):
        dalle().load_state_dict({"hparams": {}, "weights": dalle().state_dict()})
