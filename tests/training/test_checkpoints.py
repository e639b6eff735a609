"""Checkpoints are whole or not there; the last good one is always loadable."""

import json
import logging
import resource
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from toy_training import ToySource, ToyTask, config_of

from dalle_fast.training import checkpoints
from dalle_fast.training.trainer import run

SAVE_EACH = ["loop.save_steps=1", "loop.keep=3", "loop.ema_decay=0.9"]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture
def trained(tmp_path):
    """The folder of a training whose checkpoints 4, 5, 6 are there."""
    run(ToyTask(), ToySource(), config_of(*SAVE_EACH), tmp_path)
    return tmp_path


def test_keep_keeps_the_last_ones(trained):
    assert names(trained) == ["step-00000004", "step-00000005", "step-00000006"]
    done = json.loads((trained / "checkpoints" / "step-00000006" / "done.json").read_text())
    files = {p.name: p.stat().st_size for p in (trained / "checkpoints" / "step-00000006").iterdir()}
    del files["done.json"]
    assert done == {"step": 6, "files": files}
    run(ToyTask(), ToySource(), config_of(*SAVE_EACH, "loop.keep=1", "loop.steps=8"), trained)
    assert names(trained) == ["step-00000008"]


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _garble(folder: Path) -> None:
    path = folder / "optimizer.bin"
    path.write_bytes(b"\0" * path.stat().st_size)  # of the right size


def _lose_a_file(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()


def _lose_the_seal(folder: Path) -> None:
    (folder / "done.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _garble, _lose_a_file, _lose_the_seal])
def test_a_damaged_one_is_named_and_the_one_before_taken(trained, caplog, damage):
    before = torch.load(trained / "model" / "toy.pt")
    damage(trained / "checkpoints" / "step-00000006")
    steps = []
    with caplog.at_level(logging.WARNING, logger="dalle_fast"):
        run(ToyTask(), ToySource(), config_of(*SAVE_EACH), trained, on_log=lambda row: steps.append(row["step"]))
    assert steps == [6]
    assert f"checkpoint {trained / 'checkpoints' / 'step-00000006'} is damaged (" in caplog.text
    assert "It is step-00000006.broken now; an older one is taken." in caplog.text
    assert names(trained)[-2:] == ["step-00000006", "step-00000006.broken"]
    after = torch.load(trained / "model" / "toy.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("damage", [_truncate, _garble])
def test_when_none_is_readable_nothing_begins_anew(trained, damage):
    before = names(trained)
    for name in before:
        damage(trained / "checkpoints" / name)
    with pytest.raises(RuntimeError) as refusal:
        run(ToyTask(), ToySource(), config_of(*SAVE_EACH), trained)
    assert "must hold a checkpoint that can be read, got none: step-00000006 cannot (" in str(refusal.value)
    assert names(trained) == before


def test_what_a_killed_process_left_is_removed(trained):
    left = trained / "checkpoints" / ".tmp-step-00000007"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    run(ToyTask(), ToySource(), config_of(*SAVE_EACH, "loop.steps=7"), trained)
    assert names(trained) == ["step-00000005", "step-00000006", "step-00000007"]


def test_a_full_disk_is_a_sentence_and_the_one_before_stays(trained):
    """A limit on the size of files stands for the disk: writing fails in the same places."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def on_log(row) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))

    try:
        with pytest.raises(RuntimeError) as full:
            run(ToyTask(), ToySource(), config_of(*SAVE_EACH, "loop.steps=9"), trained, on_log=on_log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    sentence = str(full.value)
    assert sentence.startswith(f"train: the checkpoint of step 7 must be written to {trained}, got ")
    assert f"Last good checkpoint: {trained / 'checkpoints' / 'step-00000006'}. Make room, and run the same" in sentence
    assert names(trained) == ["step-00000004", "step-00000005", "step-00000006"]
    assert run(ToyTask(), ToySource(), config_of(*SAVE_EACH, "loop.steps=9"), trained).step == 9


def test_a_log_that_cannot_be_written_is_a_sentence(trained):
    (trained / "log.csv").unlink()
    (trained / "log.csv").mkdir()
    with pytest.raises(RuntimeError, match=r"train: the log must be written to .*, got 'Is a directory' \(\d+ MiB"):
        run(ToyTask(), ToySource(), config_of(*SAVE_EACH, "loop.steps=7"), trained)


def test_state_is_read_without_running_code(trained, monkeypatch):
    """Pickles of checkpoints are read with weights_only."""
    asked = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: asked.append(kwargs["weights_only"]) or load(*args, **kwargs)
    )
    run(ToyTask(), ToySource(), config_of(*SAVE_EACH, "loop.steps=7"), trained)
    assert asked and all(asked)


def test_a_claim_is_given_back(tmp_path):
    config = config_of()
    for _ in range(2):
        checkpoints.claim(tmp_path, config).close()
    held = checkpoints.claim(tmp_path, config)
    with pytest.raises(RuntimeError, match="by one training at a time"):
        checkpoints.claim(tmp_path, config)
    held.close()
