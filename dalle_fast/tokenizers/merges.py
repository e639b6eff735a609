"""Where the CLIP merges file is: the list of 48,894 byte-pair merges that OpenAI published with CLIP.

It is not part of this package. Several others carry it (clip-anytorch, open_clip_torch, dalle-pytorch); it is read
out of whichever is installed, found by the list of files that its metadata keeps, and that package is never imported.
"""

from __future__ import annotations

import gzip
import os
import zlib
from importlib.metadata import distributions
from pathlib import Path

MERGES_VARIABLE = "DALLE_FAST_CLIP_MERGES"
N_MERGES = 49152 - 256 - 2
_STEM = "bpe_simple_vocab_16e6.txt"
_NAMES = (_STEM, _STEM + ".gz")
_HOW_TO_GET = (
    "Install a package that carries it (the smallest: `pip install --no-deps clip-anytorch`), or give the path of "
    f"{_STEM} or {_STEM}.gz as bpe_path or in the environment variable {MERGES_VARIABLE}."
)


def find_clip_merges() -> Path:
    """The path of the CLIP merges file: the one the environment names, else one that an installed package carries.

    Raises: FileNotFoundError, saying what to install.
    """
    named = os.environ.get(MERGES_VARIABLE)
    if named:
        return Path(named)
    for distribution in distributions():
        # The list of a large package has thousands of lines: parse only one that has the name somewhere.
        listing = distribution.read_text("RECORD") or distribution.read_text("SOURCES.txt") or ""
        if _STEM not in listing:
            continue
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.name in _NAMES and path.is_file():
                return path
    raise FileNotFoundError(
        f"SimpleTokenizer: the CLIP merges file {_STEM} was not found in any installed package. {_HOW_TO_GET}"
    )


def read_clip_merges(path: str | Path) -> list[tuple[str, str]]:
    """The merges of a CLIP merges file, in order of rank.

    Args:
        path: the text file or its gzip; the first line is a heading, then one "left right" pair a line.
    Returns: 48,894 pairs.
    Raises: FileNotFoundError (no file), ValueError (not such a file).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"SimpleTokenizer: bpe_path must be a file, found none at {path}. {_HOW_TO_GET}")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"SimpleTokenizer: bpe_path must be readable UTF-8 text or its gzip, got {path} ({error}). {_HOW_TO_GET}"
        ) from error
    merges = [tuple(line.split()) for line in text.split("\n")[1 : N_MERGES + 1]]
    pairs = [(pair[0], pair[1]) for pair in merges if len(pair) == 2]
    if len(pairs) != N_MERGES:
        raise ValueError(
            f"SimpleTokenizer: bpe_path must hold {N_MERGES} merges, two words a line, got {len(pairs)} in {path}. "
            f"{_HOW_TO_GET}"
        )
    return pairs
