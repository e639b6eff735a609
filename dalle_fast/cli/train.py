"""`dalle-fast train-vae`, `train`, `pack`, `evaluate`: the demo's model from data to figures."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.tokenizers.hug import HugTokenizer
from dalle_fast.training import captions as caption_tools
from dalle_fast.training import dalle as dalle_training
from dalle_fast.training import dvae as vae_training
from dalle_fast.training import quality
from dalle_fast.training.demo import EmojiData, build_dalle, build_vae
from dalle_fast.training.loop import Budget
from dalle_fast.training.pack import FIXED_LIST, SETTINGS
from dalle_fast.training.pack import pack as write_model

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MINUTES = click.FloatRange(min=0, min_open=True)
_OUT = click.Path(file_okay=False, path_type=Path)
_SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "emoji-64"


def _report(row: dict[str, float | int]) -> None:
    click.echo("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


def _read_data(folder: Path) -> EmojiData:
    try:
        return EmojiData.read(folder)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@click.command("train-vae")
@click.argument("data", type=_FOLDER)
@click.argument("run", type=_OUT)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=14.0, show_default=True, help="Training time."
)
def train_vae(data: Path, run: Path, minutes: float) -> None:
    """Train the discrete VAE on DATA (of `dalle-fast data emoji`); RUN/vae is the result. The same command resumes."""
    emoji = _read_data(data)
    torch.manual_seed(0)
    vae = build_vae()
    held_out = emoji.held_out
    vae_training.train_vae(
        vae, emoji.pictures[~held_out], emoji.pictures[held_out], run, Budget(minutes=minutes), on_log=_report
    )
    vae.save_pretrained(run / "vae")
    _show_vae(quality.vae_figures(vae.eval(), emoji.pictures, held_out))


@click.command()
@click.argument("data", type=_FOLDER)
@click.argument("run", type=_FOLDER)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=93.0, show_default=True, help="Training time."
)
def train(data: Path, run: Path, minutes: float) -> None:
    """Train the transformer on DATA with the VAE in RUN/vae; RUN/model is the result. The same command resumes."""
    emoji = _read_data(data)
    try:
        vae = DiscreteVAE.from_pretrained(run / "vae")
    except (FileNotFoundError, ValueError) as error:
        raise click.ClickException(f"{error} Run `dalle-fast train-vae` first.") from None
    lines = emoji.captions
    tokenizer = caption_tools.train_tokenizer([line for own in lines for line in own])
    tokenizer.save(str(run / "tokenizer.json"))
    torch.manual_seed(0)
    dalle = build_dalle(vae, tokenizer)
    # One thread a worker of the trainer, none inside an operation.
    torch.set_num_threads(1)
    codes = _codes(vae, emoji, run / "codes.safetensors")
    dalle_training.train_dalle(dalle, tokenizer, codes, lines, run, Budget(minutes=minutes), on_log=_report)
    dalle.save_pretrained(run / "model", tokenizer=run / "tokenizer.json")


def _codes(vae: DiscreteVAE, emoji: EmojiData, path: Path) -> torch.Tensor:
    """Every picture's codes, encoded once and kept."""
    if not path.is_file():
        save_file({"codes": dalle_training.encode_pictures(vae, emoji.pictures)}, path)
    return load_file(path)["codes"]


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
    half: bool,
) -> None:
    """Write RUN/model to OUT as it is shipped: weights, tokenizer, card, licence, captions and sampling settings."""
    settings: dict[str, float] = {"temperature": temperature, "cond_scale": cond_scale}
    if top_k is not None:
        settings["top_k"] = top_k
    size = write_model(
        DALLE.from_pretrained(run / "model"),
        run / "tokenizer.json",
        _read_data(data),
        out,
        settings=settings,
        examples=examples,
        card=card.read_text(encoding="utf-8"),
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
        dalle = DALLE.from_pretrained(model)
    except (FileNotFoundError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    vae_figures = quality.vae_figures(dalle.vae, emoji.pictures, emoji.held_out)
    _show_vae(vae_figures)
    settings = json.loads((model / SETTINGS).read_text(encoding="utf-8"))
    drawing = None
    if not vae_only:
        fixed = (model / FIXED_LIST).read_text(encoding="utf-8").splitlines()
        with tqdm(total=len(fixed) * samples, unit="picture", desc="drawing") as bar:
            drawing = quality.drawing_figures(
                dalle,
                HugTokenizer(model / "tokenizer.json"),
                emoji,
                fixed,
                samples=samples,
                seed=seed,
                settings=settings,
                on_batch=bar.update,
            )
        click.echo(
            f"nearest picture is the captioned one: {drawing.nearest_best_of:.1%} of {drawing.captions} captions, "
            f"best of {drawing.samples}; {drawing.nearest_single:.1%} of single samples"
        )
        click.echo(f"missed: {', '.join(drawing.missed_captions)}")
    quality.write_figures(out, vae_figures, drawing, settings)


def _show_vae(figures: quality.VaeFigures) -> None:
    click.echo(
        f"held-out hard reconstructions: PSNR {figures.psnr:.2f} dB; codes used: {figures.codes_used} of "
        f"{figures.num_codes} ({figures.share_used:.0%}), perplexity {figures.perplexity:.0f}"
    )
