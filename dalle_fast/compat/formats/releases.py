"""What a DALLE of dalle_pytorch tells of the release that wrote it: how it was built, and whether it can run here.

Since 1.1.6 a file names its release. Before, the tensors tell:

    0.5.0 - 0.6.0   norm.g: other norms than LayerNorm                            not run
    before 0.8.0    no LayerScale                                                 not run
    0.8.0 - 0.8.3   text_emb without rows for padding ids: padding is masked      not run
    0.9.x           logits_mask is stored
    0.12.1 - .4     to_logits.1 is the norm, to_logits.2 the head
    1.0.5 - 1.1.1   pos_emb (1, 1, n, rot), since 1.1.2 (1, n + 1, rot)
    from 1.4.0      one wrapper more around attention, for its cache

Constructor defaults changed too (token shift in 1.0.0, not in 1.0.1, again in 1.0.5; rotary positions in 1.0.5), and
older files hold neither `shift_tokens` nor `rotary_emb`: names decide, not today's defaults. From 0.9.0 on all releases
compute the same of the same arguments but for one kind of layer: before 1.5.0 the window of `conv_like` lies around the
query (what follows it is masked), since then up and left of it. The row that positions of 1.0.5 - 1.1.1 lack is that of
a token that is never read.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from dalle_fast import patterns
from dalle_fast.compat.formats.base import rows_of
from dalle_fast.compat.names import Wrapping, block_layouts, wrapping_of
from dalle_fast.compat.nodes import shortened
from dalle_fast.layout import TokenLayout
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.rotary import rotary_angles
from dalle_fast.models.state_dicts import some
from dalle_fast.models.transformer import ROTARY_DTYPES

_OTHER_ANGLES = "its rotary positions (transformer.pos_emb) are not those of dalle_pytorch: a fork's?"
_LAYER = re.compile(r"transformer\.layers\.(?:layers|blocks)\.(\d+)\.")
TYPES = ("full", "sparse", "axial_row", "axial_col", "conv_like")
CENTRED_CONV = "paper_conv kernel=5 wrap=none"  # conv_like before 1.5.0
_UP_LEFT_SINCE = (1, 5)
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})[.+\w-]{0,40}", re.ASCII)
_LEAST_TENSORS = 8  # of a layer's 13: a name or two may be missing, and strict loading says which
_MOST_POSITIONS = 1 << 16  # of text and image: masks of layers are made for them
_BEFORE_LAYER_SCALE = (
    "releases before 0.8.0 have no LayerScale, and 0.5.0 to 0.6.0 other norms. Run it with its release"
)
_NO_PADDING_IDS = (
    "releases before 0.9.0 have no ids for padding and hide it from attention instead, which cannot be said to a model"
    " of later ones. Train it on with 0.9.0"
)


@dataclass(frozen=True)
class Built:
    """How a model was built.

    Attributes:
        release: "1.6.6", or a range: "1.0.5 to 1.1.1".
        arguments: of our DALLE.
        grid: rows and columns of image tokens.   num_image_tokens: codes of its VAE.
        problem: why it cannot run here with equal numbers, a sentence; "": it can.
    """

    release: str
    arguments: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] = (0, 0)
    num_image_tokens: int = 0
    problem: str = ""


def built(hparams: Mapping[str, Any], weights: Mapping[str, Tensor], version: object = None) -> Built:
    """How the model of a DALLE file was built.

    Args: hparams, weights, version: what the file holds under these names.
    Raises: ValueError (tensors that belong to no DALLE, or contradict each other).
    """
    check_contents(hparams, weights)
    said_version = version if isinstance(version, str) and _VERSION.fullmatch(version) else ""
    wrapping = wrapping_of(weights).get("transformer.")
    if wrapping is None:
        raise ValueError("dalle_pytorch: weights must hold transformer.layers, got none. Is the file a DALLE?")
    if problem := _too_old(weights):
        return Built("before 0.8.0", dict(hparams), problem=problem)
    text_len = _count(hparams, "text_seq_len", 256) + 1
    vocabulary = _count(hparams, "num_text_tokens", 10000)
    if "text_emb.weight" in weights and rows_of(weights["text_emb.weight"]) == vocabulary:
        return Built("0.8.0 to 0.8.3", dict(hparams), problem=_NO_PADDING_IDS)
    release = said_version or _release(weights, wrapping)
    grid = _grid(weights, text_len)
    num_image_tokens = len(_head(weights)) - vocabulary - (text_len - 1)
    arguments = {
        **hparams,
        "reversible": wrapping.reversible,
        "shift_tokens": wrapping.shift_tokens,
        "rotary_emb": "transformer.pos_emb" in weights,
        "sandwich_norm": any(name.startswith("transformer.") and ".norm_out." in name for name in weights),
        "share_input_output_emb": "text_emb.linear.weight" in weights,
    }
    problem = _refused(arguments)
    if not problem:
        _check_sizes(arguments, weights, num_image_tokens)
        rounded_to = _rounded_to(weights, arguments, text_len, grid)
        arguments["rotary_dtype"] = rounded_to
        problem = "" if rounded_to else _OTHER_ANGLES
    if not problem:
        layouts = block_layouts(weights)
        centred = _centred(said_version, wrapping)
        arguments["attn_types"], problem = _types(arguments, layouts, centred, text_len, grid)
    return Built(release, arguments, grid, num_image_tokens, problem)


def check_contents(hparams: Mapping[Any, Any], weights: Mapping[Any, Any]) -> None:
    """Raises ValueError where hparams are no arguments, or weights no tensors by name."""
    for name, value in hparams.items():
        items = value if isinstance(value, list | tuple) else [value]
        # (means, stds) of a VAE's normalization are nested
        items = [inner for item in items for inner in (item if isinstance(item, list | tuple) else [item])]
        if not isinstance(name, str) or not all(
            item is None or isinstance(item, bool | int | float | str) for item in items
        ):
            raise ValueError(
                "dalle_pytorch: hparams must be numbers, words and lists of them, got "
                f"{shortened(name)} = {shortened(value)}."
            )
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.numel():
            raise ValueError(
                "dalle_pytorch: weights must be tensors with values, by name, got "
                f"{list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__} as {shortened(name)}."
            )


# ------------------------------------------------------------------------------------------------------ which release


def _too_old(weights: Mapping[str, Tensor]) -> str:
    names = [name for name in weights if name.startswith("transformer.layers.")]
    if any(name.endswith("norm.g") for name in names) or not any(name.endswith(".scale") for name in names):
        return _BEFORE_LAYER_SCALE
    return ""


def _release(weights: Mapping[str, Tensor], wrapping: Wrapping) -> str:
    positions = weights.get("transformer.pos_emb")
    if wrapping.wrappers in ((5, 4), (3, 2)):
        return "1.4.0 or later"
    if positions is not None:
        return "1.0.5 to 1.1.1" if positions.dim() == 4 else "1.1.2 to 1.1.5"
    if "logits_mask" in weights:
        return "0.9.0 to 0.9.6"
    if "to_logits.2.weight" in weights:
        return "0.12.1 to 0.12.4"
    return "1.0.0 to 1.1.5" if wrapping.shift_tokens else "0.10.0 to 1.1.5"


def _centred(version: str, wrapping: Wrapping) -> bool:
    """Whether windows of conv_like lie around the query."""
    if match := _VERSION.fullmatch(version):
        return (int(match[1]), int(match[2])) < _UP_LEFT_SINCE
    return wrapping.wrappers not in ((5, 4), (3, 2))  # no version: before 1.1.6, or taken out of a later file


# -------------------------------------------------------------------------------------------------- what tensors tell


def _head(weights: Mapping[str, Tensor]) -> Tensor:
    """[text ids, padding included, and codes, dim]. Raises ValueError."""
    head = weights.get("to_logits.2.weight", weights.get("to_logits.1.weight"))
    if head is None or head.dim() != 2:
        raise ValueError("dalle_pytorch: weights must hold the head, to_logits.1.weight, got none. Is the file whole?")
    return head


def _grid(weights: Mapping[str, Tensor], text_len: int) -> tuple[int, int]:
    """Rows and columns of image tokens, no more than a model has. Raises ValueError."""
    rows, cols = _rows_and_columns(weights, text_len)
    if text_len + rows * cols > _MOST_POSITIONS:
        raise ValueError(
            f"dalle_pytorch: a model must have at most {_MOST_POSITIONS} positions, got {text_len} of text and a grid "
            f"of {rows} x {cols}. Is it such a file?"
        )
    return rows, cols


def _rows_and_columns(weights: Mapping[str, Tensor], text_len: int) -> tuple[int, int]:
    positions = weights.get("transformer.pos_emb")
    if positions is not None:
        n = (positions.shape[-2] if positions.dim() > 1 else 0) + (positions.dim() == 4) - text_len
        side = math.isqrt(max(n, 0))
        if side < 1 or side * side != n:
            raise ValueError(
                f"dalle_pytorch: transformer.pos_emb must have a row for {text_len} text tokens and a square of image"
                f" tokens, got {list(positions.shape)}. Do hparams and weights belong together?"
            )
        return side, side
    sizes = []
    for axis in (0, 1):
        names = (f"image_pos_emb.weights.{axis}", f"image_pos_emb.weights_{axis}")
        axial = next((weights[name] for name in names if name in weights), None)
        if axial is None or axial.dim() < 2:
            raise ValueError(
                "dalle_pytorch: weights must hold transformer.pos_emb or image_pos_emb, got neither. Is the file whole?"
            )
        sizes.append(axial.shape[:-1].numel())
    return sizes[0], sizes[1]


def _check_sizes(arguments: Mapping[str, Any], weights: Mapping[str, Tensor], num_image_tokens: int) -> None:
    """Raises ValueError where hparams say another size than the tensors have, before it is built."""
    layers = Counter(match[1] for name in weights if (match := _LAYER.match(name)))
    found = {"dim": _head(weights).shape[1], "depth": sum(n >= _LEAST_TENSORS for n in layers.values())}
    said: dict[str, object] = {name: arguments[name] for name in found}
    projection = next((tensor for name, tensor in weights.items() if name.endswith(".to_qkv.weight")), None)
    if projection is not None:
        found["heads * dim_head"] = rows_of(projection) // 3
        said["heads * dim_head"] = _count(arguments, "heads", 8) * _count(arguments, "dim_head", 64)
    for name, tensor, size in (
        ("text_seq_len + 1", "text_pos_emb.weight", _count(arguments, "text_seq_len", 256) + 1),
        ("codes", "image_emb.weight", num_image_tokens),
    ):
        if tensor in weights:
            found[name], said[name] = rows_of(weights[tensor]), size
    for name, size in found.items():
        if said[name] != size:
            raise ValueError(
                f"dalle_pytorch: hparams must be those of the weights, got {name} = {shortened(said[name])} and"
                f" weights of {size}. Do they belong together?"
            )


def _refused(arguments: Mapping[str, Any]) -> str:
    known = inspect.signature(DALLE.__init__).parameters
    unknown = [name for name in arguments if name not in known or name in ("self", "vae")]
    missing = [name for name in ("dim", "depth") if name not in arguments]
    if unknown or missing:
        return f"hparams must be the arguments of a DALLE; unknown: {some(unknown)}; missing: {some(missing)}"
    if arguments["shift_tokens"] is None:
        return "its layers are wrapped as in no release: whether it was trained with token shift cannot be told"
    return ""


def _rounded_to(
    weights: Mapping[str, Tensor], arguments: Mapping[str, Any], text_len: int, grid: tuple[int, int]
) -> str | None:
    """What rotary positions were rounded to; None: they are others than ours, which are computed and not read.

    A model that the original held in 16 bits has rounded ones, in training and wherever its file is read.
    """
    stored = weights.get("transformer.pos_emb")
    if stored is None:
        return "float32"
    dim_head = _count(arguments, "dim_head", 64)
    if not stored.is_floating_point() or stored.shape[-1] != 6 * (dim_head // 6):
        return None
    ours = rotary_angles(TokenLayout(text_len, grid), dim_head)[: stored.shape[-2]]
    if stored.flatten(0, -2).shape != ours.shape:
        return None
    stored = stored.flatten(0, -2).float()
    rounded = {name: ours.to(getattr(torch, name)).float() for name in ROTARY_DTYPES}
    nearest = min(rounded, key=lambda name: float((stored - rounded[name]).abs().nan_to_num(math.inf).max()))
    close = 8 * torch.finfo(getattr(torch, nearest)).eps
    return nearest if torch.allclose(stored, rounded[nearest], rtol=close, atol=close) else None


# ---------------------------------------------------------------------------------------------------- kinds of layers


def _types(
    arguments: Mapping[str, Any], layouts: Mapping[int, Tensor], centred: bool, text_len: int, grid: tuple[int, int]
) -> tuple[tuple[str, ...] | None, str]:
    """Our attn_types, and what is wrong with theirs."""
    given = arguments.get("attn_types")
    if given is None:
        return None, ""
    types = tuple(given) if isinstance(given, list | tuple) else (given,)
    if unknown := [str(name) for name in types if name not in TYPES]:
        what = "gMLP layers in place of attention" if "mlp" in unknown else f"layers of the kind {some(unknown)}"
        return types, f"it has {what}, which there are none of here"
    if centred:
        types = tuple(CENTRED_CONV if name == "conv_like" else name for name in types)
    if "sparse" not in types or not layouts:
        return types, ""
    of_layers = list(islice(cycle(types), _count(arguments, "depth", 1)))
    for layer, layout in layouts.items():
        if layer >= len(of_layers) or of_layers[layer] != "sparse":
            return types, f"layer {layer} has a layout of blocks and attn_types do not call it sparse"
        if layout.dim() != 3 or not (layout == layout[:1]).all():
            return types, f"the heads of layer {layer} attend to different blocks, which our kernels cannot"
        of_layers[layer] = _sparse(layout[0], text_len, grid)
    return tuple(of_layers), ""


def _sparse(layout: Tensor, text_len: int, grid: tuple[int, int]) -> str:
    """A layer of blocks as attn_types says it. Raises ValueError (another number of blocks than inputs have)."""
    block = -(-(text_len - 1 + grid[0] * grid[1]) // len(layout))
    pattern = patterns.make("block_sparse", text_len=text_len, grid=grid, block=block, layout=layout.bool())
    return " ".join(["sparse", *pattern.spec.split(" ")[3:]])


def _count(hparams: Mapping[str, Any], name: str, default: int) -> int:
    """An argument that is a number of at least 1. Raises ValueError."""
    value = hparams.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"dalle_pytorch: hparams must have {name} of at least 1, got {shortened(value)}. Is it such a file?"
        )
    return value
