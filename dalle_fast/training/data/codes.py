"""Codes that `dalle-fast encode` wrote: the manifest codes.json, and NNNNNN.safetensors with NNNNNN.jsonl beside it.

A .safetensors holds "codes" [n, image_seq_len] (int16, or int32 where the codebook has more than 32,768 entries) and
"captioned" bool [n]; line i of the .jsonl is sample i: {"key", "name", "crop", "captions"}.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dalle_fast.training.data.samples import Skipped, Unusable

MANIFEST = "codes.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CodesManifest:
    """What a folder of codes holds.

    Attributes:
        source: what was encoded.   vae, vae_hash: with which saved VAE; `hash_model` of it.
        num_tokens, image_seq_len, image_size, channels: of the VAE.
        resize, smallest_crop, crops, seed: how pictures became pixels, `crops` times each.
        dtype: of the VAE's arithmetic.   shard_size: pictures of a shard.
        n_pictures, keys_hash: of the source; sha256 of its keys in order.   counts: samples of each shard.
        skipped: of them, crops counted apart, did not open.
        complete: `encode` has finished.
    """

    source: str
    vae: str
    vae_hash: str
    num_tokens: int
    image_seq_len: int
    image_size: int
    channels: int
    resize: str
    smallest_crop: float
    crops: int
    seed: int
    dtype: str
    shard_size: int
    n_pictures: int
    keys_hash: str
    counts: list[int] = field(default_factory=list)
    skipped: int = 0
    complete: bool = False
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> CodesManifest:
        """The manifest of a folder of codes.

        Raises: ValueError (not one of this version).
        """
        path = folder / MANIFEST
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**facts)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"train: {MANIFEST} must be what dalle-fast encode writes, got {path} ({error}). Encode anew."
            ) from None
        if found.format_version != FORMAT_VERSION:
            raise ValueError(
                f"train: {path} must be of version {FORMAT_VERSION}, got {found.format_version}. Encode anew."
            )
        return found

    def to_json(self) -> bytes:
        """The content of codes.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The .safetensors and the .jsonl of a shard."""
    return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.jsonl"


def count_samples(folder: Path, number: int) -> int | None:
    """How many samples a shard holds; None if one of its two files is missing or damaged."""
    tensors, lines = shard_paths(folder, number)
    if not tensors.is_file() or not lines.is_file():
        return None
    try:
        n = len(load_file(tensors)["codes"])
    except (SafetensorError, KeyError):
        return None
    return n if lines.read_bytes().count(b"\n") == n else None


class CodesSamples:
    """The samples of a folder of codes.

    Args: captioned: leave out those without a caption.
    Raises: ValueError (unfinished, damaged, nothing to train on).
    """

    has_codes = True

    def __init__(self, folder: Path, *, captioned: bool) -> None:
        self.folder = folder
        self.manifest = CodesManifest.read(folder)
        self.skipped = Skipped()
        if not self.manifest.complete:
            raise ValueError(
                f"train: {folder} must hold all codes, got an unfinished encode. Run it again: it goes on."
            )
        self._codes: list[Tensor] = []  # mapped from the files, read page by page
        self._line_starts: list[np.ndarray] = []
        kept = []
        for number, n in enumerate(self.manifest.counts):
            if count_samples(folder, number) != n:
                raise ValueError(
                    f"train: {shard_paths(folder, number)[0]} must hold {n} samples, as {MANIFEST} says, and does not. "
                    f"Remove it and encode again: only it is made anew."
                )
            tensors, lines = shard_paths(folder, number)
            shard = load_file(tensors)
            self._codes.append(shard["codes"])
            kept.append(shard["captioned"])
            ends = np.flatnonzero(np.frombuffer(lines.read_bytes(), np.uint8) == ord("\n")) + 1
            self._line_starts.append(np.concatenate([[0], ends]))
        self._starts = [0, *accumulate(self.manifest.counts)]
        mask = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool)
        if captioned and not bool(mask.all()):
            self.skipped.add_many(int((~mask).sum()), "picture without a caption", f"in {folder}")
        self._kept = mask.nonzero().flatten() if captioned else torch.arange(len(mask))
        if not len(self._kept):
            raise ValueError(
                f"train: the codes must be of pictures{' with captions' if captioned else ''}, got none in {folder}. "
                "Encode other data."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, index: int) -> str:
        """The picture's key in what was encoded."""
        return str(self._line(index)["key"])

    def name(self, index: int) -> str:
        """The picture's name in what was encoded, and the number of its crop."""
        line = self._line(index)
        return f"{line['name']}#{line['crop']}" if self.manifest.crops > 1 else str(line["name"])

    def picture(self, index: int) -> Path | BinaryIO:
        """None are kept."""
        raise TypeError("train: a folder of codes holds no pictures. Name what they were encoded from.")

    def captions(self, index: int) -> list[str]:
        """The picture's captions.

        Raises: Unusable (none).
        """
        lines = self._line(index)["captions"]
        if not lines:
            raise Unusable("picture without a caption")
        return list(lines)

    def codes(self, index: int) -> Tensor:
        """long [image_seq_len]."""
        shard, place = self._place(index)
        return self._codes[shard][place].long()

    def check_vae(
        self, *, vae_hash: str | None = None, num_tokens: int | None = None, image_seq_len: int | None = None
    ) -> None:
        """That the codes are those of a model's VAE.

        Raises: ValueError.
        """
        made = self.manifest
        for what, wanted, got in (
            ("num_tokens", num_tokens, made.num_tokens),
            ("image_seq_len", image_seq_len, made.image_seq_len),
        ):
            if wanted is not None and wanted != got:
                raise ValueError(
                    f"train: the codes in {self.folder} must be of a VAE with {what}={wanted}, the model's, got {got}. "
                    "Encode the pictures with the model's VAE."
                )
        if vae_hash is not None and vae_hash != made.vae_hash:
            raise ValueError(
                f"train: the codes in {self.folder} must be of the model's VAE, got those of {made.vae} as it was then "
                f"(sha256 {made.vae_hash[:12]}, the model's is {vae_hash[:12]}). Name that VAE with --vae, or encode "
                "again."
            )

    def _place(self, index: int) -> tuple[int, int]:
        place = int(self._kept[index])
        shard = bisect_right(self._starts, place) - 1
        return shard, place - self._starts[shard]

    def _line(self, index: int) -> dict[str, Any]:
        shard, place = self._place(index)
        start, end = self._line_starts[shard][place : place + 2].tolist()
        with shard_paths(self.folder, shard)[1].open("rb", buffering=0) as file:
            found: dict[str, Any] = json.loads(os.pread(file.fileno(), end - start, start))
        return found
