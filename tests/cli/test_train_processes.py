"""The training commands on two processes, started by torchrun: the log of one process, to six digits."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw

LAUNCH = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
SIZES = ["model.image_size=16", "model.hidden_dim=8", "model.num_tokens=16", "model.codebook_dim=8"]
SETTINGS = {
    "vq": ["--set", "plain_steps=2"],
    "gumbel": ["--preset", "upstream", "--set", "kl={start: 1.0, end: 1.0, steps: 1}"],
}
UNLIKE = {"seconds", "images_per_second", "data_share"}
# The hard error is measured on a few pictures of each process.
UNLIKE_BY_PROCESSES = {"error_hard"}


def rows_of(out, launch, arguments):
    command = [sys.executable, "-m", *launch, "dalle_fast.cli", "train-vae", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    with (out / "log.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in UNLIKE} for row in csv.DictReader(file)]


@pytest.mark.long
@pytest.mark.parametrize("kind", SETTINGS)
def test_two_processes_log_what_one_does(kind, tmp_path):
    for i in range(24):
        picture = Image.new("RGB", (20, 20), "white")
        ImageDraw.Draw(picture).ellipse((i % 5, i % 7, 12, 14), fill=("red", "green", "blue")[i % 3])
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{i}.png")
    settings = [part for size in (*SIZES, "loop.log_steps=1") for part in ("--set", size)]
    rows = []
    for name, launch in (("one", []), ("two", LAUNCH)):
        out = tmp_path / name
        arguments = [str(tmp_path / "pictures"), str(out), "--workers", "0", "--steps", "6", "--batch", "8"]
        rows.append(rows_of(out, launch, [*arguments, *settings, *SETTINGS[kind]]))
        n_states = len(list((out / "checkpoints").glob("step-00000006/random_states_*.pkl")))
        assert n_states == (1 if name == "one" else 2), "as many processes as were asked for"
    assert len(rows[0]) == 6
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys() and "codes_used" in one
        for key in one.keys() - UNLIKE_BY_PROCESSES:
            assert one[key] == two[key] or float(one[key]) == pytest.approx(float(two[key]), rel=1e-4), key
