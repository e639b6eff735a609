"""A run that was stopped or killed goes on bit for bit: weights, buffers, optimiser, averages, schedules, data."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

import toy_training
from safetensors.torch import load_file
from toy_training import ToySource, ToyTask, config_of

from dalle_fast.training.trainer import run

SETTINGS = {
    "adamw": ["optimiser.weight_decay=0.1", "loop.ema_decay=0.9", "schedule.learning_rate=cosine"],
    "plateau": ["schedule.learning_rate=plateau", "schedule.patience=0", "schedule.every=2", "optimiser.name=adam"],
    "bf16": ["loop.precision=bf16", "loop.micro_batch=2", "optimiser.clip_norm=0.5", "data.workers=1"],
}
COMMON = ["loop.steps=7", "loop.save_steps=3", "optimiser.learning_rate=0.02", "loop.log_steps=2"]


class Killed(Exception):
    """What ends a run at once, as a kill does, but for the process."""


def state_of(out: Path, step: int):
    """Everything that a checkpoint holds, but for the clock."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    state = load_file(folder / "model.safetensors")
    if (folder / "ema.safetensors").is_file():
        state |= {f"ema {name}": tensor for name, tensor in load_file(folder / "ema.safetensors").items()}
    optimiser = torch.load(folder / "optimizer.bin", weights_only=True)
    for number, moments in optimiser["state"].items():
        state |= {f"optimiser {number} {name}": torch.as_tensor(value) for name, value in moments.items()}
    facts = json.loads((folder / "trainer.json").read_text())
    del facts["seconds"]
    return state, optimiser["param_groups"], facts


def assert_equal_states(one: Path, other: Path, step: int) -> None:
    (ours, our_groups, our_facts), (theirs, their_groups, their_facts) = (state_of(out, step) for out in (one, other))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert our_groups == their_groups
    assert our_facts == their_facts


def log_of(out: Path) -> list[list[str]]:
    lines = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    kept = [
        column for column, name in enumerate(lines[0]) if name not in ("seconds", "images_per_second", "data_share")
    ]
    return [[line[column] for column in kept] for line in lines]


@pytest.mark.parametrize(
    ("name", "end"), [("adamw", "signal"), ("adamw", "kill"), ("plateau", "signal"), ("bf16", "signal")]
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, name, end):
    config = config_of(*COMMON, *SETTINGS[name])
    run(ToyTask(dropout=0.3), ToySource(), config, tmp_path / "whole")

    def on_log(row) -> None:
        if row["step"] == 4:
            if end == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        stopped = run(ToyTask(dropout=0.3), ToySource(), config, tmp_path / "parts", on_log=on_log)
        assert (stopped.stopped, stopped.step) == ("SIGTERM", 5)
    except Killed:
        assert end == "kill"  # goes on after step 3; the log's row of step 4 is written again
    torch.rand(17)
    resumed = run(ToyTask(dropout=0.3), ToySource(), config, tmp_path / "parts")
    assert resumed.step == 7
    assert_equal_states(tmp_path / "whole", tmp_path / "parts", 7)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_weights_that_differ_would_be_seen(tmp_path):
    for number, seed in enumerate((0, 1)):
        run(ToyTask(dropout=0.3), ToySource(), config_of(*COMMON, f"loop.seed={seed}"), tmp_path / str(number))
    with pytest.raises(AssertionError):
        assert_equal_states(tmp_path / "0", tmp_path / "1", 7)


def launch(out: Path, *settings: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """A training of toy_training.py in processes of its own."""
    program = [toy_training.__file__, str(out), *settings]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *program]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.long
def test_killed_with_kill_9_and_resumed_is_never_stopped(tmp_path):
    settings = [*COMMON, *SETTINGS["adamw"], "toy.dropout=0.3", "data.workers=1"]
    whole = launch(tmp_path / "whole", *settings)
    assert "stopped: finished 7" in whole.stdout, whole.stderr
    killed = launch(tmp_path / "parts", *settings, "toy.kill_at=4")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step-00000003"]
    resumed = launch(tmp_path / "parts", *settings)
    assert "stopped: finished 7" in resumed.stdout, resumed.stderr
    assert_equal_states(tmp_path / "whole", tmp_path / "parts", 7)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_spares_the_workers(tmp_path, number):
    """Ctrl-C and job managers reach the processes that read, too: the step is still finished and saved."""
    command = [
        sys.executable,
        toy_training.__file__,
        str(tmp_path),
        "data.workers=2",
        "loop.steps=2000",
        "toy.slow=0.02",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        os.killpg(process.pid, number)
        said = process.stdout.read()
    assert lines[-1].startswith("3 ")
    assert process.returncode == 0
    step = int(said.splitlines()[-1].removeprefix(f"stopped: {number.name} "))
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "done.json").is_file()
