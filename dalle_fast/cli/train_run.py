"""What the training commands do: resolve, build, say what will happen, train, say where everything is."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

import click

from dalle_fast.cli.train_options import ARCHITECTURES, DEFAULT_PRESET, TrainOptions
from dalle_fast.cli.trained import model_in
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.config import ClipConfig, DalleConfig, TrainConfig, VaeConfig, resolve
from dalle_fast.training.data import open_source
from dalle_fast.training.task import Source, Task

Config = VaeConfig | DalleConfig | ClipConfig
_COMMANDS = {"vae": "train-vae", "dalle": "train", "clip": "train-clip"}


def run_training(options: TrainOptions) -> None:
    """One command, from its options to the last line that it prints.

    Raises: ValueError, FileNotFoundError, RuntimeError, OSError: each a sentence.
    """
    from dalle_fast.training import trainer  # imports accelerate

    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file of every checkpoint
    config = resolved(options)
    task, source = built(config)
    _check_upstream(options, config, task)
    config = _with_epochs(config, options, source)
    _say(_beginning(config, task, source, options.out))
    result = trainer.run(task, source, config, options.out)
    if result.stopped != "finished":
        _say(
            f"{_COMMANDS[options.kind]}: {result.stopped} after step {result.step} of {config.loop.steps}; everything "
            f"is saved in {options.out}, and the same command goes on."
        )
        return
    if options.upstream_checkpoint is not None and _is_main():
        _write_upstream(options)
    _say(_ending(options, config))


def resolved(options: TrainOptions) -> Config:
    """The configuration: of a preset, a file and options; or of the run in OUT where neither is named.

    Raises: ValueError, OSError.
    """
    preset, file, begun = options.preset, options.config, options.out / "config.yaml"
    if preset is None and file is None:
        default = ARCHITECTURES[options.named.get("arch") or "discrete"] if options.kind == "vae" else DEFAULT_PRESET
        preset, file = (None, begun) if begun.is_file() else (default, None)
    overrides = options.overrides
    if options.epochs is not None:
        if options.named.get("steps") is not None:
            raise ValueError("train: --epochs and --steps must not both be given, got both. One follows of the other.")
        overrides.append("loop.steps=1")  # known when the data are
    return resolve(options.kind, preset=preset, file=file, overrides=overrides)  # type: ignore[arg-type]


def built(config: Config) -> tuple[Task, Source]:
    """What is trained and on what, weights drawn from the configuration's seed.

    Raises: ValueError, FileNotFoundError, TypeError.
    """
    import torch

    torch.manual_seed(config.loop.seed)
    if isinstance(config, VaeConfig):
        return _vae(config)
    return _dalle(config) if isinstance(config, DalleConfig) else _clip(config)


def _vae(config: VaeConfig) -> tuple[Task, Source]:
    from dalle_fast.training.tasks.vae import VaeTask

    task = VaeTask(config)
    vae = task.model
    source = open_source(
        config.data, image_size=vae.image_size, channels=vae.channels, tokenizer=None, text_seq_len=None,
        need={"pixels"},
    )  # fmt: skip
    return task, source


def _dalle(config: DalleConfig) -> tuple[Task, Source]:
    from dalle_fast.training.tasks.dalle import DalleTask, noise_pool
    from dalle_fast.training.tasks.text import load_tokenizer, mean_text_length

    tokenizer = load_tokenizer(config.tokenizer)
    vae = read_vae(config.vae)
    text_seq_len = config.model.get("text_seq_len", 256)
    if not isinstance(text_seq_len, int) or text_seq_len < 1:
        raise ValueError(f"train: model.text_seq_len must be a whole number of at least 1, got {text_seq_len!r}.")
    source = open_source(
        config.data, image_size=vae.image_size, channels=vae.channels, tokenizer=tokenizer, text_seq_len=text_seq_len,
        need={"text", "pixels" if config.end_to_end else "codes"}, vae=model_in(str(config.vae)),
        num_tokens=vae.num_tokens, image_seq_len=(vae.image_size // 2**vae.num_layers) ** 2,
    )  # fmt: skip
    pool = noise_pool(source, vae, config)
    return DalleTask(config, vae, tokenizer, pool, mean_text_length(source)), source


def _clip(config: ClipConfig) -> tuple[Task, Source]:
    from dalle_fast.training.tasks.clip import ClipTask

    task = ClipTask(config)
    clip = task.model
    source = open_source(
        config.data, image_size=clip.visual_image_size, channels=clip.channels, tokenizer=task.tokenizer,
        text_seq_len=clip.text_seq_len, need={"text", "pixels"},
    )  # fmt: skip
    return task, source


def read_vae(where: str | None) -> Any:
    """A trained VAE: a saved model's directory, OUT of `train-vae`, or weights of another package, in float32.

    Raises: ValueError, FileNotFoundError, TypeError (the model there is no VAE).
    """
    if where is None:
        raise ValueError("train: vae must be the directory of a trained VAE, got none. Give --vae, after `train-vae`.")
    path = model_in(where)
    from dalle_fast.compat.loading import load_vae  # at call time: the commands' other options do not need it

    return load_vae(path, op="train")


def _with_epochs(config: Config, options: TrainOptions, source: Source) -> Config:
    """With the steps that --epochs means."""
    if options.epochs is None:
        return config
    steps = max(1, round(options.epochs * source.n / config.loop.batch))
    return config.model_copy(update={"loop": config.loop.model_copy(update={"steps": steps})})


def _check_upstream(options: TrainOptions, config: Config, task: Task) -> None:
    """Refuses, before anything is trained, what the original could not read or what could not be written.

    Raises: ValueError, FileNotFoundError.
    """
    from dalle_fast.compat.checkpoints import upstream_checkpoint
    from dalle_fast.training.tasks.fold import folded

    path, model = options.upstream_checkpoint, cast(Any, task.module).model
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"train: {path.parent} must be a folder to write {path.name} to, found none. Make it.")
    upstream_checkpoint(folded(model) if isinstance(config, VaeConfig) and config.fold else model)


def _write_upstream(options: TrainOptions) -> None:
    from dalle_fast.compat.checkpoints import write_upstream

    assert options.upstream_checkpoint is not None
    cls: Any = DiscreteVAE if options.kind == "vae" else DALLE
    write_upstream(cls.from_pretrained(options.out / "model"), options.upstream_checkpoint)


# ------------------------------------------------------------------------------------------------------ what is said


def _beginning(config: TrainConfig, task: Task, source: Source, out: Path) -> str:
    loop, model = config.loop, config.model
    trained = sum(parameter.numel() for _, parameter in task.parameters_for())
    sizes = ", ".join(f"{key} {value}" for key, value in model.items() if isinstance(value, int | float | str))
    precision = "float32" if loop.precision == "no" else loop.precision
    return (
        f"{_COMMANDS[task.name]}: {trained:,} parameters ({sizes})\n"
        f"{source.n:,} samples in {config.data.source}; {loop.steps:,} steps of {loop.batch}, "
        f"{loop.steps * loop.batch / source.n:.3g} epochs; {config.optimiser.name}, {precision}\n"
        f"everything goes to {out}: config.yaml, log.csv, tensorboard/, pictures/, checkpoints/, at the end model/"
    )


def _ending(options: TrainOptions, config: Config) -> str:
    """Where the result is and the command that may follow."""
    out, data = options.out, options.data
    lines = [f"{_COMMANDS[options.kind]}: done. The model is in {out / 'model'}, the log in {out / 'log.csv'}."]
    if options.upstream_checkpoint is not None:
        lines.append(f"As the original writes it: {options.upstream_checkpoint}")
    if isinstance(config, VaeConfig):
        lines += [
            f"Next: dalle-fast encode {data} --vae {out} --out CODES",
            f"      dalle-fast train CODES OUT --vae {out} --tokenizer FILE",
        ]
    elif isinstance(config, DalleConfig):
        lines.append(f'Next: dalle-fast draw "a prompt" --model {out / "model"}')
    else:
        lines.append(f'Next: dalle-fast sample "a prompt" --model DALLE --rank {out / "model"} --keep 4')
    return "\n".join(lines)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_main():
        click.echo(text)
