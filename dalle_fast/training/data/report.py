"""Before the first step: what the data are, in words and as a picture of a batch as the model sees it."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dalle_fast.compat.loading import load_vae
from dalle_fast.jobs.job import hash_model
from dalle_fast.sampling.gallery import to_pixels
from dalle_fast.training.codebook_usage import CodebookUsage
from dalle_fast.training.data.captions import CaptionTooLong
from dalle_fast.training.data.codes import CodesSamples
from dalle_fast.training.data.pictures import BROKEN
from dalle_fast.training.data.samples import DataError, Samples, Unusable
from dalle_fast.whole_files import make_folder, write_whole

if TYPE_CHECKING:
    from dalle_fast.training.data.source import SampleSource

TEXT_NAME, PICTURE_NAME = "data.txt", "batch.png"
_LOOKED_AT = 1000  # samples, spread over the data
_QUANTILES = (("least", 0.0), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("most", 1.0))
_SHOWN = 8
_TOP_CODES = 10
_CELL = 128  # pixels
_LINES = 3
_CHARACTERS = 20  # of a line of a cell
_LINE_HEIGHT = 12


def write_report(source: SampleSource, out: Path) -> str:
    """Writes out/data.txt, which is returned, and out/batch.png: 8 samples with what the tokenizer made of captions.

    Looks at 1,000 samples spread over the data.

    Raises: ValueError (no usable sample, a caption too long).
    """
    make_folder(out)
    places = torch.linspace(0, source.n - 1, min(source.n, _LOOKED_AT)).round().long()
    indices = source.trained[places].tolist()
    lines = [f"{source.n:,} samples to train on, {len(source.kept_apart):,} held out; {len(indices):,} looked at"]
    if source.captions is not None:
        lines += _captions(source, indices)
    if source.samples.has_codes:
        lines += _codes(source, indices)
    elif source.pixels is not None:
        lines += _sizes(source, indices)
    batch = next(
        source.loader(rank=0, world=1, batch=_SHOWN, micro_batch=_SHOWN, first_step=0, steps=1, seed=0)
    )  # first, so that what it skips is counted
    lines += [f"skipped: {n:,} x {reason}" for reason, n in sorted(source.skipped().items())]
    write_whole(out / PICTURE_NAME, [_png(_sheet(source, batch))])
    text = "\n".join(lines) + "\n"
    write_whole(out / TEXT_NAME, [text.encode()])
    return text


def _captions(source: SampleSource, indices: list[int]) -> list[str]:
    """Lengths of all captions of the samples, in tokens."""
    captions = source.captions
    assert captions is not None
    lengths: list[int] = []
    n_captions = []
    for index in indices:
        try:
            own = source.samples.captions(index)
        except Unusable as error:
            source.samples.skipped.add(source.samples.name(index), error.reason, str(error))
            continue
        n_captions.append(len(own))
        try:
            lengths.extend(len(captions.whole(line)) for line in own)
        except CaptionTooLong as error:
            raise DataError(f"train: {source.samples.name(index)}: {error}") from None
    if not lengths:
        return ["captions: none"]
    n_cut = sum(length > captions.text_seq_len for length in lengths)
    return [
        f"captions a sample: {min(n_captions)} to {max(n_captions)}",
        "tokens a caption: "
        + ", ".join(f"{what} {int(np.quantile(lengths, q, method='nearest'))}" for what, q in _QUANTILES),
        f"of {len(lengths):,} captions {n_cut:,} ({n_cut / len(lengths):.1%}) are cut at text_seq_len="
        f"{captions.text_seq_len}",
    ]


def _codes(source: SampleSource, indices: list[int]) -> list[str]:
    """How the codes of the samples are distributed."""
    assert isinstance(source.samples, CodesSamples)
    made = source.samples.manifest
    usage = CodebookUsage(made.num_tokens)
    for index in indices:
        usage.add(source.samples.codes(index))
    shares, top = usage.shares.sort(descending=True, stable=True)
    n = min(_TOP_CODES, usage.used)
    listed = ", ".join(f"{k} {share:.1%}" for k, share in zip(top[:n].tolist(), shares[:n].tolist(), strict=True))
    return [
        f"codes: {made.image_seq_len} a picture out of {made.num_tokens:,}, from {made.vae} "
        f"(sha256 {made.vae_hash[:12]}), {made.crops} x {made.resize}",
        f"codes used: {usage.used:,}, unused: {usage.dead:,}, perplexity {usage.perplexity:.0f}",
        f"most frequent: {listed}",
    ]


def _sizes(source: SampleSource, indices: list[int]) -> list[str]:
    """The pictures' own sizes."""
    assert source.pixels is not None
    sizes: Counter[tuple[int, int]] = Counter()
    for index in indices:
        try:
            with Image.open(source.samples.picture(index)) as opened:  # its header only
                sizes[opened.size] += 1
        except BROKEN as error:
            source.samples.skipped.add(
                source.samples.name(index), "broken picture", f"broken picture: {type(error).__name__}: {error}"
            )
    if not sizes:
        return ["pictures: none opens"]
    (width, height), n = sizes.most_common(1)[0]
    sides = [min(size) for size in sizes]
    n_small = sum(n for size, n in sizes.items() if min(size) < source.pixels.size)
    return [
        f"pictures: short sides {min(sides)} to {max(sides)} pixels, most often {width} x {height} ({n:,}); "
        f"{n_small:,} are smaller than {source.pixels.size} and get enlarged"
    ]


def _sheet(source: SampleSource, batch: dict[str, Any]) -> Image.Image:
    """The samples side by side, their captions below, decoded from the ids."""
    pixels = batch["pixels"] if "pixels" in batch else _pixels_of_codes(batch["codes"], source.samples)
    n = len(batch["names"])
    columns = min(n, 4)
    height = _CELL + _LINES * _LINE_HEIGHT
    sheet = Image.new("RGB", (columns * _CELL, -(-n // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place in range(n):
        left, top = place % columns * _CELL, place // columns * height
        picture = _image(pixels[place])
        sheet.paste(picture.resize((_CELL, _CELL), Image.Resampling.NEAREST), (left, top))
        if "text" in batch and source.captions is not None:
            text = _decoded(source.captions.tokenizer, batch["text"][place])
            wrapped = textwrap.wrap(text, _CHARACTERS)[:_LINES]
            # The built-in font has no letters beyond Latin-1.
            shown = "\n".join(wrapped).encode("latin-1", "replace").decode("latin-1")
            draw.multiline_text((left + 2, top + _CELL), shown, fill="black", spacing=0)
    return sheet


def _image(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] > 1 else array[:, :, 0]).convert("RGB")


@torch.no_grad()
def _pixels_of_codes(codes: Tensor, samples: Samples) -> Tensor:
    """uint8 [b, C, S, S]: codes [b, image_seq_len] as their VAE decodes them; as a colour each where it is gone."""
    assert isinstance(samples, CodesSamples)
    made = samples.manifest
    if Path(made.vae).exists() and hash_model(Path(made.vae), draws=False) == made.vae_hash:
        vae = load_vae(made.vae, op="report")
        return to_pixels(vae, vae.decode(codes)).mul(255).round().byte()
    side = round(codes.shape[1] ** 0.5)
    colours = torch.randint(0, 256, (made.num_tokens, 3), generator=torch.Generator().manual_seed(0))
    return colours[codes].view(-1, side, side, 3).permute(0, 3, 1, 2).byte()


def _decoded(tokenizer: Any, ids: Tensor) -> str:
    return str(tokenizer.decode([index for index in ids.tolist() if index != 0]))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
