"""A saved model as drawing needs it: dtypes, devices, prompts as ids, settings, and what is said where one is wrong."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_models import saved_model, small_dalle, small_tokenizer

from dalle_fast.compat.checkpoints import write_upstream
from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs import drawing_model
from dalle_fast.jobs.drawing_model import DrawingModel, SamplingSettings
from dalle_fast.models.dvae import DiscreteVAE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_the_transformer_takes_the_dtype_and_the_vae_none(saved, dtype):
    model = DrawingModel.read(saved, dtype=dtype)
    expected = {"int8": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    of_vae = {name for name, _ in model.dalle.named_parameters() if name.startswith("vae.")}
    for name, parameter in model.dalle.named_parameters():
        assert parameter.dtype == (torch.float32 if name in of_vae else expected), name
    stored = load_file(saved / "vae" / "model.safetensors")
    assert stored and all(torch.equal(model.dalle.vae.state_dict()[name], value) for name, value in stored.items())
    assert model.weight_dtype == (torch.int8 if dtype == "int8" else None)
    assert model.dtype == dtype and model.device == torch.device("cpu")
    assert not any(module.training for module in model.dalle.modules())
    images = model.dalle.generate_images(
        model.token_ids(["red apple"], False), seed=0, weight_dtype=model.weight_dtype if dtype != "int8" else None
    )
    assert images.dtype == torch.float32


def test_what_lies_beside_the_weights_is_read_where_it_is(saved, tmp_path):
    model = DrawingModel.read(saved)
    assert model.examples == ["red apple", "a flag"] and len(model.captions) == 2
    assert model.settings == SamplingSettings()
    bare = saved_model(tmp_path / "bare")
    for name in ("captions.txt", "examples.txt"):
        (bare / name).unlink()
    (bare / "sampling.json").write_text('{"temperature": 2, "top_p": 0.5}')
    model = DrawingModel.read(bare)
    assert model.captions is None and model.examples == []
    assert model.settings == SamplingSettings(temperature=2.0, top_p=0.5)


def test_settings_that_are_given_replace_the_model_s():
    settings = SamplingSettings(temperature=0.6, top_k=64)
    assert settings.overridden() == settings
    assert settings.overridden(temperature=0, top_p=0.5, cond_scale=2) == SamplingSettings(0, 64, 0.5, 2)


@pytest.mark.parametrize("content", ['{"top_p": "1"}', '{"top_p": true}'])
def test_settings_of_another_type_are_refused_with_their_file(tmp_path, content):
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(TypeError, match=r"sampling.json: top_p must be a number, got"):
        SamplingSettings.read(tmp_path / "sampling.json")


def test_prompts_become_ids_of_lower_case_words(saved):
    model = DrawingModel.read(saved)
    ids = model.token_ids(["Red APPLE", "a flag"], False)
    assert ids.dtype == torch.int64 and ids.shape == (2, 5)
    assert torch.equal(ids, model.tokenizer.tokenize(["red apple", "a flag"], 5))
    assert model.token_ids([], False).shape == (0, 5)


def test_a_prompt_that_is_too_long_is_named_or_cut(saved):
    model = DrawingModel.read(saved)
    prompts = ["red apple", "red apple a flag green red"]
    with pytest.raises(
        ValueError, match=r"prompt 2 must have at most 5 tokens, got 6 in .red apple a flag green red.. .*--tr"
    ):
        model.token_ids(prompts, False)
    cut = model.token_ids(prompts, True)
    assert torch.equal(cut[1], torch.tensor(model.tokenizer.encode(prompts[1])[:5]))
    with pytest.raises(ValueError, match=r"got 1001 in .(red ){15}\.\.\."):
        model.token_ids(["red " * 1000], False)
    with pytest.raises(TypeError, match="a text must be a str, got int"):
        model.token_ids([3], False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "model: dtype must be one of float32, bfloat16, float16, int8, got 'float64'"),
        ({"device": "gpu"}, "model: device must be one that torch finds here, such as cpu or cuda, got 'gpu'"),
        ({"device": "cuda:99"}, "got 'cuda:99'"),
        ({"device": "meta"}, "got 'meta'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(saved, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        DrawingModel.read(saved, **options)
    assert "\n" not in str(caught.value)


def test_a_file_of_weights_takes_what_is_named(tmp_path):
    dalle = small_dalle(torch.float32)
    write_upstream(dalle, tmp_path / "old.pt")
    words = Companions(tokenizer=tmp_path / "words.json")
    small_tokenizer().save(str(words.tokenizer))
    model = DrawingModel.read(tmp_path / "old.pt", companions=words)
    assert model.token_ids(["green", "flag"], False)[:, 0].tolist() == [2, 5]
    assert torch.equal(model.dalle.vae.codebook.weight, dalle.vae.codebook.weight)
    vae = DiscreteVAE(image_size=16, num_tokens=30, codebook_dim=4, num_layers=1, hidden_dim=4)
    vae.save_pretrained(tmp_path / "vae")
    model = DrawingModel.read(tmp_path / "old.pt", companions=replace(words, vae=tmp_path / "vae"), dtype="bfloat16")
    assert torch.equal(model.dalle.vae.codebook.weight, vae.codebook.weight)


def test_a_saved_model_takes_the_tokenizer_that_it_lacks(saved, tmp_path):
    bare = saved_model(tmp_path / "bare")
    words = (bare / "tokenizer.json").rename(tmp_path / "words.json")
    model, whole = DrawingModel.read(bare, companions=Companions(tokenizer=words)), DrawingModel.read(saved)
    assert model.examples == whole.examples and model.tokenizer.encode("a flag") == whole.tokenizer.encode("a flag")
    for name, value in whole.dalle.state_dict().items():
        assert torch.equal(model.dalle.state_dict()[name], value), name
    for name in ("vae", "yaml"):
        with pytest.raises(ValueError, match=rf"--{name} must be left out, got .*bare is a saved model, which carries"):
            DrawingModel.read(bare, companions=Companions(**{name: words}))
    with pytest.raises(ValueError, match="--tokenizer must be left out"):
        DrawingModel.read(saved, companions=Companions(tokenizer=words))


def test_a_directory_that_lacks_something_is_refused_in_words(saved, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="from_pretrained: path must be a directory"):
        DrawingModel.read(tmp_path / "none")
    bare = saved_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"needs the tokenizer it was trained with.*--tokenizer"):
        DrawingModel.read(bare)
    monkeypatch.setattr(drawing_model, "SHIPPED_MODEL", tmp_path / "assets")
    with pytest.raises(FileNotFoundError, match=r"the shipped model is part of the repository.*--model"):
        DrawingModel.read(tmp_path / "assets")
