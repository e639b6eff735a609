"""The `.pt` files of dalle_pytorch's trainers: which they are, whose VAE they hold, what fits and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from golden_cases import FOLDER, golden
from record_releases import inputs, recorded

from benchmarks import peers
from dalle_fast import patterns
from dalle_fast.compat.checkpoints import upstream_checkpoint, upstream_weights, write_upstream
from dalle_fast.compat.formats.base import Companions
from dalle_fast.compat.formats.dalle_pytorch import load_dalle, vae_class
from dalle_fast.compat.formats.recognise import UnknownLayout, recognise
from dalle_fast.compat.reading import Stored, read
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

SIZES = {"dim": 24, "num_text_tokens": 9, "text_seq_len": 4, "depth": 4, "heads": 2, "dim_head": 12}
VAE = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4}
VARIANTS = {
    "cycle": {"attn_types": ("full", "axial_row", "axial_col", "conv_like")},
    "reversible": {"reversible": True, "shift_tokens": False, "attn_types": ("full", "conv_like")},
    "positions": {"rotary_emb": False, "sandwich_norm": True, "stable": True},
    "tied": {"share_input_output_emb": True, "shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0, 0, 1, 1)},
}


def made(path, **companions):
    stored = read(path)
    return recognise(stored).load(stored, Companions(**companions))


def described(path):
    stored = read(path)
    return recognise(stored).describe(stored)


def saved(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "dalle.pt")
    return tmp_path / "dalle.pt"


def dalle(vae=None, **changes):
    torch.manual_seed(0)
    model = DALLE(vae=DiscreteVAE(**VAE) if vae is None else vae, **{**SIZES, **changes})
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if name.endswith(".scale"):
                parameter.uniform_(0.3, 0.8)
    return model.eval()


# ------------------------------------------------------------------------------------------------ the original's files


def test_the_originals_own_dalle_file_draws_what_it_drew():
    case = golden("checkpoint_dalle")
    model = made(FOLDER / "checkpoint_dalle.pt")
    with torch.no_grad():
        case.check("logits", model(case.inputs["text"], case.inputs["image"]))
    told = described(FOLDER / "checkpoint_dalle.pt")
    assert (told.kind, told.problem, told.architecture["release"]) == ("DALLE", "", "1.6.6")
    assert told.architecture["dtype"] == "float32" and told.architecture["dim"] == 48


def test_the_originals_own_vae_file():
    case = golden("checkpoint_vae")
    stored = torch.load(FOLDER / "checkpoint_vae.pt", weights_only=True)
    vae = made(FOLDER / "checkpoint_vae.pt")
    assert not vae.training and vae.config["num_resnet_blocks"] == case.models["vae"]["num_resnet_blocks"]
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, stored["weights"][name]), name
    assert described(FOLDER / "checkpoint_vae.pt").kind == "DiscreteVAE"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_original_saves_is_read_and_computes_the_same(variant, tmp_path):
    if peers.missing():
        pytest.skip(peers.missing())
    original = peers.original()
    hparams = {**SIZES, **VARIANTS[variant]}
    torch.manual_seed(4)
    theirs = original.DALLE(vae=original.DiscreteVAE(**VAE), **hparams).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for leave_out in ((), ("rotary_emb", "shift_tokens", "reversible", "sandwich_norm", "share_input_output_emb")):
        told = {name: value for name, value in hparams.items() if name not in leave_out}
        path = saved(
            {
                "hparams": told, "vae_params": VAE, "epoch": 1, "version": "1.6.6", "vae_class_name": "DiscreteVAE",
                "weights": theirs.state_dict(), "opt_state": torch.optim.Adam(theirs.parameters()).state_dict(),
                "scheduler_state": None,
            },
            tmp_path,
        )  # fmt: skip
        model = made(path)
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs()), theirs(*inputs()))
            torch.testing.assert_close(model.vae.decode(inputs()[1]), theirs.vae.decode(inputs()[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_16_bits_computes_what_the_original_makes_of_it(dtype, tmp_path):
    """It is read into float32 there, with positions that stay rounded."""
    if peers.missing():
        pytest.skip(peers.missing())
    original = peers.original()
    torch.manual_seed(4)
    theirs = original.DALLE(vae=original.DiscreteVAE(**VAE), **SIZES).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {name: tensor.to(dtype) for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    path = saved({"hparams": SIZES, "vae_params": VAE, "version": "1.6.6", "weights": weights}, tmp_path)
    model = made(path).float()
    with torch.no_grad():
        wanted = theirs(*inputs())
        torch.testing.assert_close(model(*inputs()), wanted)
        model.save_pretrained(tmp_path / "model")
        torch.testing.assert_close(DALLE.from_pretrained(tmp_path / "model")(*inputs()), wanted)
        write_upstream(model, tmp_path / "again.pt")
        torch.testing.assert_close(made(tmp_path / "again.pt")(*inputs()), wanted)
        again = original.DALLE(vae=original.DiscreteVAE(**VAE), **torch.load(tmp_path / "again.pt")["hparams"]).eval()
        again.load_state_dict(torch.load(tmp_path / "again.pt")["weights"])
        torch.testing.assert_close(again(*inputs()), wanted)
        exact = DALLE(vae=DiscreteVAE(**VAE), **SIZES).eval()
        exact.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        assert (exact(*inputs()) - wanted).abs().max() > 1e-3  # angles that were not rounded are others


# --------------------------------------------------------------------------------------------------------- its tensors


def test_tensors_are_those_of_the_file_and_nothing_is_drawn(tmp_path):
    path = saved(upstream_checkpoint(dalle(shared_attn_ids=(0, 1, 0, 1))), tmp_path)
    stored = read(path)
    state = torch.get_rng_state()
    model = recognise(stored).load(stored, Companions())
    assert torch.equal(torch.get_rng_state(), state)
    theirs = {tensor.data_ptr() for tensor in stored.data["weights"].values()}
    assert all(tensor.data_ptr() in theirs for name, tensor in model.state_dict().items() if "image_" not in name)
    assert model.transformer.blocks[0].attn.fn is model.transformer.blocks[2].attn.fn
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("vae."))


def test_a_file_in_16_bits_gives_a_transformer_in_16_bits_and_a_vae_in_float32(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    checkpoint["weights"] = {name: tensor.half() for name, tensor in checkpoint["weights"].items()}
    path = saved(checkpoint, tmp_path)
    model = made(path)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert model.transformer.angles.dtype == torch.float32
    assert described(path).architecture["dtype"] == "float16"
    wide = model.to(torch.bfloat16)
    assert {p.dtype for p in wide.vae.parameters()} == {torch.float32}
    assert wide(*inputs()).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ its VAE


def test_a_vae_that_does_not_fit_is_refused_with_expected_and_found(tmp_path):
    path = saved(upstream_checkpoint(dalle()), tmp_path)
    for changes, found in (({"num_tokens": 13}, "13 codes in a grid of 4 x 4"), ({"num_layers": 1}, "grid of 8 x 8")):
        write_upstream(DiscreteVAE(**{**VAE, **changes}), tmp_path / "vae.pt")
        with pytest.raises(ValueError, match=rf"expected 12 codes in a grid of 4 x 4, found .*{found} \(.*vae\.pt\)"):
            made(path, vae=tmp_path / "vae.pt")
    torch.manual_seed(9)
    other = DiscreteVAE(**VAE)
    write_upstream(other, tmp_path / "vae.pt")
    assert torch.equal(made(path, vae=tmp_path / "vae.pt").vae.codebook.weight, other.codebook.weight)


def test_a_file_without_a_vae_says_which_one_it_needs(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    checkpoint["vae_params"] = None
    checkpoint["weights"] = {n: t for n, t in checkpoint["weights"].items() if not n.startswith("vae.")}
    path = saved(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"Name it with --vae: one of 12 codes in a grid of 4 x 4"):
        made(path)
    assert "one of 12 codes" in described(path).architecture["vae"]
    write_upstream(DiscreteVAE(**VAE), tmp_path / "vae.pt")
    assert made(path, vae=tmp_path / "vae.pt").vae.num_tokens == 12


@pytest.mark.parametrize("said", ["OpenAIDiscreteVAE", None])
def test_openais_vae_lies_in_the_file(said, tmp_path):
    if importlib.util.find_spec("dalle_fast.compat.formats.openai_dvae") is None:
        pytest.skip("OpenAI's dVAE is not there")
    from openai_dvae_files import original_state, tiny

    vae = tiny(image_size=32)
    model = dalle(vae)
    path = saved(_with_vae_of(model, original_state(vae), said), tmp_path)
    assert described(path).architecture["vae"] == "OpenAIDiscreteVAE"
    again = made(path)
    text, codes = inputs()
    assert torch.equal(again(text, codes), model(text, codes))
    assert torch.equal(again.vae.decode(codes), vae.decode(codes))
    model.load_state_dict(torch.load(path)["weights"])  # and by hand


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_a_vqgan_lies_in_the_file_with_its_loss(quantizer, tmp_path):
    if importlib.util.find_spec("dalle_fast.compat.formats.taming_vqgan") is None:
        pytest.skip("VQGANs are not there")
    from dalle_fast.compat.formats.taming_vqgan import taming_names
    from dalle_fast.models.vqgan import VQGanVAE

    torch.manual_seed(3)
    vae = VQGanVAE(
        architecture={
            "image_size": 16, "channels": 3, "num_tokens": 12, "codebook_dim": 8, "quantizer": quantizer,
            "z_channels": 8, "hidden_dim": 32, "multipliers": (1, 1, 2), "num_res_blocks": 1, "attention_levels": (2,),
        }
    ).eval()  # fmt: skip
    model = dalle(vae)
    theirs = {f"model.{taming}": vae.state_dict()[ours] for ours, taming in taming_names(vae).items()}
    theirs["model.loss.perceptual_loss.net.slice1.0.weight"] = torch.zeros(3)
    path = saved(_with_vae_of(model, theirs, None), tmp_path)
    assert described(path).architecture["vae"] == "VQGanVAE"
    again = made(path)
    text, codes = inputs()
    assert torch.equal(again(text, codes), model(text, codes))
    assert torch.equal(again.vae.decode(codes), vae.decode(codes))
    model.load_state_dict(torch.load(path)["weights"])


def _with_vae_of(model, tensors, said):
    """A checkpoint whose VAE is not a DiscreteVAE."""
    twin = dalle(DiscreteVAE(**{**VAE, "num_tokens": model.vae.num_tokens}))
    weights = {name: t for name, t in upstream_weights(twin).items() if not name.startswith("vae.")}
    model.load_state_dict({name: t for name, t in twin.state_dict().items() if not name.startswith("vae.")}, False)
    checkpoint = {**upstream_checkpoint(twin), "vae_params": None, "vae_class_name": said}
    return {**checkpoint, "weights": weights | {f"vae.{name}": tensor for name, tensor in tensors.items()}}


def test_an_unknown_vae_is_named(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    weights = {n.replace("vae.", "vae.flow."): t for n, t in checkpoint["weights"].items()}
    checkpoint |= {"vae_params": None, "vae_class_name": "FlowVAE", "weights": weights}
    assert vae_class(checkpoint) == "FlowVAE"
    with pytest.raises(ValueError, match=r"must be a DiscreteVAE, OpenAI's or a VQGAN, got FlowVAE \(flow\.codebook"):
        made(saved(checkpoint, tmp_path))


# --------------------------------------------------------------------------------------------------- layers of blocks


def test_layers_of_blocks_attend_to_the_stored_blocks(tmp_path):
    torch.manual_seed(1)
    model = dalle(text_seq_len=16, attn_types=("sparse", "full"))  # 32 inputs: 2 blocks of 16
    checkpoint = upstream_checkpoint(model)
    layouts = [torch.tensor([[1, 0], [draw, 1]]) for draw in (0, 1)]
    for layer, layout in zip((0, 2), layouts, strict=True):
        name = f"transformer.layers.layers.{layer}.0.fn.fn.fn.fn.fn.attn_fn.master_layout"
        assert checkpoint["weights"][name].shape == (2, 2, 2)  # what we write the original has, too
        checkpoint["weights"][name] = layout.repeat(2, 1, 1)
    again = made(saved(checkpoint, tmp_path))
    for layer, layout in zip((0, 2), layouts, strict=True):
        wanted = patterns.make("block_sparse", text_len=17, grid=(4, 4), block=16, layout=layout.bool())
        assert again.transformer.blocks[layer].attn.fn.pattern == wanted
    assert again.transformer.blocks[1].attn.fn.pattern.name == "full"
    again.save_pretrained(tmp_path / "model")
    text, codes = torch.randint(1, 9, (2, 16)), inputs()[1]
    assert torch.equal(DALLE.from_pretrained(tmp_path / "model")(text, codes), again(text, codes))
    back = upstream_checkpoint(again)
    assert back["hparams"]["attn_types"] == ("sparse", "full", "sparse", "full")
    for name, tensor in checkpoint["weights"].items():
        assert torch.equal(back["weights"][name], tensor), name


def test_heads_that_attend_to_different_blocks_are_refused(tmp_path):
    checkpoint = upstream_checkpoint(dalle(text_seq_len=16, attn_types="sparse"))
    name = "transformer.layers.layers.1.0.fn.fn.fn.fn.fn.attn_fn.master_layout"
    checkpoint["weights"][name] = torch.tensor([[[1, 0], [0, 1]], [[1, 0], [1, 1]]])
    with pytest.raises(ValueError, match="heads of layer 1 attend to different blocks"):
        made(saved(checkpoint, tmp_path))


# ---------------------------------------------------------------------------------------------------- what is no model


def test_weights_alone_and_auxiliary_files_say_what_is_missing(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    path = saved(checkpoint["weights"], tmp_path)
    assert "cannot be told from weights" in described(path).problem
    with pytest.raises(ValueError, match="must hold the arguments of its model, too"):
        made(path)
    path = saved({**checkpoint, "weights": "To get a working standard checkpoint, look into ..."}, tmp_path)
    assert "Name the folder that it lies in" in described(path).problem
    with pytest.raises(ValueError, match=r"auxiliary\.pt of a DeepSpeed checkpoint"):
        made(path)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    weights = checkpoint["weights"]
    fewer = {name: tensor for name, tensor in weights.items() if name != "to_logits.0.bias"}
    with pytest.raises(ValueError, match=r"dalle\.pt: must hold the tensors of its DALLE.*logits_norm\.bias"):
        made(saved({**checkpoint, "weights": fewer}, tmp_path))
    with pytest.raises(ValueError, match=r"text_emb\.weight: expected \[13, 24\], found \[14, 24\]"):
        made(saved({**checkpoint, "weights": weights | {"text_emb.weight": torch.zeros(14, 24)}}, tmp_path))
    with pytest.raises(ValueError, match=r"transformer\.pos_emb must have a row for 5 text tokens and a square"):
        made(saved({**checkpoint, "weights": weights | {"transformer.pos_emb": torch.zeros(1, 20, 24)}}, tmp_path))
    with pytest.raises(ValueError, match=r"must hold arguments of a DiscreteVAE, got depth"):
        made(saved({**checkpoint, "vae_params": VAE | {"depth": 3}}, tmp_path))


ODD = (
    None,
    True,
    -1,
    10**9,
    10**18,
    1.5,
    "x",
    b"y",
    (),
    {},
    ("full", "mlp"),
    [1],
    torch.zeros(2),
    torch.zeros(2, 2, 2),
)


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value!r:.12}".replace("\n", " "))
def test_any_value_in_any_place_is_loaded_or_refused_before_it_costs_memory(value, tmp_path):
    """10**9 layers, heads, blocks or codes are not built to find out that the weights have others."""
    for place in ("hparams", "vae_params", "weights"):
        checkpoint, _ = recorded("1.1.2" if value != b"y" else "0.9.0")
        for key in list(checkpoint[place])[:: 1 if place != "weights" else 9]:
            changed = {**checkpoint, place: {**checkpoint[place], key: value}}
            stored = Stored(tmp_path / "dalle.pt", "zip", changed)
            with contextlib.suppress(ValueError):
                known = recognise(stored)
                known.describe(stored)
                known.load(stored, Companions())
    for place in ("hparams", "vae_params", "weights"):
        stored = Stored(tmp_path / "dalle.pt", "zip", {**recorded("1.1.2")[0], place: value})
        with contextlib.suppress(ValueError):
            recognise(stored).load(stored, Companions())


def test_sizes_that_are_not_those_of_the_weights_are_named(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    for place, key, value, sentence in (
        ("hparams", "depth", 10**9, "got depth = 1000000000 and weights of 4"),
        ("hparams", "heads", 4, r"got heads \* dim_head = 48 and weights of 24"),
        ("hparams", "dim", 32, "got dim = 32 and weights of 24"),
        ("vae_params", "num_resnet_blocks", 10**9, "got num_resnet_blocks = 1000000000 and weights of 0"),
        ("vae_params", "num_layers", 3, "got num_layers = 3 and weights of 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            made(saved({**checkpoint, place: {**checkpoint[place], key: value}}, tmp_path))


def test_another_model_is_no_vae(tmp_path):
    checkpoint = upstream_checkpoint(dalle())
    path = saved(checkpoint, tmp_path)
    stored = read(path)
    with pytest.raises(TypeError, match="load: vae"):
        recognise(stored).load(stored, Companions(vae=path))


def test_other_dicts_are_no_dalle(tmp_path):
    with pytest.raises(UnknownLayout):
        made(saved({"hparams": {}, "weights": {"a": torch.zeros(1)}}, tmp_path))
    with pytest.raises(ValueError, match=r"must hold transformer\.layers, got none"):
        made(saved({"hparams": {}, "vae_params": None, "weights": {}}, tmp_path))


def test_an_older_release_of_a_companionless_file_needs_no_vae_named():
    checkpoint, _ = recorded("0.9.0")
    assert "vae_class_name" not in checkpoint
    assert isinstance(load_dalle(checkpoint, Companions(), None).vae, DiscreteVAE)
