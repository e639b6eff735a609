"""Pictures with captions from a folder, as the original's trainers read them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset

from dalle_fast.training.data.folders import find_pictures, read_captions
from dalle_fast.training.data.pictures import BROKEN, PICTURE_SUFFIXES, random_square, to_tensor

_LOG = logging.getLogger(__name__)


class Tokenizes(Protocol):
    """What the data set asks of a tokenizer."""

    def tokenize(self, texts: str, context_length: int = ..., truncate_text: bool = ...) -> torch.Tensor:
        """Ids of one text, long [1, context_length]."""


class TextImageDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of (caption ids, picture) from a folder of pictures and text files.

    A picture (.png, .jpg, .jpeg, .bmp) belongs to the .txt file of the same name in its own folder, else to the one of
    the same name anywhere below `folder`. A text file holds one caption a line; each reading draws one of them and a
    random square crop, from torch's default random generator: `torch.manual_seed` repeats them, and the workers of a
    DataLoader draw differently. A pair whose picture is broken or whose text is empty is named in the log and another
    takes its place: the next one, or with `shuffle` a random one.

    Args:
        folder: searched with everything below it.
        text_len: ids a caption.
        image_size: side of the pictures, in pixels.
        truncate_captions: cut captions that are too long; otherwise one is an error that names its file.
        resize_ratio: the smallest share of a picture's area that a crop may take, in (0, 1].
        transparent: four channels, RGBA, instead of RGB.
        tokenizer: its `tokenize` makes the ids; default CLIP's (`dalle_fast.tokenizer.tokenizer`).
        shuffle: what takes the place of an unusable pair; it does not change the order.
    Raises: FileNotFoundError (no folder), ValueError (no pair in it, sizes out of range).
    """

    def __init__(
        self,
        folder: str | Path,
        text_len: int = 256,
        image_size: int = 128,
        truncate_captions: bool = False,
        resize_ratio: float = 0.75,
        transparent: bool = False,
        tokenizer: Tokenizes | None = None,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        if text_len < 1 or image_size < 1:
            raise ValueError(
                f"TextImageDataset: text_len and image_size must be at least 1, got {text_len} and {image_size}."
            )
        if not 0 < resize_ratio <= 1:
            raise ValueError(
                f"TextImageDataset: resize_ratio must be in (0, 1], got {resize_ratio}. It is a share of the area."
            )
        if tokenizer is None:
            from dalle_fast.tokenizer import tokenizer as clip_tokenizer  # loads a library that others do not need

            tokenizer = clip_tokenizer
        self.folder = Path(folder)
        self.text_len = text_len
        self.image_size = image_size
        self.truncate_captions = truncate_captions
        self.resize_ratio = resize_ratio
        self.image_mode = "RGBA" if transparent else "RGB"
        self.tokenizer = tokenizer
        self.shuffle = shuffle
        self.text_files, self.image_files = _pairs(self.folder)
        self.keys = sorted(self.image_files)
        self._unusable: set[int] = set()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One pair: ids, long [text_len], and picture, float32 [3 or 4, image_size, image_size] in 0..1.

        Raises: IndexError (no such pair), ValueError (a caption too long; no pair of the folder can be used).
        """
        n_pairs = len(self)
        if not -n_pairs <= index < n_pairs:
            raise IndexError(f"TextImageDataset: the index must be in 0..{n_pairs - 1}, got {index}.")
        index %= n_pairs
        pair = self._read(index)
        if pair is not None:
            return pair
        # One round over the folder at most, so that a folder of broken files ends in an error.
        start = int(torch.randint(n_pairs, ())) if self.shuffle else index + 1
        for other in range(start, start + n_pairs):
            pair = self._read(other % n_pairs)
            if pair is not None:
                return pair
        raise ValueError(
            f"TextImageDataset: the folder must hold a picture that opens and its caption, got {n_pairs} unusable "
            f"pairs in {self.folder}. The log names each file and what is wrong with it."
        )

    def _read(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The pair at `index`, or None where it is unusable; the log names each such file once."""
        if index in self._unusable:
            return None
        key = self.keys[index]
        try:
            captions = read_captions(self.text_files[key])
            picture = self._picture(self.image_files[key])
        except BROKEN as error:
            _LOG.warning("skipped %s: %s: %s", self.image_files[key], type(error).__name__, error)
            self._unusable.add(index)
            return None
        caption = captions[int(torch.randint(len(captions), ()))]
        try:
            ids = self.tokenizer.tokenize(caption, self.text_len, truncate_text=self.truncate_captions)
        except ValueError as error:
            raise ValueError(
                f"TextImageDataset: a caption of {self.text_files[key]} does not fit. {error} "
                "For all captions: truncate_captions=True."
            ) from error
        return ids.squeeze(0), picture

    def _picture(self, path: Path) -> torch.Tensor:
        """A random square crop of a picture, float32 [C, image_size, image_size] in 0..1."""
        with Image.open(path) as opened:
            picture = opened.convert(self.image_mode)
        left, top, side = random_square(picture.width, picture.height, self.resize_ratio)
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return to_tensor(picture).float().div_(255)


def _pairs(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Text files and pictures below `folder` by the name they share: the picture's path in it, without the ending.

    Raises: FileNotFoundError, ValueError (no pair).
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"TextImageDataset: folder must be a folder, found none at {folder}.")
    found, n_files = find_pictures(folder)
    text_files = {key: text for key, _, text in found if text is not None}
    image_files = {key: picture for key, picture, text in found if text is not None}
    if not image_files:
        raise ValueError(
            f"TextImageDataset: folder must hold pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) and .txt files of "
            f"the same names, got {n_files} files and no such pair in {folder}."
        )
    return text_files, image_files
