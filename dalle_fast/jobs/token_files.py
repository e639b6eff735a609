"""What is stored of drawings: the codes and scores of a chunk, and known codes, as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dalle_fast.jobs.job import DrawnChunk

KNOWN = "known.safetensors"


def chunk_name(chunk: int) -> str:
    """The file of a chunk."""
    return f"tokens-{chunk:06d}.safetensors"


def chunk_to_bytes(drawn: DrawnChunk) -> bytes:
    """The file of a chunk: "tokens" [b, n], int16 where all of them fit and int32 elsewhere, and "scores" [b]."""
    fits = drawn.tokens.numel() == 0 or int(drawn.tokens.max()) <= torch.iinfo(torch.int16).max
    tensors = {"tokens": drawn.tokens.to("cpu", torch.int16 if fits else torch.int32).contiguous()}
    if drawn.scores is not None:
        tensors["scores"] = drawn.scores.to("cpu", torch.float32).contiguous()
    # One key alone: the order in which safetensors writes several is left to chance.
    return save(tensors, metadata={"backend": drawn.backend})


def read_chunk(path: Path, chunk: int) -> DrawnChunk:
    """What `chunk_to_bytes` made, without pixels.

    Raises: FileNotFoundError, ValueError (the file is not whole).
    """
    try:
        with safe_open(path, "pt") as file:
            tokens = file.get_tensor("tokens").long()
            scores = file.get_tensor("scores") if "scores" in file.keys() else None  # noqa: SIM118
            return DrawnChunk(chunk, tokens, scores, None, file.metadata()["backend"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise _broken(path, str(error)) from None


def check_chunk(path: Path, rows: int, scored: bool) -> None:
    """Checks by its header that a file holds a chunk of so many rows, with scores or without.

    Raises: ValueError (it does not, or is cut short).
    """
    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise _broken(path, str(error)) from None
    tokens = shapes.get("tokens", [])
    if len(tokens) != 2 or tokens[0] != rows:
        raise _broken(path, f"tokens {tokens} instead of [{rows}, codes of a picture]")
    if shapes.get("scores") != ([rows] if scored else None):
        raise _broken(path, f"scores {shapes.get('scores')} instead of {[rows] if scored else None}")
    if "backend" not in metadata:
        raise _broken(path, "no backend")


def known_to_bytes(known: Tensor) -> bytes:
    """Known codes [n], -1 where they are drawn, as a file."""
    return save({"known": known.to("cpu", torch.int32).contiguous()})


def read_known(folder: Path) -> Tensor | None:
    """The known codes of the job in a folder, int64 [n]; None where all are drawn.

    Raises: ValueError (the file is not whole).
    """
    path = folder / KNOWN
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("known").long()
    except SafetensorError as error:
        raise _broken(path, str(error)) from None


def _broken(path: Path, got: str) -> ValueError:
    return ValueError(f"sample: {path} must be whole, as it was written, got {got}. Remove it, and run the job again.")
