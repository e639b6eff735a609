"""`dalle-fast info`: what it says of every container, and the one sentence that ends it where it cannot say."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from crafted_files import Calling, saved, scripted, write
from golden_cases import FOLDER
from safetensors.torch import save_file

from dalle_fast.cli.__main__ import main
from dalle_fast.compat.formats import known_formats
from dalle_fast.models.dvae import DiscreteVAE

SIZES = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4}


def info(*arguments, code=0) -> str:
    done = CliRunner().invoke(main, ["info", *map(str, arguments)])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.output


def test_a_dalle_of_the_original():
    told = info(FOLDER / "checkpoint_dalle.pt")
    assert "layout     dalle_pytorch DALLE" in told and "runs       yes" in told and "model      DALLE" in told
    facts = json.loads(info(FOLDER / "checkpoint_dalle.pt", "--json"))
    theirs = torch.load(FOLDER / "checkpoint_dalle.pt", weights_only=True)
    assert facts["kind"] == "DALLE" and facts["runs"] is True and facts["problem"] == ""
    assert facts["container"] == "zip" and facts["bytes"] == (FOLDER / "checkpoint_dalle.pt").stat().st_size
    assert facts["architecture"]["dim"] == theirs["hparams"]["dim"]
    assert facts["values"] == sum(tensor.numel() for tensor in theirs["weights"].values())
    assert facts["dtypes"] == {"float32": facts["values"]}
    moments = theirs["opt_state"]["state"].values()
    assert facts["other_values"] == sum(v.numel() for state in moments for v in state.values() if torch.is_tensor(v))


def test_a_vae_of_the_original_and_a_directory_of_ours(tmp_path):
    facts = json.loads(info(FOLDER / "checkpoint_vae.pt", "--json"))
    assert facts["kind"] == "DiscreteVAE" and facts["runs"] is True
    model = DiscreteVAE(**SIZES)
    model.save_pretrained(tmp_path / "vae")
    facts = json.loads(info(tmp_path / "vae", "--json"))
    assert facts["kind"] == "DiscreteVAE" and facts["container"] == "directory" and facts["runs"] is True
    assert facts["values"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["architecture"]["num_tokens"] == 12


def test_unknown_layouts_name_their_first_keys_and_the_nearest_layout(tmp_path):
    save_file({"nobody.knows.weight": torch.ones(2), "this.bias": torch.ones(3)}, tmp_path / "x.safetensors")
    told = info(tmp_path / "x.safetensors", code=1)
    assert "5 in 2 tensors: 5 float32" in told
    assert "none of its 2 keys is of a layout that we know: nobody.knows.weight, this.bias" in told
    weights = torch.load(FOLDER / "checkpoint_dalle.pt", weights_only=True)["weights"]
    kept = {name: tensor for name, tensor in weights.items() if name.startswith("transformer.layers.layers.0.1.")}
    torch.save({**kept, "surprise.weight": torch.ones(1)}, tmp_path / "y.pt")
    told = info(tmp_path / "y.pt", code=1)
    assert "the nearest layout is dalle_pytorch DALLE (.pt), which has no surprise.weight" in told


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: saved({"a": Calling(os.system, "true")}), "asks for posix.system"),
        (lambda: saved({"a": torch.ones(9)})[:-40], "ends before the directory"),
        (lambda: saved([1, 2]), "must hold tensors by name, got list"),
        (scripted, "of a layout that we know"),
        (lambda: b"", "an empty one"),
        (lambda: b"<html>", "a web page"),
    ],
)
def test_bad_files_end_in_one_sentence(make, told, tmp_path):
    output = info(write(tmp_path / "x.pt", make()), code=1)
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and told in errors[0] and "Traceback" not in output


def test_the_page_has_a_row_for_every_layout_and_its_code_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "old-weights.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for known in known_formats():
        assert any(known.name in row for row in rows), known.name
    shutil.copy(FOLDER / "checkpoint_dalle.pt", tmp_path / "old.pt")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, {})
    assert (tmp_path / "model" / "config.json").is_file()


def test_names_do_not_steer_the_terminal(tmp_path):
    (tmp_path / "\x1b[2J.txt").write_text("x")
    assert "got one with ?[2J.txt" in info(tmp_path, code=1)


def test_a_missing_file_and_an_unknown_directory(tmp_path):
    assert "which is not there" in info(tmp_path / "x.pt", code=1)
    (tmp_path / "notes.txt").write_text("x")
    assert "must be a directory of weights that we know, got one with notes.txt" in info(tmp_path, code=1)
