"""`dalle-fast train-vae`, `train`, `train-clip`: from a folder of pictures to ranked pictures, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image, ImageDraw

from dalle_fast.cli.__main__ import main
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

COLOURS = ("red", "green", "blue", "yellow")
QUIET = ["--workers", "0", "--set", "loop.log_steps=2"]
VAE = ["image_size=16", "hidden_dim=6", "num_tokens=12", "codebook_dim=4", "num_resnet_blocks=1"]
DALLE_SIZES = ["dim=16", "depth=2", "heads=1", "dim_head=12", "text_seq_len=5"]
CLIP_SIZES = ["dim_text=16", "dim_image=16", "dim_latent=8", "text_enc_depth=1", "visual_enc_depth=1", "text_heads=1",
              "visual_heads=1", "text_seq_len=5", "visual_image_size=16"]  # fmt: skip


def model(sizes):
    return [argument for size in sizes for argument in ("--set", f"model.{size}")]


def call(*arguments, fails=None):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    if fails is None:
        assert result.exit_code == 0, (result.output, result.exception)
    else:
        assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), repr(result.exception)
        assert fails in " ".join(result.output.split()), result.output
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of pictures with captions and a tokenizer; trainings are written beside them."""
    folder = tmp_path_factory.mktemp("train")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(12):
        colour = COLOURS[i % 4]
        picture = Image.new("RGB", (20, 20), "white")
        ImageDraw.Draw(picture).rectangle((i // 4, 2, 12 + i // 4, 14), fill=colour)
        picture.save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a {colour} square\n{colour} square\n")
    call("tokenizer", "train", pictures, "--vocab-size", 290, "--out", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def vae(place):
    """A trained VAE, and what the command said."""
    settings = ["--set", "plain_steps=2", "--set", "data.held_out=0.2", "--upstream-checkpoint", place / "vae.pt"]
    said = call(
        "train-vae", place / "pictures", place / "vae", "--steps", 5, "--batch", 4, *QUIET, *model(VAE), *settings
    )
    return place / "vae", said


def test_from_pictures_to_ranked_pictures(place, vae):
    out, said = vae
    assert "4 of 4" not in said and "12; 5 steps" not in said
    assert f"dalle-fast encode {place / 'pictures'} --vae {out} --out CODES" in said
    trained = DiscreteVAE.from_pretrained(out / "model")
    assert trained.quantizer == "gumbel" and trained.num_tokens == 12, "preset small folds"
    for name in ("config.yaml", "log.csv", "checkpoints", "pictures", "data.txt"):
        assert (out / name).exists(), name

    call("encode", place / "pictures", "--vae", out, "--out", place / "codes", "--workers", 0)
    words = ["--tokenizer", place / "tokenizer.json"]
    noise = ["--set", "code_noise={share: 0.5, rate: 0.5}", "--upstream-checkpoint", place / "dalle.pt"]
    said = call("train", place / "codes", place / "dalle", "--vae", out, *words, "--steps", 3, "--batch", 4,
                "--micro-batch", 2, *QUIET, *model(DALLE_SIZES), *noise)  # fmt: skip
    assert "train: done. The model is in" in said
    call(
        "train-clip",
        place / "pictures",
        place / "clip",
        *words,
        "--epochs",
        1,
        "--batch",
        4,
        *QUIET,
        *model(CLIP_SIZES),
    )
    assert yaml.safe_load((place / "clip" / "config.yaml").read_text())["loop"]["steps"] == 3
    said = call("sample", "a red square", "--model", place / "dalle" / "model", "--rank", place / "clip" / "model",
                "--images-per-prompt", 2, "--keep", 1, "--out", place / "drawn")  # fmt: skip
    assert "the best 1 of each kept" in said

    stored = torch.load(place / "dalle.pt", weights_only=True)
    again = DALLE(vae=DiscreteVAE(**stored["vae_params"]), **stored["hparams"])
    again.load_state_dict(stored["weights"])
    saved = DALLE.from_pretrained(place / "dalle" / "model")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert torch.load(place / "vae.pt", weights_only=True)["hparams"]["num_tokens"] == 12


def test_end_to_end_reads_pictures_and_trains_the_vae(place, vae):
    command = ("train", place / "pictures", place / "both", "--vae", vae[0], "--tokenizer", place / "tokenizer.json",
               "--steps", 2, "--batch", 4, *QUIET, *model(DALLE_SIZES))  # fmt: skip
    call(*command, "--set", "end_to_end=true")
    before, after = DiscreteVAE.from_pretrained(vae[0] / "model"), DALLE.from_pretrained(place / "both" / "model").vae
    assert not torch.equal(before.codebook.weight, after.codebook.weight)
    header = (place / "both" / "log.csv").read_text().splitlines()[0]
    assert "error_soft" in header and "error_hard" in header and "text_loss" in header
    call("encode", place / "pictures", "--vae", vae[0], "--out", place / "cache", "--workers", 0)
    call("train", place / "cache", place / "no", *command[3:], "--set", "end_to_end=true",
         fails="the data must be pictures, got the codes")  # fmt: skip


def test_the_same_command_goes_on_and_a_bare_one_does(place, vae):
    out = place / "twice"
    command = ["train-vae", place / "pictures", out, "--batch", 4, *QUIET, *model(VAE)]
    call(*command, "--steps", 2)
    call(*command, "--steps", 4)
    said = call("train-vae", place / "pictures", out)
    assert "4 steps of 4" in said, "the configuration of the folder"
    rows = (out / "log.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == [2, 4]
    call(*command, "--steps", 6, "--learning-rate", 0.5, fails="optimiser.learning_rate")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "loop.stesp=3"], "Did you mean loop.steps?"),
        (["--set", "loop.steps"], "a setting must be KEY=VALUE"),
        (["--set", "model.widht=3"], "model must hold arguments of DiscreteVAE"),
        (["--preset", "huge"], "preset must be one of emoji, openai, paper, small, upstream, got 'huge'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--steps", "0"], "--steps"),
        (["--steps", "4", "--epochs", "2"], "--epochs and --steps must not both be given"),
        (["--batch", "6", "--micro-batch", "4"], "batch must be a multiple of micro_batch"),
    ],
)
def test_wrong_options_are_a_sentence(place, arguments, sentence):
    call("train-vae", place / "pictures", place / "wrong", *arguments, *model(VAE), fails=sentence)


def test_wrong_data_and_models_are_a_sentence(place, vae, tmp_path):
    call("train-vae", place / "nothing", tmp_path / "a", fails="nothing")
    (tmp_path / "empty").mkdir()
    call("train-vae", tmp_path / "empty", tmp_path / "a", fails="empty")
    words = ["--tokenizer", place / "tokenizer.json"]
    call(
        "train",
        place / "pictures",
        tmp_path / "a",
        *words,
        fails="vae must be the directory of a trained VAE, got none",
    )
    call("train", place / "pictures", tmp_path / "a", *words, "--vae", tmp_path, fails="directory of weights that we")
    call("train", place / "pictures", tmp_path / "a", *words, "--vae", vae[0], "--set", "model.text_seq_len=x",
         fails="text_seq_len must be a whole number of at least 1, got 'x'")  # fmt: skip
    call("train", place / "pictures", tmp_path / "a", "--vae", vae[0], "--tokenizer", "no.json", fails="no.json")
    call("train", place / "pictures", tmp_path / "a", *words, "--vae", place / "tokenizer.json",
         fails="must be a file of weights, got something else")  # fmt: skip
    call("train-clip", place / "pictures", tmp_path / "a", *words, "--batch", 4, "--micro-batch", 2, *model(CLIP_SIZES),
         fails="Accumulation cannot enlarge a contrastive batch")  # fmt: skip


def test_what_the_original_cannot_read_is_refused_before_training(place, vae, tmp_path):
    command = ["train-vae", place / "pictures", tmp_path / "out", *model(VAE), "--upstream-checkpoint"]
    call(*command, tmp_path / "no" / "vae.pt", fails="must be a folder to write vae.pt to, found none")
    call(*command, tmp_path / "vae.pt", "--set", "fold=false", fails="must have quantizer='gumbel', got 'vq'")
    words = ["--vae", vae[0], "--tokenizer", place / "tokenizer.json", *model(DALLE_SIZES)]
    call("train", place / "pictures", tmp_path / "out", *words, "--upstream-checkpoint", tmp_path / "dalle.pt", "--set",
         "model.attn_types=[paper_row]", fails="attn_types must be of the original's")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_codes_of_another_vae_are_refused(place, vae, tmp_path):
    torch.manual_seed(1)
    DiscreteVAE(**DiscreteVAE.from_pretrained(vae[0] / "model").config).save_pretrained(tmp_path / "other")
    call("encode", place / "pictures", "--vae", tmp_path / "other", "--out", tmp_path / "codes", "--workers", 0)
    call("train", tmp_path / "codes", tmp_path / "a", "--vae", vae[0], "--tokenizer", place / "tokenizer.json",
         *model(DALLE_SIZES), fails="must be of the model's VAE, got those of")  # fmt: skip


def test_a_vae_of_the_original_is_read(place, vae, tmp_path):
    call("train", place / "pictures", tmp_path / "out", "--vae", place / "vae.pt", "--tokenizer",
         place / "tokenizer.json", "--steps", 1, "--batch", 2, *QUIET, *model(DALLE_SIZES))  # fmt: skip
    assert DALLE.from_pretrained(tmp_path / "out" / "model").vae.num_tokens == 12


def test_help_needs_nothing_that_training_needs():
    heavy = ["torch", "accelerate", "webdataset", "tensorboard", "pydantic", "torch._dynamo"]
    code = f"""if True:
        import sys
        from click.testing import CliRunner
        from dalle_fast.cli.__main__ import main
        for command in ("train-vae", "train", "train-clip"):
            result = CliRunner().invoke(main, [command, "--help"])
            assert result.exit_code == 0 and "--preset" in result.output, result.output
        print([name for name in {heavy} if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    call("train-vae", tmp_path, tmp_path / "out", fails="package accelerate must be installed, found none. pip install")
