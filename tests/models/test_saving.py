"""Saved models: what is written, what comes back, what is said where that fails."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_cases import FOLDER
from safetensors.torch import load_file, save_file
from torch import nn

from dalle_fast import CLIP, DALLE, DiscreteVAE
from dalle_fast.models.saving import Pretrained
from dalle_fast.tokenizer import HugTokenizer

VAE = {"image_size": 16, "num_tokens": 20, "codebook_dim": 12, "num_layers": 2, "hidden_dim": 8}


def make_dalle(**changes: object) -> DALLE:
    arguments = {"dim": 24, "num_text_tokens": 30, "text_seq_len": 5, "depth": 4, "heads": 2, "dim_head": 12}
    return DALLE(vae=DiscreteVAE(**VAE), **{**arguments, **changes})


def make_clip() -> CLIP:
    return CLIP(
        dim_text=16,
        dim_image=16,
        dim_latent=8,
        num_text_tokens=30,
        text_enc_depth=1,
        text_seq_len=5,
        text_heads=1,
        visual_enc_depth=1,
        visual_heads=1,
        visual_image_size=16,
        visual_patch_size=8,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"attn_types": ("full", "axial_row", "axial_col", "conv_like")},
        {"rotary_emb": False, "shift_tokens": False, "reversible": True, "sandwich_norm": True},
        {"share_input_output_emb": True, "shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": ("a", "b", "a", "b")},
    ],
)
def test_dalle_comes_back(tmp_path: Path, options: dict) -> None:
    dalle = make_dalle(**options).eval()
    dalle.save_pretrained(tmp_path / "model")
    again = DALLE.from_pretrained(tmp_path / "model")
    assert again.config == dalle.config and again.vae.config == dalle.vae.config
    assert not again.training and not any(p.requires_grad for p in again.vae.parameters())
    for name, tensor in dalle.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    text, codes = torch.randint(1, 30, (2, 5)), torch.randint(0, 20, (2, 7))
    assert torch.equal(again(text, codes), dalle(text, codes))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_saved_as_what_they_were_copied_from(tmp_path: Path, copied: Callable[[DALLE], DALLE]) -> None:
    dalle = make_dalle()
    again = copied(dalle)
    again.save_pretrained(tmp_path / "copy")
    assert again.config == dalle.config
    assert torch.equal(DALLE.from_pretrained(tmp_path / "copy").vae.codebook.weight, dalle.vae.codebook.weight)


def test_a_fresh_process_finds_the_classes_itself(tmp_path: Path) -> None:
    make_dalle().save_pretrained(tmp_path / "model")
    code = "import sys; from dalle_fast import DALLE; print(type(DALLE.from_pretrained(sys.argv[1]).vae).__name__)"
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "DiscreteVAE", done.stderr


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    dalle = make_dalle(shared_attn_ids=(0, 1, 0, 1))
    dalle.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert "transformer.blocks.0.attn.fn.to_qkv.weight" in stored
    assert "transformer.blocks.2.attn.fn.to_qkv.weight" not in stored
    blocks = DALLE.from_pretrained(tmp_path / "model").transformer.blocks
    assert blocks[0].attn.fn is blocks[2].attn.fn and blocks[0].attn.fn is not blocks[1].attn.fn


def test_the_vae_lies_in_its_own_directory(tmp_path: Path) -> None:
    dalle = make_dalle()
    dalle.save_pretrained(tmp_path / "model")
    assert not any(name.startswith("vae.") for name in load_file(tmp_path / "model" / "model.safetensors"))
    vae = DiscreteVAE.from_pretrained(tmp_path / "model" / "vae")
    assert torch.equal(vae.codebook.weight, dalle.vae.codebook.weight)
    config = json.loads((tmp_path / "model" / "vae" / "config.json").read_text())
    assert config["format_version"] == 1 and config["class"] == "DiscreteVAE"
    assert config["preprocessing"] == {"image_size": 16, "channels": 3, "value_range": [0.0, 1.0]}


def test_half_precision_storage(tmp_path: Path) -> None:
    dalle = make_dalle()
    before = {name: tensor.clone() for name, tensor in dalle.state_dict().items()}
    dalle.save_pretrained(tmp_path / "model", dtype=torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dalle.state_dict().items())
    for file in ("model.safetensors", "vae/model.safetensors"):
        assert {t.dtype for t in load_file(tmp_path / "model" / file).values()} == {torch.float16}
    again = DALLE.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, before[name].half().float()), name
    half = DALLE.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for name, p in half.named_parameters() if not name.startswith("vae.")} == {torch.bfloat16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}


def test_clip_tokenizer_and_card_lie_beside(tmp_path: Path) -> None:
    tokenizer = tmp_path / "bpe.json"
    tokenizer.write_text("{}")
    clip = make_clip()
    make_dalle().save_pretrained(tmp_path / "model", clip=clip, tokenizer=tokenizer, card="# Mine\n")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "model" / "README.md").read_text() == "# Mine\n"
    again = CLIP.from_pretrained(tmp_path / "model" / "clip")
    assert torch.equal(again.temperature, clip.temperature)


class _Saves:
    def save(self, path: str) -> None:
        Path(path).write_text("saved")


def test_a_tokenizer_object_saves_itself(tmp_path: Path) -> None:
    make_clip().save_pretrained(tmp_path / "clip", tokenizer=_Saves())
    assert (tmp_path / "clip" / "tokenizer.json").read_text() == "saved"
    with pytest.raises(TypeError, match="tokenizer must be a path or have a save"):
        make_clip().save_pretrained(tmp_path / "other", tokenizer=3)
    with pytest.raises(FileNotFoundError, match="tokenizer must be an existing file"):
        make_clip().save_pretrained(tmp_path / "other", tokenizer=tmp_path / "none.json")


def test_a_hug_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = HugTokenizer(FOLDER / "tokenizer_hug.json")
    make_clip().save_pretrained(tmp_path / "clip", tokenizer=tokenizer)
    again = HugTokenizer(tmp_path / "clip" / "tokenizer.json")
    assert again.encode("a small red bird") == tokenizer.encode("a small red bird")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    first = make_clip()
    first.save_pretrained(tmp_path / "clip")
    with pytest.raises(TypeError):
        make_clip().save_pretrained(tmp_path / "clip", tokenizer=3)
    assert os.listdir(tmp_path) == ["clip"]
    assert torch.equal(CLIP.from_pretrained(tmp_path / "clip").text_emb.weight, first.text_emb.weight)


def test_saving_again_replaces_the_model_and_keeps_other_files(tmp_path: Path) -> None:
    make_clip().save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "notes.txt").write_text("mine")
    second = make_clip()
    second.save_pretrained(tmp_path / "clip")
    assert (tmp_path / "clip" / "notes.txt").read_text() == "mine"
    assert torch.equal(CLIP.from_pretrained(tmp_path / "clip").text_emb.weight, second.text_emb.weight)
    assert os.listdir(tmp_path) == ["clip"]


def test_a_directory_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match="holds something else"):
        make_clip().save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "important"


def test_no_network_and_no_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    make_dalle().save_pretrained(tmp_path / "model")
    state = torch.get_rng_state()
    DALLE.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        DALLE.from_pretrained("someone/some-model")


def test_config_holds_every_argument_as_json() -> None:
    dalle = make_dalle(attn_types=("full", "axial_row"))
    assert dalle.config["attn_types"] == ["full", "axial_row"]
    assert dalle.config["heads"] == 2 and dalle.config["stable"] is False and "vae" not in dalle.config
    assert json.loads(json.dumps(dalle.config)) == dalle.config


class Odd(Pretrained):
    def __init__(self, activation: object = None, **options: object) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class Inner(Odd):
    def __init__(self, width: int = 3) -> None:
        super().__init__(activation=None, slope=0.5)


def test_the_outermost_constructor_is_recorded() -> None:
    assert Odd(slope=0.5).config == {"activation": None, "slope": 0.5}
    assert Inner(4).config == {"width": 4}


def test_an_argument_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Odd: argument activation must be numbers, strings"):
        Odd(activation=torch.relu).save_pretrained(tmp_path / "odd")
    assert os.listdir(tmp_path) == []


def _damage(directory: Path, file: str, content: bytes | None) -> None:
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "error", "sentence"),
    [
        ("config.json", None, FileNotFoundError, "must hold config.json, got none"),
        ("config.json", b"{", ValueError, "must be JSON"),
        ("config.json", b"\xff\xfe", ValueError, "must be JSON"),
        ("config.json", b"[]", ValueError, "must name arguments, class, format_version"),
        (
            "config.json",
            b'{"format_version": 99, "class": "CLIP", "arguments": {}}',
            ValueError,
            "format_version 1, got 99",
        ),
        (
            "config.json",
            b'{"format_version": 1, "class": "Nothing", "arguments": {}}',
            ValueError,
            "one of .*CLIP.*'Nothing'",
        ),
        (
            "config.json",
            b'{"format_version": 1, "class": "CLIP", "arguments": {"new": 1}}',
            ValueError,
            "CLIP, got new",
        ),
        (
            "config.json",
            b'{"format_version": 1, "class": "DiscreteVAE", "arguments": {}}',
            ValueError,
            "must hold a CLIP",
        ),
        (
            "config.json",
            b'{"format_version": 1, "class": "CLIP", "arguments": {}, "models": ["../vae"]}',
            ValueError,
            "must be names of arguments, got .*vae",
        ),
        ("model.safetensors", None, FileNotFoundError, "must hold model.safetensors, got none"),
        ("model.safetensors", b"not safetensors at all", ValueError, "must be a safetensors file"),
    ],
)
def test_damaged_directories(tmp_path: Path, file: str, content: bytes | None, error: type, sentence: str) -> None:
    make_clip().save_pretrained(tmp_path / "clip")
    _damage(tmp_path / "clip", file, content)
    with pytest.raises(error, match=sentence):
        CLIP.from_pretrained(tmp_path / "clip")


def test_missing_unknown_and_misshapen_tensors(tmp_path: Path) -> None:
    make_clip().save_pretrained(tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "temperature"} | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="missing: temperature; unknown: extra"):
        CLIP.from_pretrained(tmp_path / "clip")
    save_file(tensors | {"text_emb.weight": torch.zeros(31, 16)}, path)
    with pytest.raises(ValueError, match=r"text_emb.weight: expected \[30, 16\], found \[31, 16\]"):
        CLIP.from_pretrained(tmp_path / "clip")
