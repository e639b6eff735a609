"""`dalle-fast tokenizer`: make the tokenizer that captions are trained with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from dalle_fast.cli.sentences import in_sentences


@click.group()
def tokenizer() -> None:
    """Make tokenizers."""


@tokenizer.command()
@click.argument("data")
@click.option(
    "--vocab-size", type=click.IntRange(1), default=16384, show_default=True, help="Entries, the padding included."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("tokenizer.json"), show_default=True
)
def train(data: str, vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE on the captions in DATA; `dalle-fast train --tokenizer` takes the result.

    DATA: a folder of pictures and .txt files, shards as "shards/{000..009}.tar", what `dalle-fast encode` wrote, or a
    text file of one caption a line. The default size is the DALL-E paper's.
    """
    with in_sentences():
        from dalle_fast.tokenizers.training import train_tokenizer  # at call time: --help needs none of it
        from dalle_fast.whole_files import write_whole

        trained = train_tokenizer(_captions(data), vocab_size)
        write_whole(out, [trained.to_str(pretty=True).encode()])
        size = trained.get_vocab_size()
        click.echo(f"{out}: {size:,} entries")
        if size < vocab_size:
            click.echo(f"The captions give no more than {size:,}; num_text_tokens of the model may be that.")


def _captions(data: str) -> Iterator[str]:
    """Every caption of a data set or of a text file.

    Raises: ValueError (none), FileNotFoundError.
    """
    from dalle_fast.training.data import open_samples
    from dalle_fast.training.data.folders import read_captions
    from dalle_fast.training.data.samples import Unusable

    if data.endswith(".txt") and Path(data).is_file():
        yield from read_captions(Path(data))
        return
    samples = open_samples(data, captioned=True)
    n_used = 0
    for index in range(len(samples)):
        try:
            captions = samples.captions(index)
        except Unusable as error:
            samples.skipped.add(samples.name(index), error.reason, str(error))
            continue
        n_used += 1
        yield from captions
    if not n_used:
        raise ValueError(f"tokenizer: the data must hold captions, got only empty ones in {data}.")
