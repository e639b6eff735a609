"""The loop in one process: what it learns, writes, refuses, and how it ends."""

import csv
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from safetensors.torch import load_file
from toy_training import ToySource, ToyTask, config_of

from dalle_fast.training.config import resolve
from dalle_fast.training.trackers import Console
from dalle_fast.training.trainer import run


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(task) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.module.state_dict().items()}


def test_a_run_learns_and_writes_what_it_says(tmp_path, capsys):
    out, seen = tmp_path / "out", []
    settings = ["loop.steps=40", "loop.picture_steps=20", "loop.evaluate_steps=15", "loop.log_steps=10"]
    config = config_of(*settings, "optimiser.learning_rate=0.03", "optimiser.clip_norm=1.0", "loop.save_steps=40")
    result = run(ToyTask(), ToySource(), config, out, on_log=seen.append)
    assert (result.step, result.stopped) == (40, "finished")
    rows = rows_of(out)
    assert [int(row["step"]) for row in rows] == [10, 15, 20, 30, 40]
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    assert seen[-1] == result.figures and seen[-1]["toys"] == 2.0 and seen[-1]["unreadable"] == 1
    assert [bool(row["held_out_loss"]) for row in rows] == [False, True, False, True, True]
    assert 0 <= seen[-1]["data_share"] <= 1 and seen[-1]["epoch"] == 16.0 and seen[-1]["learning_rate"] == 0.03
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "step-00000020-toy.png", "step-00000040-toy.png",
    ]  # fmt: skip
    assert any(path.name.startswith("events.") for path in (out / "tensorboard").iterdir())
    assert (out / "data.txt").read_text() == "ten toys\n"
    assert torch.load(out / "model" / "toy.pt").keys() == weights(ToyTask()).keys()
    shown = capsys.readouterr().err
    assert "ten toys" in shown and "step 40 of 40, loss " in shown and "images/s" in shown


def test_accumulation_is_one_big_batch(tmp_path):
    whole, split = ToyTask(), ToyTask()
    settings = ["loop.batch=8", "optimiser.name=adam", "optimiser.clip_norm=0.5"]
    first = run(whole, ToySource(), config_of(*settings), tmp_path / "whole")
    second = run(split, ToySource(), config_of(*settings, "loop.micro_batch=2"), tmp_path / "split")
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], tensor, rtol=1e-5, atol=1e-6)
    assert first.figures["loss"] == pytest.approx(second.figures["loss"], rel=1e-5)
    assert first.figures["grad_norm"] == pytest.approx(second.figures["grad_norm"], rel=1e-5)


def test_the_moving_average_is_what_is_evaluated_and_saved(tmp_path):
    settings = ["loop.ema_decay=0.5", "loop.save_steps=1", "loop.keep=9", "loop.steps=3"]
    task = ToyTask()
    run(task, ToySource(), config_of(*settings, "optimiser.learning_rate=0.1"), tmp_path)
    average = {name: tensor.detach() for name, tensor in ToyTask().parameters_for()}
    for step in (1, 2, 3):
        state = load_file(tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        average = {name: (tensor + state[name]) / 2 for name, tensor in average.items()}
    saved = torch.load(tmp_path / "model" / "toy.pt")
    for name, tensor in average.items():
        torch.testing.assert_close(saved[name], tensor)
        assert not torch.equal(saved[name], weights(task)[name])  # training goes on from the last weights
        assert torch.equal(weights(task)[name], state[name])


def test_ema_steps_leaves_steps_out(tmp_path):
    settings = ["loop.ema_decay=0.5", "loop.ema_steps=4", "loop.steps=3"]
    run(ToyTask(), ToySource(), config_of(*settings), tmp_path)
    saved = torch.load(tmp_path / "model" / "toy.pt")
    assert all(torch.equal(saved[name], parameter) for name, parameter in ToyTask().parameters_for())


def test_the_plateau_lowers_the_learning_rate(tmp_path):
    settings = ["schedule.learning_rate=plateau", "schedule.patience=0", "schedule.cooldown=0", "schedule.every=2"]
    config = config_of(*settings, "optimiser.learning_rate=1e-30", "loop.steps=12", "schedule.warmup_steps=2")
    seen = []
    run(ToyTask(), ToySource(2), config, tmp_path, on_log=seen.append)  # epochs of 2: every batch is as the others
    assert [row["learning_rate"] for row in seen[:6]] == [5e-31, 1e-30, 1e-30, 1e-30, 5e-31, 5e-31]
    assert seen[-1]["learning_rate"] == 1e-30 / 16


def test_bf16_is_autocast(tmp_path):
    task, seen = ToyTask(), []
    task.module.model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run(task, ToySource(), config_of("loop.precision=bf16", "loop.steps=1"), tmp_path)
    assert seen == [torch.bfloat16]
    assert task.module.model[0].weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_the_machine_is_refused(tmp_path):
    for settings, sentence in (
        (["loop.batch=6", "loop.micro_batch=4"], "loop.batch must be a multiple of .* got 6 for 4 x 1. Change one"),
        (["loop.precision=fp16"], 'loop.precision must be "bf16" or "no" on a CPU, got "fp16". Take bf16.'),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(ToyTask(), ToySource(), config_of(*settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sharding_without_accelerators_is_refused(tmp_path, monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator to shard over")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ValueError, match=r"FSDP must have accelerators to shard over, got CPUs alone\. Start with torch"
    ):
        run(ToyTask(), ToySource(), config_of(), tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    task = ToyTask()
    config = config_of("loop.micro_batch=2", "loop.save_steps=2")
    with pytest.raises(RuntimeError) as stopped:
        run(task, ToySource(nan_at=14), config, tmp_path)  # step 4, its second micro-batch
    sentence = str(stopped.value)
    assert sentence.startswith("train: loss must be finite, got nan at step 4 (files ")
    assert sentence.count(".png") == 2
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / 'step-00000002'}." in sentence
    reference = ToyTask()
    run(reference, ToySource(), config_of("loop.micro_batch=2", "loop.steps=3"), tmp_path / "three")
    for name, tensor in weights(reference).items():
        if name != "seen":
            assert torch.equal(weights(task)[name], tensor), name


def test_gradients_that_are_not_finite_stop_too(tmp_path):
    class Root(ToyTask):
        def __init__(self) -> None:
            super().__init__()
            forward = self.module.forward

            def with_root(batch, step, progress):
                loss, figures = forward(batch, step, progress)
                weight = self.module.model[0].weight
                return loss + (weight - weight).sum().sqrt() if step == 1 else loss, figures  # 0, of infinite slope

            self.module.forward = with_root

    with pytest.raises(RuntimeError, match=r"the gradients' norm must be finite, got nan at step 2 \(files .*none yet"):
        run(Root(), ToySource(), config_of(), tmp_path)


def test_a_worker_that_dies_is_a_sentence(tmp_path):
    config = config_of("data.workers=1", "loop.save_steps=1")
    with pytest.raises(RuntimeError) as stopped:
        run(ToyTask(), ToySource(die_at=20), config, tmp_path)
    sentence = str(stopped.value)
    assert sentence.startswith("train: the workers that read data must stay alive, got 'DataLoader worker"), sentence
    assert "Last good checkpoint: " in sentence and "step-0000000" in sentence


@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_worker_that_dies_while_it_hands_over_is_a_sentence(tmp_path, error):
    class Source(ToySource):
        def loader(self, **arguments):
            yield from list(super().loader(**arguments))[:2]
            raise error

    with pytest.raises(
        RuntimeError, match="the workers that read data must stay alive, got 'DataLoader worker is gone"
    ):
        run(ToyTask(), Source(), config_of("loop.save_steps=1"), tmp_path)


def test_another_training_or_folder_is_refused(tmp_path):
    run(ToyTask(), ToySource(), config_of(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"must hold this training, got one that differs in loop\.batch, loop\.seed\."):
        run(ToyTask(), ToySource(), config_of("loop.batch=2", "loop.seed=1"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"loop.steps must be at least the 6 that .* has made, got 2"):
        run(ToyTask(), ToySource(), config_of("loop.steps=2"), tmp_path / "out")
    dalle = resolve("dalle", overrides=["data.source=memory", "loop.steps=6", "loop.batch=4", "vae=x"])
    with pytest.raises(ValueError, match=r"out/config.yaml must have known keys, got 'arch'"):
        run(ToyTask(), ToySource(), dalle, tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(
        ValueError, match=r"must be new, empty or the folder of a training, got one that holds 'cat.png"
    ):
        run(ToyTask(), ToySource(), config_of(), tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    sentences = []

    def another(row) -> None:
        if row["step"] == 2:
            with pytest.raises(RuntimeError) as refusal:
                run(ToyTask(), ToySource(), config_of(), tmp_path)
            sentences.append(str(refusal.value))

    result = run(ToyTask(), ToySource(), config_of(), tmp_path, on_log=another)
    assert "must be written by one training at a time, got another one at work there" in sentences[0]
    assert result.step == 6


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_leaves(tmp_path, number):
    before = signal.getsignal(number)
    config = config_of("loop.steps=30")

    def on_log(row) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    result = run(ToyTask(), ToySource(), config, tmp_path, on_log=on_log)
    assert (result.step, result.stopped) == (4, number.name)
    assert (tmp_path / "checkpoints" / "step-00000004" / "done.json").is_file()
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(number) is before
    assert run(ToyTask(), ToySource(), config, tmp_path).stopped == "finished"
    assert [int(row["step"]) for row in rows_of(tmp_path)] == list(range(1, 31))


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    before, results = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: results.append(run(ToyTask(), ToySource(), config_of(), tmp_path)))
    thread.start()
    thread.join()
    assert results[0].stopped == "finished" and signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console = Console("train toy", 3, 10, shown=True)
    console.say("ten toys")
    console.stepped()
    console.log({"step": 4, "loss": 0.25, "learning_rate": 1e-3, "images_per_second": 12.0})
    console.close()
    shown = capsys.readouterr().err
    assert "ten toys\n" in shown and "train toy" in shown and "4/10" in shown
    assert "loss 0.25, lr 0.001, 12.0 images/s" in shown
    Console("train toy", 0, 10, shown=False).log({"step": 1, "loss": 0.25})
    assert capsys.readouterr().err == ""


def test_a_finished_run_only_writes_its_model(tmp_path):
    run(ToyTask(), ToySource(), config_of(), tmp_path)
    (tmp_path / "model" / "toy.pt").unlink()
    result = run(ToyTask(), ToySource(), config_of(), tmp_path)
    assert (result.step, result.stopped, result.figures) == (6, "finished", {})
    assert (tmp_path / "model" / "toy.pt").is_file()
    longer = run(ToyTask(), ToySource(), config_of("loop.steps=8"), tmp_path)
    assert longer.step == 8 and math.isfinite(longer.figures["loss"])


# ------------------------------------------------------------------------------------------------------- loss scaling


def test_skipped_steps_of_loss_scaling_are_counted(tmp_path, monkeypatch):
    """Accelerate scales losses only on accelerators; here it gets a scaler for the CPU, whose first scales overflow."""
    from dalle_fast.training import trainer

    make = trainer.make_accelerator

    def scaling(config):
        accelerator, micro_batch = make(config.model_copy(update={"loop": config_of("loop.batch=4").loop}))
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        return accelerator, micro_batch

    monkeypatch.setattr(trainer, "make_accelerator", scaling)
    settings = ["loop.precision=fp16", "loop.save_steps=2", "loop.steps=20", "loop.ema_decay=0.5"]
    seen, task = [], ToyTask()
    result = run(task, ToySource(), config_of(*settings), tmp_path / "whole", on_log=seen.append)
    skipped = result.figures["fp16_skipped"]
    assert 2 < skipped < 18
    assert "grad_norm" not in seen[0] and math.isfinite(result.figures["grad_norm"])
    average = torch.load(tmp_path / "whole" / "model" / "toy.pt")
    assert not torch.equal(average["model.0.weight"], ToyTask().module.model[0].weight)

    def stop(row) -> None:
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    run(ToyTask(), ToySource(), config_of(*settings), tmp_path / "parts", on_log=stop)
    other = ToyTask()
    assert run(other, ToySource(), config_of(*settings), tmp_path / "parts").figures["fp16_skipped"] == skipped
    assert all(torch.equal(weights(task)[name], tensor) for name, tensor in weights(other).items())


@pytest.mark.gpu
def test_fp16_on_a_gpu_learns_and_resumes(tmp_path):
    settings = ["loop.precision=fp16", "loop.steps=40", "optimiser.learning_rate=0.03", "loop.save_steps=10"]
    seen, task = [], ToyTask(dropout=0.3)
    run(task, ToySource(), config_of(*settings), tmp_path / "whole", on_log=seen.append)
    assert seen[-1]["loss"] < seen[0]["loss"] and seen[-1]["fp16_skipped"] < 40

    def stop(row) -> None:
        if row["step"] == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    run(ToyTask(dropout=0.3), ToySource(), config_of(*settings), tmp_path / "parts", on_log=stop)
    other = ToyTask(dropout=0.3)
    run(other, ToySource(), config_of(*settings), tmp_path / "parts")
    assert all(torch.equal(weights(task)[name], tensor) for name, tensor in weights(other).items())
