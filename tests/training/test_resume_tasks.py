"""What is really trained goes on bit for bit, too: all that its steps change is in its checkpoints.

As a program, one training: python tests/training/test_resume_tasks.py KIND OUT KEY=VALUE ...
"""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from test_guard import DALLE, SHARED, VAE, draw_all, write_tokenizer
from test_resume import assert_equal_states

from dalle_fast.cli.train_run import built
from dalle_fast.training.config import resolve
from dalle_fast.training.encode import encode
from dalle_fast.training.trainer import run

SHORT = ["loop.steps=8", "loop.save_steps=3", "loop.log_steps=4", "loop.evaluate_steps=null", "loop.micro_batch=4"]
CLIP = ["model={dim_text: 16, dim_image: 16, dim_latent: 8, text_enc_depth: 1, text_heads: 2, text_seq_len: 3}"]
CLIP += ["model.visual_enc_depth=1", "model.visual_heads=2", "model.visual_image_size=16", "model.visual_patch_size=8"]
CLIP += ["loop.batch=8", "loop.steps=8", "loop.micro_batch=null", "data.resize=paper", "data.word_dropout=0.2"]
SETTINGS = {
    "vq": ["vae", *VAE, *SHORT, "plain_steps=2", "data.resize=upstream", "data.flip=true"],
    "gumbel": ["vae", *VAE, *SHORT, "model.quantizer=gumbel", "fold=false", "plain_steps=0", "entropy_weight=0.01"],
    "dalle": ["dalle", *DALLE, *SHORT, "code_noise={share: 0.5, rate: 0.5}", "null_cond_prob=0.3"],
    "end to end": ["dalle", *DALLE, *SHORT, "end_to_end=true", "optimiser.name=adamw", "loop.precision=bf16"],
    "clip": ["clip", *SHORT, *CLIP],
}
SETTINGS["gumbel"] = [s for s in SETTINGS["gumbel"] if "codebook_decay" not in s]
SETTINGS["gumbel"] += ["temperature={start: 1, end: 0.1, steps: 8}", "kl={start: 0, end: 1, steps: 4}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, a tokenizer, a trained VAE, its codes."""
    folder = tmp_path_factory.mktemp("made")
    draw_all(folder / "pictures")
    write_tokenizer(folder / "tokenizer.json")
    train("vae", folder / "vae", f"data.source={folder / 'pictures'}", *SHARED, *SETTINGS["vq"][1:], "loop.steps=4")
    encode(str(folder / "pictures"), folder / "vae" / "model", folder / "codes")
    return folder


def train(kind: str, out: Path, *settings: str, stop_at: int | None = None):
    def on_log(row) -> None:
        if row["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    config = resolve(kind, overrides=settings)
    task, source = built(config)
    return run(task, source, config, out, on_log=on_log)


def settings_of(name: str, made: Path) -> tuple[str, list[str]]:
    """Kind and settings of one of SETTINGS."""
    kind, *own = SETTINGS[name]
    settings = [f"data.source={made / ('codes' if name == 'dalle' else 'pictures')}", *SHARED, *own, "loop.log_steps=1"]
    if kind != "vae":
        settings.append(f"tokenizer={made / 'tokenizer.json'}")
    if kind == "dalle":
        settings.append(f"vae={made / 'vae' / 'model'}")
    return kind, settings


@pytest.mark.long
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_task_goes_on_bit_for_bit(name, made, tmp_path, restored_threads):
    torch.set_num_threads(1)
    kind, settings = settings_of(name, made)
    train(kind, tmp_path / "whole", *settings)
    assert train(kind, tmp_path / "parts", *settings, stop_at=4).step == 5
    torch.rand(3)
    assert train(kind, tmp_path / "parts", *settings).step == 8
    assert_equal_states(tmp_path / "whole", tmp_path / "parts", 8)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vq", "gumbel", "dalle", "end to end", "clip"])
def test_two_processes_learn_what_one_does(name, made, tmp_path, restored_threads):
    torch.set_num_threads(1)
    kind, settings = settings_of(name, made)
    settings.append("loop.precision=no")
    if name == "vq":
        settings.append("loop.micro_batch=null")  # the first codes are placed on what one pass of all processes holds
    train(kind, tmp_path / "one", *settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launcher, kind, str(tmp_path / "two"), *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = [list(csv.DictReader((tmp_path / out / "log.csv").open())) for out in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        # Of the hard error each process measures some of its own pictures.
        for figure in one.keys() - {"seconds", "images_per_second", "data_share", "error_hard"}:
            assert one[figure] == two[figure] or float(two[figure]) == pytest.approx(
                float(one[figure]), rel=1e-3, abs=1e-6
            ), (one["step"], figure)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
