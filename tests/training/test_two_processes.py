"""Processes on CPUs, as torchrun starts them, learn what one does, and go on bit for bit."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from test_resume import COMMON, assert_equal_states, launch, state_of
from toy_training import ToySource, ToyTask, config_of

from dalle_fast.training.trainer import run

SETTINGS = [*COMMON, "loop.batch=8", "optimiser.name=adam", "optimiser.clip_norm=0.5", "loop.ema_decay=0.9"]


def assert_same_learning(one, other) -> None:
    """All that was learnt, within what summation in another order changes in seven steps."""
    (ours, *_), (theirs, *_) = (state_of(out, 7) for out in (one, other))
    for name, tensor in ours.items():
        if "seen" not in name:  # counts what its own process saw
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} differs")
    rows = [
        [float(line.split(",")[3]) for line in (out / "log.csv").read_text().splitlines()[1:]] for out in (one, other)
    ]
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)


def test_two_processes_learn_what_one_does_and_one_goes_on_from_them(tmp_path):
    killed = launch(tmp_path / "two", *SETTINGS, "loop.micro_batch=2", "toy.kill_at=4", processes=2)
    assert killed.returncode != 0
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints" / "step-00000003").iterdir())[-3:] == [
        "random_states_0.pkl", "random_states_1.pkl", "trainer.json",
    ]  # fmt: skip
    run(ToyTask(), ToySource(), config_of(*SETTINGS), tmp_path / "one")
    resumed = run(ToyTask(), ToySource(), config_of(*SETTINGS, "loop.micro_batch=2"), tmp_path / "two")
    assert resumed.step == 7
    assert_same_learning(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_killed_processes_go_on_bit_for_bit(tmp_path, processes):
    """Three: DistributedDataParallel must not add gradients in another order after a start."""
    settings = [*SETTINGS, f"loop.batch={processes * 4}", "loop.micro_batch=2", "toy.dropout=0.3"]
    whole = launch(tmp_path / "whole", *settings, processes=processes)
    assert "stopped: finished 7" in whole.stdout, whole.stderr
    assert launch(tmp_path / "parts", *settings, "toy.kill_at=4", processes=processes).returncode != 0
    resumed = launch(tmp_path / "parts", *settings, processes=processes)
    assert "stopped: finished 7" in resumed.stdout, resumed.stderr
    assert_equal_states(tmp_path / "whole", tmp_path / "parts", 7)


@pytest.mark.long
def test_what_one_process_meets_stops_both(tmp_path):
    """A NaN that only the second reads: both say where, and neither waits for the other."""
    settings = [*SETTINGS, "loop.micro_batch=4"]
    done = launch(tmp_path / "nan", *settings, "toy.nan_at=29", processes=2)
    assert done.returncode != 0
    assert "train: loss must be finite, got nan at step 4 (files " in done.stderr
    again = launch(tmp_path / "nan", *settings, "loop.seed=5", processes=2)
    assert "got one that differs in loop.seed" in again.stderr
    stopped = launch(tmp_path / "stopped", *settings, "toy.stop_at=2", processes=2)
    assert stopped.returncode == 0 and "stopped: SIGTERM 3" in stopped.stdout, stopped.stderr


@pytest.mark.long
def test_sharded_processes_learn_what_one_does_and_resume(tmp_path):
    """FSDP2: the whole weights meet in the main process where they are evaluated, pictured and saved."""
    settings = [*COMMON, "loop.batch=8", "loop.micro_batch=2", "optimiser.clip_norm=0.5", "loop.log_steps=1"]
    settings += ["loop.evaluate_steps=7", "loop.picture_steps=7"]
    run(ToyTask(), ToySource(), config_of(*settings), tmp_path / "one")
    whole = launch(tmp_path / "whole", *settings, "toy.sharded=true", processes=2)
    assert "stopped: finished 7" in whole.stdout, whole.stderr
    assert launch(tmp_path / "parts", *settings, "toy.sharded=true", "toy.kill_at=4", processes=2).returncode != 0
    resumed = launch(tmp_path / "parts", *settings, "toy.sharded=true", processes=2)
    assert "stopped: finished 7" in resumed.stdout, resumed.stderr
    one, two, parts = (torch.load(tmp_path / name / "model" / "toy.pt") for name in ("one", "whole", "parts"))
    for name, tensor in one.items():
        assert torch.equal(two[name], parts[name]), name
        if "seen" not in name:
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} differs")
    held_out = [(tmp_path / name / "log.csv").read_text().splitlines()[-1].split(",")[-1] for name in ("one", "whole")]
    assert float(held_out[1]) == pytest.approx(float(held_out[0]), rel=1e-4)
    refused = launch(tmp_path / "ema", *settings, "loop.ema_decay=0.9", "toy.sharded=true", processes=2)
    assert "loop.ema_decay must be null where parameters are sharded (FSDP), got 0.9: it needs whole" in refused.stderr
