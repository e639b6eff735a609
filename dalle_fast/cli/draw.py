"""`dalle-fast draw`: pictures of prompts, on one labelled sheet."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from tqdm import tqdm

from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling.gallery import labelled_grid, to_pixels
from dalle_fast.sampling.prompts import KnownCaptions
from dalle_fast.tokenizers.hug import HugTokenizer

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "assets" / "emoji-64"


@dataclass(frozen=True)
class DrawingModel:
    """A saved model with what drawing needs beside the weights."""

    dalle: DALLE
    tokenizer: HugTokenizer
    captions: KnownCaptions | None
    examples: list[str]
    settings: dict[str, float]

    @classmethod
    def read(cls, directory: Path) -> DrawingModel:
        """From a directory of `save_pretrained` with tokenizer.json, and where there are: captions.txt, examples.txt, sampling.json."""
        dalle = DALLE.from_pretrained(directory)
        tokenizer = HugTokenizer(directory / "tokenizer.json")
        captions, examples, sampling = (directory / name for name in ("captions.txt", "examples.txt", "sampling.json"))
        return cls(
            dalle,
            tokenizer,
            KnownCaptions.read(captions) if captions.is_file() else None,
            examples.read_text(encoding="utf-8").splitlines() if examples.is_file() else [],
            json.loads(sampling.read_text(encoding="utf-8")) if sampling.is_file() else {},
        )


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("--model", "directory", type=click.Path(path_type=Path), default=SHIPPED_MODEL, help="A saved model; default: the shipped one.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("drawn.png"), show_default=True, help="The sheet to write, a PNG.")
@click.option("--images-per-prompt", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="The first picture's; the others count on.")
@click.option("--temperature", type=float, default=None, help="0 draws the most likely picture; default: the model's setting.")
@click.option("--top-k", type=click.IntRange(1), default=None, help="Keep this many codes; default: the model's setting.")
@click.option("--cond-scale", type=float, default=None, help="Guidance; 1 is none; default: the model's setting.")
@click.option("--scale", type=click.IntRange(1, 16), default=2, show_default=True, help="Enlarge the pictures on the sheet.")
def draw(
    prompts: tuple[str, ...],
    directory: Path,
    out: Path,
    images_per_prompt: int,
    seed: int,
    temperature: float | None,
    top_k: int | None,
    cond_scale: float | None,
    scale: int,
) -> None:
    """Draw PROMPTS (without any: the model's own examples) and write them to one labelled picture."""
    try:
        model = DrawingModel.read(directory)
        chosen = list(prompts) or model.examples
        if not chosen or not all(prompt.strip() for prompt in chosen):
            raise ValueError("draw: prompts must be texts, got an empty one. Say what to draw.")
        given = {"temperature": temperature, "top_k": top_k, "cond_scale": cond_scale}
        settings = {**model.settings, **{name: value for name, value in given.items() if value is not None}}
        rows, seconds = _drawn(model, chosen, images_per_prompt, seed, settings)
        out.parent.mkdir(parents=True, exist_ok=True)
        labelled_grid(rows, scale=scale).save(out)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None
    n_images = len(chosen) * images_per_prompt
    n_tokens = n_images * model.dalle.image_seq_len
    click.echo(f"{n_images} pictures in {seconds:.1f} s, {n_tokens / seconds:.0f} image tokens/s. Look at {out.resolve()}")


def _drawn(model: DrawingModel, prompts: list[str], n: int, seed: int, settings: dict[str, float]) -> tuple[list[tuple[str, torch.Tensor]], float]:
    """(label, pixels [n, C, H, W]) for each prompt, and the seconds it took."""
    dalle = model.dalle
    for prompt in prompts:
        _tell_unknown_words(model.captions, prompt)
    text = model.tokenizer.tokenize([p.lower() for p in prompts], dalle.text_seq_len)
    text = text.repeat_interleave(n, dim=0)
    start = time.perf_counter()
    with tqdm(total=text.shape[0] * dalle.image_seq_len, unit="token", desc="drawing") as bar:
        images = dalle.generate_images(text, seed=seed, on_tokens=lambda first, codes: bar.update(codes.numel()), **settings)
    seconds = time.perf_counter() - start
    pixels = to_pixels(dalle.vae, images).unflatten(0, (len(prompts), n))
    return list(zip(prompts, pixels)), seconds


def _tell_unknown_words(captions: KnownCaptions | None, prompt: str) -> None:
    unknown = captions.unknown_words(prompt) if captions is not None else []
    if unknown and captions is not None:
        near = ", ".join(f'"{caption}"' for caption in captions.nearest(prompt))
        click.echo(f'"{prompt}": the model has never read {", ".join(unknown)}. Captions it knows: {near}.', err=True)
