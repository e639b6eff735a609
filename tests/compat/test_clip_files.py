"""Files of pretrained CLIPs: each is read as its twin computes, and what is none that runs is refused by its kind."""

import json
import warnings

import pytest
import torch
from clip_twins import (
    END,
    check_against_twin,
    hugging_face_twin,
    open_clip_module,
    open_clip_twin,
    openai_module,
    openai_twin,
    pictures,
    texts,
)
from safetensors.torch import save_file

from dalle_fast.clip import PretrainedCLIP, load, names
from dalle_fast.compat.formats import Companions
from dalle_fast.compat.formats.clip import FORMATS
from dalle_fast.compat.reading import read

ASSUMED = "does not say which GELU it was trained with: {} is assumed"


@pytest.fixture
def place(tmp_path):
    """A folder whose name says nothing."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def quiet():
    """Nothing is assumed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def archive(twin, path, *, half=False):
    """The twin as OpenAI stores it: traced, and in 16 bits but for norms, embeddings and the scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(twin, (pictures(1), texts()[:1]), check_trace=False)
        if half:
            kept = ("ln_", "token_embedding", "positional_embedding", "class_embedding", "logit_scale")
            for name, parameter in traced.named_parameters():
                if not any(part in name for part in kept):
                    parameter.data = parameter.data.half()
        torch.jit.save(traced, path)
    return path


def sharded(twin, directory):
    """A CLIPModel directory whose weights lie in two files."""
    twin.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    weights = {name: tensor.contiguous() for name, tensor in twin.state_dict().items() if "position_ids" not in name}
    halves = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(halves.values()):
        save_file({name: weights[name] for name, where in halves.items() if where == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": halves}))
    return directory


# --- OpenAI


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("half", [False, True])
def test_an_archive_of_openai(place, half, quiet):
    twin = openai_twin()
    path = archive(twin, place / "tiny.pt", half=half)
    model = load(path)
    assert not model.training and model.config["quick_gelu"] and model.logit_scale.dtype == torch.float32
    if half:
        for parameter in twin.parameters():
            parameter.data = parameter.data.half().float()
        for name, tensor in torch.jit.load(path).state_dict().items():
            twin.get_parameter(name).data = tensor.float()
    check_against_twin(model, twin)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_keeps_its_dtypes_as_a_format(place):
    stored = read(archive(openai_twin(), place / "tiny.pt", half=True))
    (known,) = [known for known in FORMATS if known.matches(stored)]
    model = known.load(stored, Companions())
    assert known.name.startswith("OpenAI CLIP (TorchScript") and not model.training
    kept = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kept["image_tower.blocks.0.to_qkv.weight"] == kept["text_tower.to_latent.weight"] == torch.float16
    assert kept["image_tower.norm_in.weight"] == kept["text_tower.token_emb.weight"] == torch.float32
    architecture = known.describe(stored).architecture
    assert architecture["quick_gelu"] is True and architecture == {name: model.config[name] for name in architecture}
    with torch.no_grad():  # 16-bit weights compute in float32 here, and say so
        wide = load(stored.path)
        assert torch.equal(model.encode_image(pictures()), wide.encode_image(pictures()))
        assert torch.equal(model.encode_text(texts()), wide.encode_text(texts()))
        assert all(
            torch.equal(*pair) for pair in zip(model(pictures(), texts()), wide(pictures(), texts()), strict=True)
        )


def test_a_state_dict_of_openai_is_assumed_to_have_its_gelu(place):
    twin = openai_twin()
    torch.save(twin.state_dict(), place / "tiny.pt")
    with pytest.warns(UserWarning, match=ASSUMED.format("QuickGELU")):
        model = load(place / "tiny.pt")
    check_against_twin(model, twin)


def test_openai_s_own_buffers_say_that_it_is_openai_s(place, quiet):
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(60)}
    torch.save({**openai_twin().state_dict(), **sizes}, place / "tiny.pt")
    assert load(place / "tiny.pt").config["quick_gelu"]


def test_a_module_that_was_saved_whole_names_its_gelu(place, quiet):
    twin = openai_twin()
    torch.save(twin, place / "whole.pt")
    check_against_twin(load(place / "whole.pt"), twin)


# --- open_clip


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_checkpoint_of_open_clip(place, kind, quick_gelu, quiet):
    twin = open_clip_twin(kind, quick_gelu=quick_gelu, nonscalar_logit_scale=True)
    weights = {f"module.{name}": tensor for name, tensor in twin.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {"state": {}}}, place / "epoch_3.pt")
    check_against_twin(load(place / "epoch_3.pt", quick_gelu=quick_gelu), twin)


def test_a_checkpoint_of_open_clip_is_assumed_to_have_the_exact_gelu(place):
    twin = open_clip_twin()
    torch.save({"state_dict": {f"module.{n}": t for n, t in twin.state_dict().items()}}, place / "epoch_3.pt")
    with pytest.warns(UserWarning, match=ASSUMED.format("the exact GELU")):
        check_against_twin(load(place / "epoch_3.pt"), twin)


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("ViT-B-32-quickgelu-laion400m.safetensors", True),
        ("vit_b_32-openai.safetensors", True),
        ("vit_b_32-laion2b_e16.safetensors", False),
        ("open_clip_model.safetensors", False),
    ],
)
def test_the_name_of_a_file_may_say_which_gelu(place, name, quick, quiet):
    save_file(dict(open_clip_twin(quick_gelu=quick).state_dict()), place / name)
    check_against_twin(load(place / name), open_clip_twin(quick_gelu=quick))


def open_clip_config(**changes):
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 60, "width": 64, "heads": 1, "layers": 3}
    for key, value in changes.items():
        which, _, name = key.partition("__")
        {"vision": vision, "text": text}[which][name] = value
    model = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}}


@pytest.mark.parametrize("file", [None, "open_clip_model.safetensors"])
def test_a_directory_of_open_clip_says_everything(place, file, quiet):
    twin = open_clip_twin(quick_gelu=True, vision={"head_width": 32})
    save_file(dict(twin.state_dict()), place / "open_clip_model.safetensors")
    (place / "open_clip_config.json").write_text(json.dumps(open_clip_config()))
    model = load(place / file if file else place)
    assert model.config["vision_heads"] == 4 and model.image_mean == (0.5, 0.5, 0.5)
    check_against_twin(model, twin)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"vision__pool_type": "avg"}, "pool_type"),
        ({"vision__no_ln_pre": True}, "no_ln_pre"),
        ({"text__pool_type": "last"}, "pool_type last"),
        ({"text__no_causal_mask": True}, "no_causal_mask"),
    ],
)
def test_another_architecture_in_open_clip_s_config_is_refused(place, changes, got):
    save_file(dict(open_clip_twin().state_dict()), place / "open_clip_model.safetensors")
    (place / "open_clip_config.json").write_text(json.dumps(open_clip_config(**changes)))
    with pytest.raises(ValueError, match=f"must describe OpenAI's architecture, got one with {got}"):
        load(place)


# --- Hugging Face


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_directory_of_hugging_face(place, act, eps, quiet):
    twin = hugging_face_twin(act=act, eps=eps)
    twin.save_pretrained(place)
    for path in (place, place / "model.safetensors"):
        model = load(path)
        assert (model.config["quick_gelu"], model.config["end_token"]) == (act == "quick_gelu", None)
        check_against_twin(model, twin)


def test_an_end_token_that_is_not_the_largest_id(place, quiet):
    twin = hugging_face_twin(end=7)
    twin.save_pretrained(place)
    model = load(place)
    assert model.config["end_token"] == 7
    ids = texts()
    ids[ids == 7] = 8
    with pytest.raises(ValueError, match="every text must have its end token, 7, got none in row 0"):
        model.encode_text(ids)
    ids[:, 1] = 7
    with torch.no_grad():
        expected = twin(input_ids=ids, pixel_values=pictures()).text_embeds
        own = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
    ids[:, 2:] = END
    torch.testing.assert_close(own, expected)
    assert torch.equal(torch.nn.functional.normalize(model.encode_text(ids), dim=-1), own)


@pytest.mark.parametrize("how", ["pytorch_model.bin", "shards"])
def test_other_files_of_hugging_face(place, how, quiet):
    twin = hugging_face_twin()
    if how == "shards":
        sharded(twin, place)
    else:
        twin.save_pretrained(place)
        (place / "model.safetensors").unlink()
        old = {"text_model.embeddings.position_ids": torch.arange(16)[None]}  # as older releases stored it
        torch.save({**twin.state_dict(), **old}, place / how)
    check_against_twin(load(place), twin)


def test_old_configs_of_hugging_face_and_their_pixels(place):
    hugging_face_twin(act="gelu").save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    config["text_config_dict"], config["text_config"] = config["text_config"], {}
    config["text_config_dict"]["eos_token_id"] = 2
    (place / "config.json").write_text(json.dumps(config))
    pixels = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (place / "preprocessor_config.json").write_text(json.dumps(pixels))
    model = load(place)
    assert model.config["text_heads"] == 4 and model.config["end_token"] is None
    assert model.image_mean == (0.5, 0.25, 0.5) and model.image_std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("tower", "key", "value", "message"),
    [
        ("text_config", "hidden_act", "gelu", "hidden_act in .* the same for both towers, got gelu, quick_gelu"),
        ("vision_config", "hidden_act", "relu", "hidden_act in .* got quick_gelu, relu"),
        ("vision_config", "layer_norm_eps", 0.1, "layer_norm_eps in .* the same for both towers"),
        ("vision_config", "num_attention_heads", 5, "vision_heads must divide vision_width=96, got 5"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(place, tower, key, value, message):
    hugging_face_twin().save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    config[tower][key] = value
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(place)


# --- refusals


@pytest.mark.parametrize(("layers", "name"), [((3, 4, 6, 3), "RN50"), ((1, 1, 1, 1), "a ResNet")])
def test_a_resnet_is_refused_by_its_name(place, layers, name):
    twin = openai_module().CLIP(8, 32, layers, 64, None, 16, 60, 64, 1, 1)
    torch.save(twin.state_dict(), place / "resnet.pt")
    with pytest.raises(ValueError, match=rf"its image tower is a ResNet \({name}\)"):
        load(place / "resnet.pt")
    stored = read(place / "resnet.pt")
    (known,) = [known for known in FORMATS if known.matches(stored)]
    described = known.describe(stored)
    assert described.kind == "CLIP" and name in described.problem and described.problem.endswith(".")


def changed(**changes):
    """A state dict of OpenAI's, with some tensors another or, where None, gone."""
    weights = dict(openai_twin().state_dict())
    for name, tensor in changes.items():
        weights[name] = tensor
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda: changed(logit_bias=torch.zeros(1)), "it has a logit_bias: it is a SigLIP"),
        (lambda: changed(**{"text_decoder.ln.weight": torch.zeros(1)}), "it has a text_decoder: it is a CoCa"),
        (lambda: changed(**{"visual.trunk.stem.weight": torch.zeros(1)}), "its image tower is a model of timm"),
        (lambda: changed(**{"visual.ln_pre.weight": None}), r"missing: image_tower\.norm_in\.weight; unknown: none"),
        (lambda: changed(**{"visual.extra": torch.zeros(1)}), r"missing: none; unknown: visual\.extra"),
        (
            lambda: changed(**{"transformer.resblocks.1.ln_1.bias": None}),
            r"missing: text_tower\.blocks\.1\.attn_norm\.bias",
        ),
        (
            lambda: changed(**{"visual.positional_embedding": torch.zeros(19, 128)}),
            "into square patches, got patches .* and 19 positions",
        ),
        (lambda: changed(**{"ln_final.bias": torch.zeros(3)}), r"norm_out.bias: expected \[64\], found \[3\]"),
        (lambda: changed(**{"token_embedding.weight": torch.zeros(())}), r"with 2 dimensions, got torch.float32 \[\]"),
        (lambda: changed(positional_embedding=torch.zeros(16, 64).char()), "must be floating with 2 dim"),
        (
            lambda: changed(**{"ln_final.bias": torch.zeros(64).char()}),
            r"norm_out\.bias .* must be floating, got torch.int8",
        ),
        (lambda: {"one": torch.zeros(1)}, "must be a CLIP of OpenAI, open_clip or Hugging Face, got"),
    ],
)
def test_what_is_no_clip_of_openai_s_architecture_is_refused(place, weights, message):
    torch.save(weights(), place / "openai.pt")
    with pytest.raises(ValueError, match=message):
        load(place / "openai.pt")


def test_heads_that_nothing_tells_are_asked_for(place):
    twin = openai_twin(vision_width=96)
    torch.save(twin.state_dict(), place / "openai.pt")
    with pytest.raises(ValueError, match=r"whole heads of 64, got 96\. Pass vision_heads"):
        load(place / "openai.pt")
    check_against_twin(load(place / "openai.pt", vision_heads=1), twin)


def test_large_image_towers_of_open_clip_have_wider_heads(place):
    twin = open_clip_twin(vision={"width": 1280, "head_width": 80, "layers": 1, "mlp_ratio": 0.125})
    save_file(dict(twin.state_dict()), place / "laion.safetensors")
    model = load(place / "laion.safetensors")
    assert model.config["vision_heads"] == 16 and model.config["vision_hidden"] == 160
    check_against_twin(model, twin)


def test_missing_files_are_named(place):
    with pytest.raises(FileNotFoundError, match="no-such"):
        load(place / "no-such.pt")
    (place / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or pytorch_model\.bin, got neither"):
        load(place)


def test_a_saved_model_is_loaded_and_takes_no_options(place):
    sizes = {"vision_width": 64, "vision_layers": 1, "text_width": 64, "text_layers": 1, "vocab_size": 60}
    model = PretrainedCLIP(image_size=32, patch_size=16, **sizes).eval()
    model.save_pretrained(place)
    again = load(place)
    assert again.config == model.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="says itself how it was trained, got quick_gelu"):
        load(place, quick_gelu=False)


# --- formats


def test_formats_share_no_file_and_know_their_keys(place):
    twin = hugging_face_twin()
    twin.save_pretrained(place / "hf")
    torch.save(openai_twin().state_dict(), place / "openai.pt")
    torch.save({"state_dict": dict(openai_twin().state_dict())}, place / "open_clip.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, place / "other.pt")
    found = {
        path.name: [known.name for known in FORMATS if known.matches(read(path))] for path in sorted(place.iterdir())
    }
    assert found == {
        "hf": ["Hugging Face CLIPModel"], "open_clip.pt": ["open_clip"], "openai.pt": ["OpenAI CLIP state dict"],
        "other.pt": [],
    }  # fmt: skip
    assert {"visual.transformer.resblocks.N.attn.in_proj_weight", "logit_scale"} <= FORMATS[0].keys
    assert all(name in FORMATS[0].keys for name in map(numbers_gone, twin.state_dict()))
    assert open_clip_module() is not None


def numbers_gone(name):
    return ".".join("N" if part.isdigit() else part for part in names.without_wrappers(name).split("."))
