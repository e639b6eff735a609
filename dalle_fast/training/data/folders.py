"""Pictures with captions in a folder, paired as the original's trainers pair them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from dalle_fast.training.data.pictures import PICTURE_SUFFIXES
from dalle_fast.training.data.samples import Skipped, Unusable, readable

_INDEX = "index.json"


def find_pictures(folder: Path) -> tuple[list[tuple[str, Path, Path | None]], int]:
    """Every picture (.png, .jpg, .jpeg, .bmp) below `folder` with its text file, sorted by key.

    A picture belongs to the .txt file of the same name in its own folder, else to the one of the same name anywhere
    below `folder`. The key is the picture's path in it, without the ending.

    Returns: (key, picture, text file or None) of each; how many files there are.
    """
    files = sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    texts_by_stem = {path.stem: path for path in texts.values()}
    found = []
    for picture in files:
        if picture.suffix.lower() in PICTURE_SUFFIXES:
            text = texts.get(picture.with_suffix(""), texts_by_stem.get(picture.stem))
            found.append((picture.relative_to(folder).with_suffix("").as_posix(), picture, text))
    return sorted(found), len(files)


def read_captions(path: Path) -> list[str]:
    """The captions of a text file, one a line.

    Raises: OSError, ValueError (not UTF-8, no caption).
    """
    captions = caption_lines(path.read_text(encoding="utf-8-sig"))
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions


def caption_lines(text: str) -> list[str]:
    """The captions of a text, one a line; blank lines are none."""
    return [line for line in text.split("\n") if line.strip()]


class FolderSamples:
    """The pictures of a folder as `find_pictures` finds them.

    In a folder that `dalle-fast data emoji` wrote, the variants by skin tone are left out: they outnumber the rest.

    Args: captioned: leave out pictures without a text file.
    Raises: FileNotFoundError (no folder), ValueError (nothing to train on).
    """

    has_codes = False

    def __init__(self, folder: Path, *, captioned: bool) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"train: the data must be a folder or shards (.tar), found nothing at {folder}.")
        self.folder = folder
        self.skipped = Skipped()
        found, n_files = find_pictures(folder)
        self._files = self._kept(found, captioned)
        if not self._files:
            endings = ", ".join(sorted(PICTURE_SUFFIXES))
            wanted = f"pictures ({endings})" + (" and .txt files of the same names" if captioned else "")
            tars = f"shards as {folder}/{{000..009}}.tar" if any(folder.glob("*.tar")) else "the folder above them"
            raise ValueError(
                f"train: the folder must hold {wanted}, got {n_files} files, {len(found)} of them pictures, in "
                f"{folder}. Name {tars}."
            )

    def _kept(self, found: list[tuple[str, Path, Path | None]], captioned: bool) -> list[tuple[str, Path, Path | None]]:
        toned = _skin_tones(self.folder)
        if toned:
            plain = [row for row in found if row[0] not in toned]
            if len(plain) < len(found):
                self.skipped.add_many(len(found) - len(plain), "variant by skin tone", min(toned))
            found = plain
        bare = [picture for _, picture, text in found if text is None]
        if captioned and bare:
            self.skipped.add_many(len(bare), "picture without a caption", str(bare[0]))
            found = [row for row in found if row[2] is not None]
        return found

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """The picture's path in the folder, without the ending."""
        return readable(self._files[index][0])

    def name(self, index: int) -> str:
        """The picture's path."""
        return readable(str(self._files[index][1]))

    def picture(self, index: int) -> Path | BinaryIO:
        """The picture's path."""
        return self._files[index][1]

    def captions(self, index: int) -> list[str]:
        """The lines of its text file.

        Raises: Unusable (no text file, empty, not UTF-8).
        """
        text = self._files[index][2]
        if text is None:
            raise Unusable("picture without a caption")
        try:
            return read_captions(text)
        except UnicodeDecodeError as error:
            raise Unusable("caption is not UTF-8", f"{text}: {error}") from None
        except OSError as error:
            raise Unusable("caption does not open", str(error)) from None
        except ValueError as error:
            raise Unusable("empty caption", str(error)) from None

    def codes(self, index: int) -> Tensor:
        """None are kept."""
        raise TypeError("train: a folder of pictures holds no codes. Make some: dalle-fast encode.")


def _skin_tones(folder: Path) -> Collection[str]:
    """Stems of the emoji with a skin tone, where the folder has the index that `dalle-fast data emoji` writes."""
    try:
        rows = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "skin_tone" in row for row in rows):
        return ()
    return frozenset(row["stem"] for row in rows if row["skin_tone"] and "stem" in row)
