"""Names of CLIP's tensors: OpenAI's, Hugging Face's and ours, each way bit for bit; and what the home CLIP refuses."""

import pytest
import torch
from clip_twins import check_against_twin, hugging_face_twin, open_clip_twin, openai_twin

import dalle_fast
from dalle_fast.clip import (
    PretrainedCLIP,
    hugging_face_config,
    hugging_face_state_dict,
    load,
    openai_state_dict,
)
from dalle_fast.clip.names import to_openai, to_ours
from dalle_fast.models.clip import CLIP


def equal(one, other):
    """Whether two state dicts are the same, dtypes included."""
    assert sorted(one) == sorted(other)
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def model_of(weights, tmp_path, **options):
    torch.save(dict(weights), tmp_path / "weights.pt")
    return load(tmp_path / "weights.pt", quick_gelu=True, **options)


def test_openai_to_ours_to_hugging_face_and_back_is_bit_for_bit(tmp_path):
    theirs = openai_twin().state_dict()
    model = model_of(theirs, tmp_path)
    split = hugging_face_state_dict(model)
    assert equal(openai_state_dict(model), theirs)
    assert equal(to_ours(split), model.state_dict())
    assert split["text_projection.weight"].shape == theirs["text_projection"].t().shape
    block = "vision_model.encoder.layers.1.self_attn"
    fused = theirs["visual.transformer.resblocks.1.attn.in_proj_weight"]
    assert equal({n: split[f"{block}.{n}_proj.weight"] for n in "qkv"}, dict(zip("qkv", fused.chunk(3), strict=True)))
    assert all(tensor.is_contiguous() for tensor in (*split.values(), *openai_state_dict(model).values()))


def test_hugging_face_to_ours_to_hugging_face_is_bit_for_bit(tmp_path):
    twin = hugging_face_twin()
    twin.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert equal(hugging_face_state_dict(model), twin.state_dict())


@pytest.mark.parametrize("third", [torch.zeros(()), torch.zeros(95, 96), torch.zeros(96, 96).half(), None])
def test_thirds_that_do_not_fit_together_stay_apart(third, tmp_path):
    block = "vision_model.encoder.layers.0.self_attn"
    weights = dict(hugging_face_twin().state_dict()) | {f"{block}.k_proj.weight": third}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    assert f"{block}.q_proj.weight" in to_ours(weights)
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"missing: image_tower\.blocks\.0\.to_qkv\.weight; unknown: vision_model"):
        load(tmp_path / "weights.pt", quick_gelu=True, vision_heads=2)


def test_sizes_by_default_are_those_of_vit_b_32():
    with torch.device("meta"):
        weights = to_openai(PretrainedCLIP().state_dict())
    # of the model that OpenAI published
    assert (len(weights), sum(tensor.numel() for tensor in weights.values())) == (302, 151_277_313)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_hugging_face_runs_what_we_export(tmp_path, act):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = model_of(openai_twin().state_dict(), tmp_path)
    config = hugging_face_config(PretrainedCLIP(**model.config | {"quick_gelu": act == "quick_gelu"}))
    twin = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).eval()
    twin.load_state_dict(hugging_face_state_dict(model))
    again = PretrainedCLIP(**model.config | {"quick_gelu": act == "quick_gelu"}).eval()
    again.load_state_dict(twin.state_dict())
    check_against_twin(again, twin)


def test_openai_runs_what_we_export(tmp_path):
    hugging_face_twin().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vision_heads must be 1\.5 for a width of 96, .* got 2"):
        openai_state_dict(load(tmp_path))
    model = model_of(openai_twin().state_dict(), tmp_path)
    twin = openai_twin()
    torch.nn.init.zeros_(twin.text_projection)
    twin.load_state_dict(openai_state_dict(model))
    check_against_twin(model, twin)


def test_dtypes_of_every_tensor_are_kept():
    weights = {
        name: tensor.half() if "attn" in name or "proj" in name else tensor
        for name, tensor in openai_twin().state_dict().items()
    }
    ours = to_ours(weights)
    model = PretrainedCLIP(
        embed_dim=24, image_size=32, patch_size=8, vision_width=128, vision_layers=2, context_length=16, vocab_size=60,
        text_width=64, text_layers=3,
    )  # fmt: skip
    model.load_state_dict(ours, assign=True)
    assert equal(openai_state_dict(model), weights)
    assert equal(to_ours(hugging_face_state_dict(model)), ours)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_load_state_dict_takes_every_spelling(kind):
    twin = open_clip_twin(kind, quick_gelu=True)
    model = PretrainedCLIP(
        embed_dim=24, image_size=32, patch_size=8, vision_width=128, vision_layers=2, context_length=16, vocab_size=60,
        text_width=64, text_layers=3,
    ).eval()  # fmt: skip
    model.load_state_dict({f"module.{name}": tensor for name, tensor in twin.state_dict().items()})
    check_against_twin(model, twin)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"logit_scale": torch.zeros(())})
    with pytest.raises(ValueError, match="it is the CLIP of dalle_pytorch"):
        model.load_state_dict(home().state_dict())
    with pytest.raises(ValueError, match=r"text_tower.pos_emb: expected \[16, 64\], found \[15, 64\]"):
        model.load_state_dict({"positional_embedding": torch.zeros(15, 64)})


# --- the home CLIP


def home():
    return CLIP(
        dim_text=16, dim_image=16, dim_latent=16, num_text_tokens=25, text_enc_depth=1, text_seq_len=5, text_heads=1,
        visual_enc_depth=1, visual_heads=1, visual_image_size=16, visual_patch_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("twin", [openai_twin, open_clip_twin, hugging_face_twin])
def test_the_home_clip_refuses_openai_s_weights_and_says_why(twin, tmp_path):
    weights = twin().state_dict()
    with pytest.raises(ValueError, match=r"another architecture: class token and end token .* dalle_fast\.clip\.load"):
        home().load_state_dict(weights)
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=rf"CLIP: {tmp_path}/clip.pt must hold .* another architecture"):
        CLIP.from_pretrained(tmp_path / "clip.pt")


def test_the_home_clip_refuses_directories_of_other_clips(tmp_path):
    hugging_face_twin().save_pretrained(tmp_path / "theirs")
    load(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    for name in ("theirs", "ours"):
        with pytest.raises(ValueError, match="another architecture"):
            CLIP.from_pretrained(tmp_path / name)
    home().save_pretrained(tmp_path / "home")
    assert isinstance(CLIP.from_pretrained(tmp_path / "home"), CLIP)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(FileNotFoundError, match="must be a directory written by save_pretrained"):
        CLIP.from_pretrained(tmp_path / "text.pt")


def test_the_names_are_public():
    assert dalle_fast.PretrainedCLIP is PretrainedCLIP and dalle_fast.clip.load is load
