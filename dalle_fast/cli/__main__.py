"""`dalle-fast`: one group of commands, each in its own module and imported only when it is used."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import click

# Command -> (module, its click command, one line of help); reading --help imports none of them.
COMMANDS = {
    "draw": ("dalle_fast.cli.draw", "draw", "Draw prompts with a saved model."),
    "sample": ("dalle_fast.cli.sample", "sample", "Draw many pictures, keep the best; goes on when killed."),
    "merge": ("dalle_fast.cli.merge", "merge", "Finish a job whose shards were drawn apart."),
    "data": ("dalle_fast.cli.data", "data", "Make data sets: image-text folders."),
    "tokenizer": ("dalle_fast.cli.tokenizer", "tokenizer", "Make tokenizers out of captions."),
    "encode": ("dalle_fast.cli.encode", "encode", "Encode pictures with a trained VAE, once; goes on when killed."),
    "train-vae": ("dalle_fast.cli.train", "train_vae", "Train a discrete VAE on pictures; goes on when killed."),
    "train": ("dalle_fast.cli.train", "train", "Train a DALLE on pictures or codes with captions; the same."),
    "train-clip": ("dalle_fast.cli.train", "train_clip", "Train a CLIP, which ranks what is drawn; the same."),
    "info": ("dalle_fast.cli.info", "info", "Say what a file of weights is and whether we can run it."),
    "convert": ("dalle_fast.cli.convert", "convert", "Turn weights of other packages into a saved model."),
    "pack": ("dalle_fast.cli.evaluate", "pack", "Write the demo's trained model as it is shipped."),
    "evaluate": ("dalle_fast.cli.evaluate", "evaluate", "Print the demo's quality figures."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.filename is None:
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}. Name a path you can use.") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.group(cls=_LazyGroup)
def main() -> None:
    """DALL-E style models: data, training, drawing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


if __name__ == "__main__":
    main(prog_name="dalle-fast")
