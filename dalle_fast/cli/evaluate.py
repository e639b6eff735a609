"""`dalle-fast pack` and `evaluate`: the demo's model as it is shipped, and its quality figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.ranking import ClipRanker, load_ranker
from dalle_fast.models.clip import CLIP
from dalle_fast.models.dalle import DALLE
from dalle_fast.training import quality
from dalle_fast.training.emoji_data import EmojiData
from dalle_fast.training.pack import FIXED_LIST, SETTINGS
from dalle_fast.training.pack import pack as write_model

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_OUT = click.Path(file_okay=False, path_type=Path)
_HELD_OUT_CAPTIONS = 64
_SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "emoji-64"


def _read_data(folder: Path) -> EmojiData:
    try:
        return EmojiData.read(folder)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@click.command()
@click.argument("data", type=_FOLDER)
@click.argument("run", type=_FOLDER)
@click.argument("out", type=_OUT)
@click.option(
    "--card", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="Text of README.md."
)
@click.option(
    "--example", "examples", multiple=True, required=True, help="A prompt to draw when none is given; repeatable."
)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(1), default=None)
@click.option("--cond-scale", type=float, default=1.0, show_default=True)
@click.option("--clip", type=_FOLDER, default=None, help="OUT of train-clip, whose model ranks what is drawn.")
@click.option("--half/--full", default=False, help="Store the weights in 16 bits.")
def pack(
    data: Path,
    run: Path,
    out: Path,
    card: Path,
    examples: tuple[str, ...],
    temperature: float,
    top_k: int | None,
    cond_scale: float,
    clip: Path | None,
    half: bool,
) -> None:
    """Write RUN/model to OUT as it is shipped: weights, tokenizer, card, licence, captions and sampling settings.

    RUN: OUT of `dalle-fast train`.
    """
    settings: dict[str, float] = {"temperature": temperature, "cond_scale": cond_scale}
    if top_k is not None:
        settings["top_k"] = top_k
    size = write_model(
        DALLE.from_pretrained(run / "model"),
        run / "model" / "tokenizer.json",
        _read_data(data),
        out,
        settings=settings,
        examples=examples,
        card=card.read_text(encoding="utf-8"),
        clip=None if clip is None else CLIP.from_pretrained(clip / "model"),
        dtype=torch.float16 if half else None,
    )
    click.echo(f"{out}: {size / 1e6:.1f} MB")


@click.command()
@click.argument("data", type=_FOLDER)
@click.option("--model", type=_FOLDER, default=_SHIPPED, help="A packed model; default: the shipped one.")
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Pictures a caption.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True)
@click.option("--vae-only", is_flag=True, help="Skip the drawing.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("figures.json"), show_default=True)
def evaluate(data: Path, model: Path, samples: int, seed: int, vae_only: bool, out: Path) -> None:
    """Print the quality figures of a packed model on DATA (of `dalle-fast data emoji`), and write them as JSON."""
    emoji = _read_data(data)
    try:
        loaded = DrawingModel.read(model)
        own_clip = model / "clip"
        ranker = load_ranker(str(own_clip), loaded) if own_clip.is_dir() else None
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise click.ClickException(str(error)) from None
    side, got = loaded.dalle.vae.image_size, emoji.pictures.shape[-1]
    if side != got:
        raise click.ClickException(
            f"evaluate: DATA must hold pictures of {side}x{side}, as the model draws them, got {got}x{got}. Write them "
            f"with `dalle-fast data emoji --size {side}`."
        )
    vae_figures = quality.vae_figures(loaded.dalle.vae, emoji.pictures, emoji.held_out)
    _show_vae(vae_figures)
    clip_figures = None
    if isinstance(ranker, ClipRanker):
        clip_figures = quality.clip_figures(ranker.clip, ranker.tokenizer, emoji)
        click.echo(
            f"CLIP, recall@1 among {clip_figures.pairs} held-out pairs: text to picture "
            f"{clip_figures.text_to_picture:.1%}, picture to text {clip_figures.picture_to_text:.1%}"
        )
    settings = json.loads((model / SETTINGS).read_text(encoding="utf-8"))
    fixed = (model / FIXED_LIST).read_text(encoding="utf-8").splitlines()
    apart = [entry.held_out_alias for entry in emoji.entries if entry.held_out_alias][:_HELD_OUT_CAPTIONS]
    drawing, held_out = (
        _drawing(loaded, emoji, captions, what, samples=samples, seed=seed, settings=settings, ranker=ranker)
        if captions and not vae_only
        else None
        for captions, what in ((fixed, "fixed list"), (apart, "held-out captions"))
    )
    quality.write_figures(out, vae_figures, drawing, settings, held_out=held_out, clip=clip_figures)


def _drawing(
    model: DrawingModel, data: EmojiData, captions: list[str], what: str, *, samples: int, **settings: Any
) -> quality.DrawingFigures:
    """The figures of a list of captions, printed."""
    with tqdm(total=len(captions) * samples, unit="picture", desc=what) as bar:
        found = quality.drawing_figures(
            model.dalle, model.tokenizer, data, captions, samples=samples, on_batch=bar.update, **settings
        )
    ranked = "" if found.nearest_ranked is None else f", {found.nearest_ranked:.1%} of those that the CLIP ranks first"
    click.echo(
        f"{what}: the nearest picture is the captioned one for {found.nearest_best_of:.1%} of {found.captions} "
        f"captions, best of {found.samples}{ranked}; {found.nearest_single:.1%} of single samples"
    )
    click.echo(f"missed: {', '.join(found.missed_captions)}")
    return found


def _show_vae(figures: quality.VaeFigures) -> None:
    click.echo(
        f"held-out hard reconstructions: PSNR {figures.psnr:.2f} dB; codes used: {figures.codes_used} of "
        f"{figures.num_codes} ({figures.share_used:.0%}), perplexity {figures.perplexity:.0f}"
    )
