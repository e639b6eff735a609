"""WebDataset shards: tar files whose members of one name, with several endings, are one sample.

The headers of every tar are read once and kept beside it as NAME.tar.index.json (or in memory only, where the folder
cannot be written): where each picture and caption begins and how long it is. So samples are read in any order, one by
one, and shards are ordered like everything else: a permutation of all samples an epoch, the same for any number of
processes and workers, and a resumed run skips nothing by reading it. The usual alternative, shuffled shards read as
streams through a buffer, orders samples by who reads what, and resumes by reading again. The price is a seek a sample,
which the workers hide on local disks; shards behind a URL or a pipe cannot be read so, and are refused.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from dalle_fast.training.data.folders import caption_lines
from dalle_fast.training.data.pictures import PICTURE_SUFFIXES
from dalle_fast.training.data.samples import Skipped, Unusable, readable
from dalle_fast.whole_files import write_whole

INDEX_SUFFIX = ".index.json"
_FORMAT_VERSION = 1
_BLOCK = 512  # a tar is made of these; it ends with two of zeros
_TEXTS = ("txt", "json")
_PICTURES = frozenset(suffix[1:] for suffix in PICTURE_SUFFIXES)

# A sample of an index: key, picture's offset and size, text's offset and size, place of its ending in _TEXTS (or -1).
Row = tuple[str, int, int, int, int, int]


@dataclass(frozen=True)
class ShardIndex:
    """What one tar holds.

    Attributes:
        size, mtime_ns: of the tar that was read.   whole: it has its end.
        bare: captions without a picture.   rows: the pictures, in the tar's order.
    """

    size: int
    mtime_ns: int
    whole: bool
    bare: int
    rows: list[Row]
    format_version: int = _FORMAT_VERSION


def expand(pattern: str) -> list[Path]:
    """The paths of a brace pattern such as `shards/{000..009}.tar`.

    Raises: ValueError (an address or a pipe), FileNotFoundError, RuntimeError (webdataset is not installed).
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"train: shards must be files that can be read anywhere inside, got {pattern}. Fetch them first, or mount "
            "where they lie."
        )
    try:
        from webdataset.shardlists import expand_urls  # part of the extra, only shards need it
    except ModuleNotFoundError as error:
        if error.name != "webdataset":
            raise
        raise RuntimeError("train: shards need the package webdataset. pip install dalle-fast[train]") from None
    paths = [Path(path) for path in expand_urls(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"train: all {len(paths)} shards of {pattern} must be there, {len(missing)} are missing, {missing[0]} the "
            "first. Name those there are."
        )
    return paths


def index_of(path: Path) -> ShardIndex:
    """The index of one tar: the one beside it if it is of the tar as it is, else read anew and put there.

    Raises: ValueError (no tar).
    """
    facts = path.stat()
    beside = path.with_name(path.name + INDEX_SUFFIX)
    with suppress(OSError, ValueError, TypeError):
        index = ShardIndex(**json.loads(beside.read_text(encoding="utf-8")))
        if (index.size, index.mtime_ns, index.format_version) == (facts.st_size, facts.st_mtime_ns, _FORMAT_VERSION):
            return index
    index = _read_headers(path, facts.st_size, facts.st_mtime_ns)
    with suppress(OSError):  # a folder that cannot be written: in memory only
        write_whole(beside, [json.dumps(asdict(index)).encode()], tag=f"{os.getpid()}-", durable=False)
    return index


def _read_headers(path: Path, size: int, mtime_ns: int) -> ShardIndex:
    from webdataset.tariterators import base_plus_ext  # part of the extra, only shards need it

    places: dict[str, dict[str, tuple[int, int]]] = {}
    end, cut = 0, False
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                cut |= member.offset_data + member.size > size
                if member.isfile() and not cut:
                    key, ending = base_plus_ext(member.name)
                    if key is not None:
                        places.setdefault(readable(key), {})[ending.lower()] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        if not places and size and not _starts_like_a_tar(path):
            raise ValueError(
                f"train: a shard must be a plain tar, got {path} ({error}). Unpack one that is compressed."
            ) from None
        cut = True
    rows = [row for key, endings in places.items() if (row := _row(key, endings)) is not None]
    n_texts = sum(not endings.keys().isdisjoint(_TEXTS) for endings in places.values())
    n_pairs = sum(row[5] >= 0 for row in rows)
    return ShardIndex(size, mtime_ns, not cut and _ends_at(path, end), n_texts - n_pairs, rows)


def _row(key: str, endings: dict[str, tuple[int, int]]) -> Row | None:
    picture = next((endings[ending] for ending in endings if ending in _PICTURES), None)
    if picture is None:
        return None
    for kind, ending in enumerate(_TEXTS):
        if ending in endings:
            return (key, *picture, *endings[ending], kind)
    return (key, *picture, 0, 0, -1)


def _starts_like_a_tar(path: Path) -> bool:
    """Whether a file that cannot be read may have been a tar: it has a tar's mark, zeros only, or is cut before."""
    with path.open("rb") as file:
        block = file.read(_BLOCK)
    return len(block) < _BLOCK or block[257:262] == b"ustar" or not any(block)


def _ends_at(path: Path, end: int) -> bool:
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    return len(block) == _BLOCK and not any(block)


class ShardSamples:
    """The samples of many shards: a picture (png, jpg, jpeg, bmp) and a caption (txt, or "caption" in json) each.

    Of a tar that ends early the samples before the break are used; it is named and counted once.

    Args: captioned: leave out pictures without a caption.
    Raises: ValueError (no tar; nothing to train on).
    """

    has_codes = False

    def __init__(self, paths: Sequence[Path], *, captioned: bool) -> None:
        self.paths = list(paths)
        self.skipped = Skipped()
        keys: list[bytes] = []
        places: list[tuple[int, ...]] = []
        for number, path in enumerate(self.paths):
            index = index_of(path)
            if not index.whole:
                what = f"it ends early; its {len(index.rows)} whole samples are used"
                self.skipped.add(str(path), "rest of a shard that ends early", what)
            if index.bare:
                self.skipped.add_many(index.bare, "caption without a picture", f"in {path}")
            rows = [row for row in index.rows if row[5] >= 0 or not captioned]
            if len(rows) < len(index.rows):
                self.skipped.add_many(len(index.rows) - len(rows), "picture without a caption", f"in {path}")
            keys.extend(row[0].encode() for row in rows)
            places.extend((number, *row[1:]) for row in rows)
        if not places:
            raise ValueError(
                f"train: the shards must hold pictures{' with captions' if captioned else ''}, got none in "
                f"{len(self.paths)} of them, {self.paths[0]} the first. List one: tar tf."
            )
        # Arrays, not lists of objects: millions of samples, shared with the workers page by page.
        self._keys = np.array(keys)
        self._places = np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        """The members' name without the ending."""
        return bytes(self._keys[index]).decode()

    def name(self, index: int) -> str:
        """Shard and key."""
        return f"{self.paths[int(self._places[index][0])]}/{self.key(index)}"

    def picture(self, index: int) -> Path | BinaryIO:
        """The picture's bytes."""
        shard, start, size, *_ = self._places[index].tolist()
        return io.BytesIO(self._bytes(shard, start, size))

    def captions(self, index: int) -> list[str]:
        """The lines of its text.

        Raises: Unusable (none, empty, not UTF-8, no "caption" in its json).
        """
        shard, _, _, start, size, kind = self._places[index].tolist()
        if kind < 0:
            raise Unusable("picture without a caption")
        try:
            text = self._bytes(shard, start, size).decode("utf-8-sig")
            found = json.loads(text) if _TEXTS[kind] == "json" else {"caption": text}
        except UnicodeDecodeError as error:
            raise Unusable("caption is not UTF-8", str(error)) from None
        except ValueError as error:
            raise Unusable("caption is no JSON", str(error)) from None
        caption = found.get("caption") if isinstance(found, dict) else None
        parts = caption if isinstance(caption, list) else [caption or ""]
        lines = [line for part in parts for line in caption_lines(str(part))]
        if not lines:
            raise Unusable("empty caption")
        return lines

    def codes(self, index: int) -> Tensor:
        """None are kept."""
        raise TypeError("train: shards of pictures hold no codes. Make some: dalle-fast encode.")

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        with self.paths[shard].open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)
