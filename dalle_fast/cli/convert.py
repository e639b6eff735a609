"""`dalle-fast convert`: a file of weights becomes a directory that is safe to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dalle_fast.cli.companions import COMPANIONS
from dalle_fast.cli.sentences import in_sentences


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tokenizer", **COMPANIONS["tokenizer"])
@click.option("--vae", **COMPANIONS["vae"])
@click.option("--yaml", **COMPANIONS["yaml"])
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="What is stored; default: as in IN."
)
def convert(
    source: Path, out: Path, vae: Path | None, yaml: Path | None, tokenizer: Path | None, dtype: str | None
) -> None:
    """Turn IN, weights of another package, into OUT_DIR, a saved model: config.json and model.safetensors.

    \b
    dalle-fast convert dalle.pt dalle/
    dalle-fast convert vqgan.ckpt vqgan/ --yaml vqgan.yaml

    Nothing that IN holds is run. OUT_DIR appears whole or not at all; a saved model there is replaced, anything else
    is refused. `dalle-fast info IN` says beforehand what it is.
    """
    with in_sentences():
        _check_out(out, source)
        import torch  # at call time: --help needs none of it

        from dalle_fast.compat.formats.base import Companions
        from dalle_fast.compat.loading import load

        loaded = load(source, Companions(vae, yaml, tokenizer))
        model: Any = loaded.model
        name, n_values = loaded.description.kind, sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            tokenizer=_that_saves(loaded.tokenizer),
            card=_card(name, source, loaded.description.format),
        )
    click.echo(f"{out}: a {name} of {n_values:,} values, from {loaded.description.format}.")
    if loaded.problem:
        click.echo(f"It has no tokenizer yet. {loaded.problem}", err=True)
    else:
        click.echo(_next(name, out))


def _check_out(out: Path, source: Path) -> None:
    """Refuses, before anything is read, what could not be written at the end."""
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"convert: OUT_DIR must be another than IN, got {out} for both. Name a new directory.")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(
            f"convert: OUT_DIR must be new, empty or a saved model, got {out}, which holds other things. Name another."
        )


def _that_saves(tokenizer: Any) -> Any:
    """What writes a tokenizer.json."""
    inner = getattr(tokenizer, "tokenizer", None)
    return getattr(inner, "backend_tokenizer", inner)


def _card(name: str, source: Path, layout: str) -> str:
    return (
        f"# {name}\n\nConverted by `dalle-fast convert` from `{source.name}`, {layout}. The licence of those weights "
        f'applies.\n\n```python\nfrom dalle_fast.compat import load\n\nmodel = load(".").model\n```\n'
    )


def _next(name: str, out: Path) -> str:
    if name == "DALLE":
        return f'Next: dalle-fast sample "a prompt" --model {out}'
    if name == "CLIP":
        return f'Next: dalle-fast sample "a prompt" --rank {out} --keep 4'
    return f"Next: dalle-fast train DATA OUT --vae {out}"
