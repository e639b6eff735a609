"""Pretrained CLIPs as they are found: OpenAI's archives, state dicts, open_clip's files, Hugging Face's directories.

Nothing in a file is run (`dalle_fast.compat.reading`). What no tensor tells comes from a config beside the file or from
the archive's own classes; where neither says which GELU the weights were trained with, the file's name may (`quickgelu`
and `openai`; `open_clip`, `laion` and `datacomp` mean the exact one), and else a warning says what is assumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_fast.clip import configs
from dalle_fast.clip.architecture import is_clip, sizes_of, why_not
from dalle_fast.clip.model import PretrainedCLIP
from dalle_fast.clip.names import to_ours, without_wrappers
from dalle_fast.compat.reading import Node, Stored, read, state_dict_of
from dalle_fast.models.unfilled import unfilled

OPENAI_ARCHIVE, OPENAI, OPEN_CLIP, HUGGING_FACE = (
    "OpenAI CLIP (TorchScript archive)", "OpenAI CLIP state dict", "open_clip", "Hugging Face CLIPModel",
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_INDEX_OF = "{}.index.json"
_OPENAI_BUFFERS = {"input_resolution", "context_length", "vocab_size"}
_QUICK_BY_NAME = {"quickgelu": True, "openai": True, "openclip": False, "laion": False, "datacomp": False}
_DEPTH = 2  # of dicts in dicts that are looked into


@dataclass(frozen=True)
class FoundCLIP:
    """The CLIP in a file or directory, before it is built.

    Attributes:
        weights: tensors under the names of the file.
        said: arguments of PretrainedCLIP that something other than the tensors says.
        problem: why it cannot be built; "": it can, as far as its names tell.
    """

    path: Path
    format: str
    weights: Mapping[str, Tensor]
    said: Mapping[str, Any]
    problem: str


def load(
    path: str | Path,
    *,
    quick_gelu: bool | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> PretrainedCLIP:
    """A pretrained CLIP with a vision transformer, in evaluation mode. Nothing is downloaded.

    Args:
        path: OpenAI's archive (ViT-B-32.pt), its state dict, an open_clip checkpoint (.pt, .bin, .safetensors), or a
            directory of one of these, of Hugging Face's CLIPModel, or of `PretrainedCLIP.save_pretrained`.
        quick_gelu: QuickGELU or the exact one; None: as the file, a config beside it or its name says.
        vision_heads, text_heads: None: the same, or a head for every 64 of the width.
        dtype: None means float32, whatever the file holds.   device: None means the CPU.
    Raises: FileNotFoundError, ValueError (not a CLIP, one with a ResNet or otherwise not of OpenAI's architecture,
        what the reader refuses).
    Warns: UserWarning, where the GELU is assumed.
    """
    directory = Path(path)
    given = {"quick_gelu": quick_gelu, "vision_heads": vision_heads, "text_heads": text_heads}
    given = {name: value for name, value in given.items() if value is not None}
    if is_saved(directory):
        if given:
            raise ValueError(
                f"clip.load: {directory} says itself how it was trained, got {', '.join(given)}. Leave that out."
            )
        return PretrainedCLIP.from_pretrained(directory, dtype=dtype, device=device)
    found = find(read(directory))
    if found is None:
        raise ValueError(
            f"clip.load: path must be a CLIP of OpenAI, open_clip or Hugging Face, got {directory}, which holds none. "
            "`dalle-fast info` says what it is."
        )
    return build(found, **given).to(device=device, dtype=dtype or torch.float32)


def is_saved(directory: Path) -> bool:
    """Whether it is a directory of `PretrainedCLIP.save_pretrained`."""
    config = configs.read_json(directory / configs.HUGGING_FACE)
    return config is not None and config.get("class") == PretrainedCLIP.__name__


def holds_clip(path: Path) -> bool:
    """Whether a file or directory holds a CLIP of OpenAI's architecture, or one that `load` refuses by its kind."""
    if path.is_dir():
        return is_saved(path) or format_of(Stored(path, "directory", {})) is not None
    try:
        return path.is_file() and format_of(read(path)) is not None
    except ValueError:
        return False


def find(stored: Stored) -> FoundCLIP | None:
    """The CLIP in what was read; None where there is none.

    Raises: ValueError (a directory of one whose files cannot be read), FileNotFoundError (one without weights).
    """
    if stored.container == "directory":
        return _in_directory(stored.path)
    inner = _clip_in(stored)
    return None if inner is None else _found(stored, *inner)


def arguments_of(found: FoundCLIP, weights: Mapping[str, Tensor], **given: Any) -> tuple[dict[str, Any], str]:
    """Arguments of PretrainedCLIP for weights under our names, and a sentence on what was assumed ("": nothing).

    Raises: ValueError (not OpenAI's architecture).
    """
    said: dict[str, Any] = {**found.said, **given}
    assumed = ""
    if "quick_gelu" not in said:
        said["quick_gelu"] = found.format != OPEN_CLIP
        openai = ("QuickGELU", "OpenAI's models have")
        kind, whose = openai if said["quick_gelu"] else ("the exact GELU", "most of open_clip's have")
        assumed = (
            f"clip.load: {found.path} does not say which GELU it was trained with: {kind} is assumed, which {whose}. "
            "Pass quick_gelu, or say quickgelu or open_clip in the file's name."
        )
    heads = {name: said.pop(name, None) for name in ("vision_heads", "text_heads")}
    return sizes_of(weights, str(found.path), **heads) | said, assumed


def build(found: FoundCLIP, **given: Any) -> PretrainedCLIP:
    """The model, in evaluation mode, its dtypes those of the file, its tensors views of the file where they can be.

    Raises: ValueError (not OpenAI's architecture).
    """
    if found.problem:
        raise ValueError(f"clip.load: {found.path} must hold a CLIP of OpenAI's architecture, but {found.problem}.")
    weights = to_ours(found.weights)
    arguments, assumed = arguments_of(found, weights, **given)
    if assumed:
        warnings.warn(assumed, stacklevel=3)
    with unfilled():
        model = PretrainedCLIP(**arguments)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def format_of(stored: Stored) -> str | None:
    """Which of the four a file or directory is, by its names alone; None: none of them. Raises nothing."""
    if stored.container == "directory":
        if configs.is_hugging_face(stored.path):
            return HUGGING_FACE
        return OPEN_CLIP if (stored.path / configs.OPEN_CLIP).is_file() else None
    inner = _clip_in(stored)
    return None if inner is None else _format(stored, inner[0], inner[1])


def _format(stored: Stored, weights: Mapping[str, Tensor], wrapped: bool) -> str:
    if any(without_wrappers(name).startswith("vision_model.") for name in weights):
        return HUGGING_FACE
    if stored.container == "torchscript":
        return OPENAI_ARCHIVE
    return OPEN_CLIP if wrapped or (stored.path.parent / configs.OPEN_CLIP).is_file() else OPENAI


def _clip_in(stored: Stored) -> tuple[dict[str, Tensor], bool, Node | None] | None:
    try:
        return next(_clips_in(stored.data, False, _DEPTH), None)
    except ValueError:
        return None


def _found(stored: Stored, weights: Mapping[str, Tensor], wrapped: bool, module: Node | None) -> FoundCLIP:
    """The CLIP of a file."""
    path, said = stored.path, dict[str, Any]()
    problem, name = why_not(weights) or "", _format(stored, weights, wrapped)
    if name == HUGGING_FACE:
        if configs.is_hugging_face(path.parent):
            said = configs.of_hugging_face(path.parent, _vocabulary(weights))
        return FoundCLIP(path, name, weights, said, problem)
    is_openai = name == OPENAI_ARCHIVE or bool(_OPENAI_BUFFERS & set(weights))
    if not problem and not is_openai:
        said = configs.of_open_clip(path.parent)
    quick = _by_classes(module)
    if quick is None:
        quick = True if is_openai else _by_name(path)
    if quick is not None:
        said.setdefault("quick_gelu", quick)
    return FoundCLIP(path, name, weights, said, problem)


def _in_directory(directory: Path) -> FoundCLIP | None:
    """The CLIP of a directory of Hugging Face or open_clip."""
    kind = format_of(Stored(directory, "directory", {}))
    if kind is None:
        return None
    names = _WEIGHTS if kind == HUGGING_FACE else _OPEN_CLIP_WEIGHTS
    for name in names:
        if (directory / name).is_file():
            found = find(read(directory / name))
            if found is None:
                raise ValueError(f"clip.load: {directory / name} must hold the tensors of a CLIP, got none of them.")
            return found
        if (directory / _INDEX_OF.format(name)).is_file():
            return _in_shards(directory, directory / _INDEX_OF.format(name))
    raise FileNotFoundError(f"clip.load: {directory} must hold {' or '.join(names)}, got neither. Copy it there.")


def _in_shards(directory: Path, index: Path) -> FoundCLIP | None:
    """A CLIP of Hugging Face in several files."""
    listed = (configs.read_json(index) or {}).get("weight_map")
    shards = sorted(set(listed.values())) if isinstance(listed, dict) else []
    if not shards or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
        raise ValueError(f"clip.load: {index} must map names to files beside it, got something else. Copy it again.")
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights.update(state_dict_of(read(directory / shard).data))
    return find(Stored(directory / _WEIGHTS[0], "safetensors", weights))


def _clips_in(data: Any, wrapped: bool, depth: int) -> Iterator[tuple[dict[str, Tensor], bool, Node | None]]:
    """(tensors, whether a training script wrapped them, the module they are of) of every CLIP in dicts and modules."""
    if isinstance(data, Node):
        tensors = state_dict_of(data)
    elif isinstance(data, Mapping):
        tensors = {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, Tensor)}
    else:
        return
    if is_clip(tensors):
        apart = any(name.startswith(("module.", "text.")) for name in tensors)
        yield tensors, wrapped or apart, data if isinstance(data, Node) else None
    elif depth and isinstance(data, Mapping):
        for name, value in data.items():
            yield from _clips_in(value, name == "state_dict", depth - 1)


def _by_classes(module: Node | None) -> bool | None:
    """Whether the modules of a model that was saved whole are named QuickGELU (True) or GELU (False); None: neither."""
    todo: list[Any] = [module]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Node):
            name = value.name.rsplit(".", 1)[-1]
            if name in ("QuickGELU", "GELU"):
                return name == "QuickGELU"
            todo.append(value.state)
        elif isinstance(value, Mapping):
            todo += value.values()
    return None


def _by_name(path: Path) -> bool | None:
    for name in (path.name, path.absolute().parent.name):
        plain = name.lower().replace("-", "").replace("_", "")
        for word, quick in _QUICK_BY_NAME.items():
            if word in plain:
                return quick
    return None


def _vocabulary(weights: Mapping[str, Tensor]) -> int:
    table = next((t for name, t in weights.items() if name.endswith("token_embedding.weight")), None)
    return len(table) if table is not None and table.dim() else 0
