"""Data for training: folders of pictures with captions, tar shards, codes written by `dalle-fast encode`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_fast.training.data.captions import Captions
from dalle_fast.training.data.codes import MANIFEST, CodesSamples
from dalle_fast.training.data.folders import FolderSamples
from dalle_fast.training.data.pictures import Pixels
from dalle_fast.training.data.samples import Samples
from dalle_fast.training.data.shards import ShardSamples, expand
from dalle_fast.training.data.source import SampleSource
from dalle_fast.training.task import Source

if TYPE_CHECKING:
    from dalle_fast.training.config import DataConfig

__all__ = ["open_samples", "open_source"]


def open_source(
    config: DataConfig,
    *,
    image_size: int,
    channels: int,
    tokenizer: Any,
    text_seq_len: int | None,
    need: Collection[str],
    vae: Path | None = None,
    num_tokens: int | None = None,
    image_seq_len: int | None = None,
) -> Source:
    """The data that a configuration names.

    Args:
        image_size, channels: of the pictures.   tokenizer, text_seq_len: of the captions; None where none are needed.
        need: of "pixels", "text", "codes". "codes" means codes where the source has them and pixels, to be encoded,
            where it does not; "pixels" means pixels, so a folder of codes is refused.
        vae, num_tokens, image_seq_len: the directory of the model's VAE, its codes, codes a picture; codes of another
            VAE are refused. None is not checked.
    Raises: FileNotFoundError, ValueError, TypeError (data that do not fit).
    """
    captioned = "text" in need
    samples = open_samples(config.source, captioned=captioned)
    if samples.has_codes and "pixels" in need:
        raise ValueError(
            f"train: the data must be pictures, got the codes in {config.source}. Name what they were encoded from."
        )
    if isinstance(samples, CodesSamples):
        from dalle_fast.jobs.job import hash_model  # loads libraries that folders do not need

        samples.check_vae(
            vae_hash=None if vae is None else hash_model(vae, draws=False),
            num_tokens=num_tokens,
            image_seq_len=image_seq_len,
        )
    captions = None
    if captioned:
        assert text_seq_len is not None
        captions = Captions(
            tokenizer,
            text_seq_len,
            truncate=config.truncate,
            first_caption=config.first_caption,
            word_dropout=config.word_dropout,
            bpe_dropout=config.bpe_dropout,
        )
    pixels = Pixels(
        image_size,
        channels,
        resize=config.resize,
        smallest_crop=config.smallest_crop,
        captioned=captioned,
        flip=config.flip,
        augment=config.augment,
    )
    return SampleSource(samples, pixels=pixels, captions=captions, held_out=config.held_out)


def open_samples(source: str, *, captioned: bool) -> Samples:
    """The samples of a folder of pictures, of shards, or of a folder of codes.

    Raises: FileNotFoundError, ValueError.
    """
    if (Path(source) / MANIFEST).is_file():
        return CodesSamples(Path(source), captioned=captioned)
    if source.endswith(".tar") or "://" in source or source.startswith("pipe:"):
        return ShardSamples(expand(source), captioned=captioned)
    return FolderSamples(Path(source), captioned=captioned)
