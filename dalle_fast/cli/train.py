"""`dalle-fast train-vae`, `train` and `train-clip`: from pictures to a model that draws, and one that ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from dalle_fast.cli.sentences import in_sentences
from dalle_fast.cli.train_options import TrainOptions, options

_NEEDED = ("accelerate", "pydantic", "tensorboard")


@click.command("train-vae")
@options("vae", arch=True, checkpoint="vae.pt")
def train_vae(**values: Any) -> None:
    """Train a discrete VAE on the pictures in DATA; OUT/model is the result.

    \b
    dalle-fast train-vae pictures/ vae/
    dalle-fast train-vae pictures/ vae/ --preset upstream --epochs 20
    dalle-fast train-vae pictures/ vae/ --arch openai --micro-batch 8

    DATA: a folder of pictures, or shards as "shards/{000..009}.tar". The same command again goes on where it stopped,
    killed or not. Several processes: accelerate launch -m dalle_fast.cli train-vae ...
    """
    _run(TrainOptions.of("vae", values))


@click.command()
@options("dalle", vae=True, tokenizer=True, checkpoint="dalle.pt")
def train(**values: Any) -> None:
    """Train a DALLE on the pictures and captions in DATA; OUT/model is the result.

    \b
    dalle-fast train codes/ dalle/ --vae vae/ --tokenizer tokenizer.json

    DATA: what `dalle-fast encode` wrote, which is fastest; or a folder of pictures and .txt files, or shards, which
    the VAE then encodes in every step. The same command again goes on where it stopped, killed or not. Several
    processes: accelerate launch -m dalle_fast.cli train ...
    """
    _run(TrainOptions.of("dalle", values))


@click.command("train-clip")
@options("clip", tokenizer=True)
def train_clip(**values: Any) -> None:
    """Train a CLIP on the pictures and captions in DATA; OUT/model ranks what a DALLE draws.

    \b
    dalle-fast train-clip pictures/ clip/ --tokenizer tokenizer.json
    dalle-fast sample "a red apple" --model dalle/model --rank clip/model --keep 4

    DATA: a folder of pictures and .txt files, or shards. The same command again goes on where it stopped, killed or
    not. Several processes: accelerate launch -m dalle_fast.cli train-clip ...
    """
    _run(TrainOptions.of("clip", values))


def _run(options: TrainOptions) -> None:
    for module in _NEEDED:
        if importlib.util.find_spec(module) is None:
            raise click.ClickException(
                f"train: the package {module} must be installed, found none. pip install dalle-fast[train]"
            )
    with in_sentences():
        from dalle_fast.cli.train_run import run_training  # at call time: --help needs none of it

        run_training(options)
