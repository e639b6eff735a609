"""`dalle-fast encode`: pictures become codes once, so that training does not encode them in every step."""

from __future__ import annotations

from pathlib import Path

import click

from dalle_fast.cli.sentences import in_sentences
from dalle_fast.cli.trained import model_in


@click.command()
@click.argument("data")
@click.option(
    "--vae",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="A saved VAE, OUT of `dalle-fast train-vae`, or old weights.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder of codes.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Pictures encoded together.")
@click.option("--crops", type=click.IntRange(1), default=1, show_default=True, help="Crops of each picture.")
@click.option(
    "--resize",
    type=click.Choice(["none", "upstream", "paper"]),
    help="How a crop is taken: at random as the original or the paper, or the middle square (none).  "
    "[default: none; upstream for several crops]",
)
@click.option(
    "--smallest-crop",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.75,
    show_default=True,
    help="Least share of the area, of upstream.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the crops.")
@click.option("--device", default="cpu", show_default=True, help="torch's name of where to encode.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--shard-size", type=click.IntRange(1), default=10_000, show_default=True, help="Pictures of a file.")
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that read pictures.")
def encode(
    data: str,
    vae: Path,
    out: Path,
    batch: int,
    crops: int,
    resize: str | None,
    smallest_crop: float,
    seed: int,
    device: str,
    dtype: str,
    shard_size: int,
    workers: int,
) -> None:
    """Encode the pictures in DATA with a trained VAE; `dalle-fast train` takes the folder of codes as its DATA.

    \b
    dalle-fast encode pictures/ --vae vae/ --out codes/
    dalle-fast encode "shards/{000..009}.tar" --vae vae/ --out codes/ --crops 4 --device cuda --dtype bfloat16

    DATA: a folder of pictures with or without .txt files, or shards. Captions are kept beside the codes. The same
    command again goes on where it stopped, killed or not.
    """
    with in_sentences():
        from tqdm import tqdm  # at call time: --help needs none of it

        from dalle_fast.training.encode import encode as run

        with tqdm(desc="encode", unit="picture") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            made = run(
                data,
                model_in(vae),
                out,
                batch=batch,
                crops=crops,
                resize=resize or ("upstream" if crops > 1 else "none"),
                smallest_crop=smallest_crop,
                seed=seed,
                device=device,
                dtype=dtype,
                shard_size=shard_size,
                workers=workers,
                on_batch=show,
            )
    skipped = f"; {made.skipped:,} could not be used, the log names them" if made.skipped else ""
    click.echo(f"{out}: {sum(made.counts):,} grids of {made.image_seq_len} codes{skipped}.")
