"""`dalle-fast draw`: pictures of prompts, on one labelled sheet."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from tqdm import tqdm

from dalle_fast.cli.companions import COMPANIONS
from dalle_fast.cli.sentences import in_sentences
from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs.drawing_model import SHIPPED_MODEL, DrawingModel, SamplingSettings
from dalle_fast.jobs.ranking import Ranker, load_ranker, scores_of
from dalle_fast.sampling.gallery import labelled_grid, to_pixels

_CANDIDATES = 16


@click.command()
@click.argument("prompts", nargs=-1)
@click.option(
    "--model",
    "directory",
    type=click.Path(path_type=Path),
    default=SHIPPED_MODEL,
    help="A saved model, or a DALLE of another package; default: the shipped one.",
)
@click.option("--tokenizer", **COMPANIONS["tokenizer"])
@click.option("--vae", **COMPANIONS["vae"])
@click.option("--yaml", **COMPANIONS["yaml"])
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("drawn.png"),
    show_default=True,
    help="The sheet to write, a PNG.",
)
@click.option("--images-per-prompt", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--candidates",
    type=click.IntRange(1),
    default=None,
    help=f"Draw this many a prompt and show the best by the model's own CLIP; default: {_CANDIDATES} where it has one.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="The first picture's; the others count on.",
)
@click.option(
    "--temperature", type=float, default=None, help="0 draws the most likely picture; default: the model's setting."
)
@click.option(
    "--top-k", type=click.IntRange(1), default=None, help="Keep this many codes; default: the model's setting."
)
@click.option("--cond-scale", type=float, default=None, help="Guidance; 1 is none; default: the model's setting.")
@click.option(
    "--scale", type=click.IntRange(1, 16), default=2, show_default=True, help="Enlarge the pictures on the sheet."
)
def draw(
    prompts: tuple[str, ...],
    directory: Path,
    tokenizer: Path | None,
    vae: Path | None,
    yaml: Path | None,
    out: Path,
    images_per_prompt: int,
    candidates: int | None,
    seed: int,
    temperature: float | None,
    top_k: int | None,
    cond_scale: float | None,
    scale: int,
) -> None:
    """Draw PROMPTS (without any: the model's own examples) and write them to one labelled picture."""
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be used says so at once
    with in_sentences():
        model = DrawingModel.read(directory, companions=Companions(vae, yaml, tokenizer))
        chosen = list(prompts) or model.examples
        if not chosen or not all(prompt.strip() for prompt in chosen):
            raise ValueError("draw: prompts must be texts, got an empty one. Say what to draw.")
        settings = model.settings.overridden(temperature=temperature, top_k=top_k, cond_scale=cond_scale)
        ranker = _own_ranker(directory, model, candidates)
        n = _candidates(images_per_prompt, candidates, ranked=ranker is not None)
        rows, seconds = _drawn(model, chosen, n, seed, settings)
        if ranker is not None:
            rows = [(prompt, _best(ranker, prompt, pixels, images_per_prompt)) for prompt, pixels in rows]
    labelled_grid(rows, scale=scale).save(out)
    n_images = len(chosen) * n
    pictures = "1 picture" if n_images == 1 else f"{n_images} pictures"
    rate = n_images * model.dalle.image_seq_len / seconds
    shown = "" if n == images_per_prompt else f" The best {images_per_prompt} of {n} a prompt, by the model's CLIP."
    click.echo(f"{pictures} in {seconds:.1f} s, {rate:.0f} image tokens/s.{shown} Look at {out.resolve()}")


def _own_ranker(directory: Path, model: DrawingModel, candidates: int | None) -> Ranker | None:
    """The CLIP beside the model, None where there is none."""
    clip = directory / "clip"
    if clip.is_dir():
        return load_ranker(str(clip), model)
    if candidates is not None:
        raise ValueError(
            f"draw: candidates are ranked by the model's own CLIP, got none at {clip}. Leave --candidates out, or rank"
            " with `dalle-fast sample --rank`."
        )
    return None


def _candidates(shown: int, wanted: int | None, *, ranked: bool) -> int:
    """How many pictures to draw for each prompt."""
    if wanted is not None and wanted < shown:
        raise ValueError(f"draw: candidates must be at least the {shown} images per prompt, got {wanted}.")
    return (wanted or max(shown, _CANDIDATES)) if ranked else shown


def _best(ranker: Ranker, prompt: str, pixels: torch.Tensor, n: int) -> torch.Tensor:
    """The n best of pictures [N, C, H, W] of a prompt, the best first."""
    order = scores_of(ranker, [prompt] * len(pixels), pixels.float()).argsort(descending=True, stable=True)
    return pixels[order[:n]]


def _drawn(
    model: DrawingModel, prompts: list[str], n: int, seed: int, settings: SamplingSettings
) -> tuple[list[tuple[str, torch.Tensor]], float]:
    """(label, pixels [n, C, H, W]) for each prompt, and the seconds it took."""
    dalle = model.dalle
    for sentence in filter(None, map(model.advice, prompts)):
        click.echo(sentence, err=True)
    text = model.tokenizer.tokenize([p.lower() for p in prompts], dalle.text_seq_len)
    text = text.repeat_interleave(n, dim=0)
    start = time.perf_counter()
    with tqdm(total=text.shape[0] * dalle.image_seq_len, unit="token", desc="drawing") as bar:
        drawn = dalle.generate_images(
            text,
            seed=seed,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            cond_scale=settings.cond_scale,
            on_tokens=lambda first, codes: bar.update(codes.numel()),
        )
    images = drawn[0] if isinstance(drawn, tuple) else drawn
    seconds = time.perf_counter() - start
    pixels = to_pixels(dalle.vae, images).unflatten(0, (len(prompts), n))
    return list(zip(prompts, pixels, strict=True)), seconds
