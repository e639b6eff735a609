"""Any file of weights -> a model of ours with its tokenizer: for `convert`, `draw`, `sample` and `train --vae`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle_fast.compat.formats.base import Companions, Description, Format
from dalle_fast.compat.formats.recognise import recognise
from dalle_fast.compat.reading import Stored, read

_TOKENIZER = "tokenizer.json"
_CLIP_VOCABULARY, _CHINESE_VOCABULARY = 49408, 21128


@dataclass(frozen=True)
class Loaded:
    """A model of ours out of a file.

    Attributes:
        model: in evaluation mode, its dtypes those of the file; tensors may be views of the mapped file.
        tokenizer: of a DALLE, with `encode` and `vocab_size`; None: it has none, or none was found.
        problem: why a DALLE has no tokenizer and where people get it, a sentence; "": nothing is missing.
    """

    model: nn.Module
    tokenizer: Any
    description: Description
    problem: str = ""


def describe(path: str | Path) -> tuple[Stored, Description]:
    """What is in a file or directory and what it is.

    Raises: FileNotFoundError, ValueError (unsafe, unreadable, of an unknown layout).
    """
    stored = read(path)
    return stored, recognise(stored).describe(stored)


def load(path: str | Path, companions: Companions | None = None) -> Loaded:
    """The model in a file or directory.

    Where a companion is not named, `tokenizer.json` and, for "x.ckpt", "x.yaml" in the same folder are taken.

    Raises: FileNotFoundError (path, a companion), ValueError (unsafe, unreadable, unknown, a model that we cannot run,
        a companion of another model), NotImplementedError.
    """
    stored = read(path)
    known = recognise(stored)
    description = _runnable(known, stored)
    companions = _with_found(companions or Companions(), stored.path)
    model = known.load(stored, companions)
    if description.kind != "DALLE":
        return Loaded(model, None, description)
    tokenizer, problem = _tokenizer_of(model, companions.tokenizer)
    return Loaded(model, tokenizer, description, problem)


def load_vae(
    path: str | Path,
    *,
    op: str,
    yaml: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The VAE in a saved model's directory, or in weights of another package.

    Args: op: how sentences begin.   yaml: of a VQGAN.   dtype: None: float32.   device: None: the CPU.
    Raises: FileNotFoundError, ValueError, as `load`; TypeError (the model there is no VAE).
    """
    from dalle_fast.models.saving import CONFIG  # at call time: models read old names by compat
    from dalle_fast.models.vae_protocol import check_vae, saved_vae

    where = Path(path)
    if (where / CONFIG).is_file() or not where.exists():
        return saved_vae(where, op=op, dtype=dtype, device=device)
    vae = load(where, Companions(yaml=yaml)).model
    check_vae(vae, op)
    return vae.to(device=device, dtype=dtype or torch.float32)


def _runnable(known: Format, stored: Stored) -> Description:
    description = known.describe(stored)
    if description.problem:
        raise ValueError(
            f"load: {stored.path} must be a model that we can run, got a {known.name}: {description.problem}"
        )
    return description


def _with_found(companions: Companions, path: Path) -> Companions:
    """Those that are named, and for the others what lies beside the file."""
    for name in ("vae", "yaml", "tokenizer"):
        given = getattr(companions, name)
        if given is not None and not given.exists():
            raise FileNotFoundError(f"load: --{name} must be a file or directory, found none at {given}.")
    folder = path if path.is_dir() else path.parent
    if companions.tokenizer is None and (folder / _TOKENIZER).is_file():
        companions = replace(companions, tokenizer=folder / _TOKENIZER)
    if companions.yaml is None and path.is_file() and path.with_suffix(".yaml").is_file():
        companions = replace(companions, yaml=path.with_suffix(".yaml"))
    return companions


# ---------------------------------------------------------------------------------------------------------- tokenizers


def _tokenizer_of(model: Any, named: Path | None) -> tuple[Any, str]:
    """A DALLE's tokenizer, or None and why there is none.

    Raises: ValueError (one of another vocabulary), FileNotFoundError, RuntimeError.
    """
    size = model.num_text_tokens - model.text_seq_len
    if named is not None:
        tokenizer = _read_tokenizer(named)
        if tokenizer.vocab_size > size:
            raise ValueError(
                f"load: the tokenizer must have at most the model's {size} tokens, got {tokenizer.vocab_size} in "
                f"{named}. Name the one that the model was trained with."
            )
        return tokenizer, ""
    try:
        if size in _BY_VOCABULARY:
            return _BY_VOCABULARY[size](), ""
    except (FileNotFoundError, RuntimeError) as error:
        return None, str(error)
    return None, (
        f"load: a model of {size} text tokens needs the tokenizer it was trained with, got none. It is the file "
        "given to its training as --bpe_path: name it with --tokenizer, or put it beside the file as tokenizer.json."
    )


def _clip_tokenizer() -> Any:
    from dalle_fast.tokenizers import SimpleTokenizer

    return SimpleTokenizer()


def _chinese_tokenizer() -> Any:
    from dalle_fast.tokenizers import ChineseTokenizer

    return ChineseTokenizer()


# The original's two tokenizers that need no file of the user's.
_BY_VOCABULARY: dict[int, Callable[[], Any]] = {
    _CLIP_VOCABULARY: _clip_tokenizer,
    _CHINESE_VOCABULARY: _chinese_tokenizer,
}


def _read_tokenizer(path: Path) -> Any:
    """tokenizer.json, CLIP's merges (.txt, .gz), or a folder with vocab.txt."""
    from dalle_fast.tokenizers import ChineseTokenizer, HugTokenizer, SimpleTokenizer

    if path.is_dir():
        return ChineseTokenizer(path)
    if path.suffix in (".txt", ".gz"):
        return SimpleTokenizer(path)
    if path.suffix == ".model":
        raise ValueError(
            f"load: --tokenizer must be a tokenizer.json, CLIP's merges or a folder with vocab.txt, got {path}, which "
            "looks like YouTokenToMe's. Convert it with the tokenizers library."
        )
    return HugTokenizer(path)
