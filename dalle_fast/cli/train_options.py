"""The options of `dalle-fast train-vae`, `train` and `train-clip`. Imports neither torch nor what training needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

PRESETS = Path(__file__).resolve().parents[1] / "training" / "presets"
# Option -> the key of the configuration that it sets; everything else is set with --set KEY=VALUE.
KEYS = {
    "arch": "arch",
    "steps": "loop.steps",
    "batch": "loop.batch",
    "micro_batch": "loop.micro_batch",
    "learning_rate": "optimiser.learning_rate",
    "precision": "loop.precision",
    "seed": "loop.seed",
    "workers": "data.workers",
    "keep": "loop.keep",
    "tokenizer": "tokenizer",
    "vae": "vae",
}
DEFAULT_PRESET = "small"
ARCHITECTURES = {"discrete": DEFAULT_PRESET, "openai": "openai"}  # of train-vae -> the preset where none is named


@dataclass(frozen=True)
class TrainOptions:
    """What a command was given; None: not given.

    kind: "vae", "dalle" or "clip".   settings: of --set, as KEY=VALUE.   named: options of KEYS.
    """

    kind: str
    data: str
    out: Path
    preset: str | None
    config: Path | None
    settings: tuple[str, ...]
    epochs: float | None
    upstream_checkpoint: Path | None
    named: dict[str, Any]

    @classmethod
    def of(cls, kind: str, values: dict[str, Any]) -> TrainOptions:
        """From the values of click's parameters."""
        named = {name: values.pop(name) for name in KEYS if name in values}
        return cls(kind=kind, named=named, upstream_checkpoint=values.pop("upstream_checkpoint", None), **values)

    @property
    def overrides(self) -> list[str]:
        """KEY=VALUE of the data, of --set and of the named options, which win in this order."""
        named = [f"{KEYS[name]}={_yaml(value)}" for name, value in self.named.items() if value is not None]
        return [f"data.source={_yaml(self.data)}", *self.settings, *named]


def _yaml(value: object) -> str:
    """A value as YAML reads it back: texts in quotes, where ' doubles."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def presets(kind: str) -> list[str]:
    """Names of the presets there are."""
    return sorted(path.stem.removeprefix(f"{kind}-") for path in PRESETS.glob(f"{kind}-*.yaml"))


def options(
    kind: str, *, tokenizer: bool = False, vae: bool = False, arch: bool = False, checkpoint: str | None = None
) -> Callable[..., Any]:
    """A decorator with the arguments and options of a training command.

    Args: tokenizer, vae, arch: whether it has that option.   checkpoint: the file that --upstream-checkpoint writes,
        in words.
    """
    count, number = click.IntRange(1), click.FloatRange(min=0, min_open=True)
    found = ", ".join(presets(kind))
    parameters = [
        click.argument("data"),
        click.argument("out", type=click.Path(file_okay=False, path_type=Path)),
        click.option("--preset", metavar="NAME", help=f"{found}; default {DEFAULT_PRESET}, or as OUT was begun."),
        click.option("--config", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                     help="YAML over the preset, such as the config.yaml of a run."),
        click.option("--set", "settings", metavar="KEY=VALUE", multiple=True,
                     help="One setting over both, as model.dim=512; repeatable."),
        click.option("--steps", type=count, metavar="N", help="Optimiser steps in all."),
        click.option("--epochs", type=number, metavar="X", help="The same, in rounds over the data."),
        click.option("--batch", type=count, metavar="N", help="Samples of a step, of all processes together."),
    ]  # fmt: skip
    parameters += [
        click.option("--micro-batch", type=count, metavar="N", help="Samples of a process and forward pass."),
        click.option("--learning-rate", type=number, metavar="X"),
        click.option("--precision", type=click.Choice(["no", "bf16", "fp16"])),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="N"),
        click.option("--workers", type=click.IntRange(0), metavar="N", help="Processes that read the data."),
        click.option("--keep", type=count, metavar="N", help="Checkpoints that stay."),
    ]
    if arch:
        parameters.append(
            click.option("--arch", type=click.Choice(list(ARCHITECTURES)),
                         help="discrete: DiscreteVAE; openai: the paper's VAE and loss (default preset: openai).")
        )  # fmt: skip
    if vae:
        parameters.append(
            click.option("--vae", metavar="DIR|FILE", help="A saved VAE, OUT of train-vae, or old weights.")
        )
    if tokenizer:
        parameters.append(
            click.option("--tokenizer", metavar="FILE", help="tokenizer.json, clip (default) or chinese.")
        )
    if checkpoint is not None:
        parameters.append(
            click.option("--upstream-checkpoint", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
                         help=f"Also write the result as the original's {checkpoint}.")
        )  # fmt: skip

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for parameter in reversed(parameters):
            function = parameter(function)
        return function

    return decorate
