"""Folders that train_dalle.py writes under DeepSpeed: `<name>-ds-cp`.

    auxiliary.pt                                      what a dalle.pt holds, a sentence in place of the weights
    latest                                            name of the newest step
    global_stepN/mp_rank_00_model_states.pt           module: the weights as they computed, 16 bits under --fp16
    global_stepN/zero_pp_rank_R_mp_rank_00_optim_states.pt    ZeRO 1 and 2: rank R's part of the float32 weights

The float32 weights of a group of parameters are one after the other in one vector, zeros behind them, cut into as many
parts as there were ranks. (ZeRO 1 of older releases cut it into more and dealt them out in turns.) `param_shapes` of
the model states gives names and order. What no group holds (buffers, the frozen VAE) is in the module alone. Of ZeRO 3
the module is empty, and its parts are cut another way: refused.
Source: DeepSpeed's zero_to_fp32.py, for the layout.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_fast.compat.formats.base import Companions, Description, Format
from dalle_fast.compat.formats.dalle_pytorch import describe_dalle, is_dalle, load_dalle
from dalle_fast.compat.reading import Stored, read
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.state_dicts import aliases, some

NAME = "dalle_pytorch DALLE (DeepSpeed folder)"
_AUXILIARY, _LATEST, _MODEL = "auxiliary.pt", "latest", "mp_rank_00_model_states.pt"
_STEP = re.compile(r"global_step(\d+)")
_PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_OF_ZERO_3 = "zero_pp_rank_*_mp_rank_*_model_states.pt"
_FLAT, _DEALT = "single_partition_of_fp32_groups", "local_sub_partitions_of_fp32_groups"
_ZERO_3 = (
    "must be of ZeRO stage 0, 1 or 2, got stage 3, whose weights are cut into pieces that only DeepSpeed puts together."
    " Run the zero_to_fp32.py that it left in the folder, and save what comes of it as `weights` of auxiliary.pt's dict"
)


def checkpoint_in(folder: Path, *, merged: bool = True) -> dict[str, Any]:
    """What a dalle.pt would hold.

    Args: merged: put the float32 weights together; False takes those of the module, for their names and shapes.
    Raises: ValueError (a file is missing, damaged, or of ZeRO 3).
    """
    step = _step(folder)
    auxiliary = read(folder / _AUXILIARY).data
    if not is_dalle(auxiliary):
        raise ValueError(
            f"{folder / _AUXILIARY} must hold hparams and vae_params, got something else. Is it cut short?"
        )
    if _is_zero_3(step):
        raise ValueError(f"{step} {_ZERO_3}.")
    if not (step / _MODEL).is_file():
        raise ValueError(f"{step} must hold {_MODEL}, got none. Copy the folder again, with all its files.")
    states = read(step / _MODEL).data
    module = states.get("module") if isinstance(states, Mapping) else None
    if not isinstance(module, Mapping):
        raise ValueError(f"{step / _MODEL} must hold the module's weights, got none. Is it of DeepSpeed?")
    weights = {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}
    return {**auxiliary, "weights": _merged(step, states, weights) if merged else weights}


# --------------------------------------------------------------------------------------------------------------- files


def _step(folder: Path) -> Path:
    """The folder of the step that `latest` names, or of the last one. Raises ValueError."""
    # what the file says is compared with the folders that are there; no path is made of it
    inside = {path.name: path for path in folder.iterdir() if path.is_dir()}
    if (folder / _LATEST).is_file():
        named = (folder / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if named in inside:
            return inside[named]
    steps = {int(match[1]): path for name, path in inside.items() if (match := _STEP.fullmatch(name))}
    if not steps:
        raise ValueError(f"{folder} must hold folders global_stepN, got none. Copy them there: they are the weights.")
    return steps[max(steps)]


def _is_zero_3(step: Path) -> bool:
    return any(step.glob(_OF_ZERO_3))


def _parts(step: Path) -> list[Path]:
    """Of every rank, in order. Raises ValueError."""
    found: dict[int, Path] = {}
    for path in sorted(step.iterdir()):
        if match := _PART.fullmatch(path.name):
            if match[2] != "00":
                raise ValueError(f"{step} must be of one model on every rank, got {path.name} of a model in parts.")
            found[int(match[1])] = path
    if found and sorted(found) != list(range(len(found))):
        raise ValueError(
            f"{step} must hold the optimiser's states of every rank, got those of ranks {some([*map(str, found)])}. "
            "Copy the others there."
        )
    return [found[rank] for rank in sorted(found)]


# ------------------------------------------------------------------------------------------------------------- merging


def _merged(step: Path, states: Mapping[Any, Any], module: dict[str, Tensor]) -> dict[str, Tensor]:
    """The module's weights, in float32 where it has them in 16 bits and the ranks have them in float32."""
    narrow = any(tensor.is_floating_point() and tensor.dtype.itemsize == 2 for tensor in module.values())
    shapes = _shapes(states.get("param_shapes"))
    parts = _parts(step)
    optimisers = [_optimiser(path) for path in parts] if narrow and shapes else []
    if not optimisers:
        return module
    n_ranks = _ranks(optimisers[0], len(parts))
    if n_ranks != len(parts):
        raise ValueError(
            f"{step} must hold the optimiser's states of {n_ranks} ranks, got those of {len(parts)}. Copy the others "
            "there, or none: then it is loaded in 16 bits."
        )
    _check_shapes(shapes, module, step)
    wide: dict[str, Tensor] = {}
    for number, names in enumerate(shapes):
        of_ranks = [_of_group(path, optimiser, number) for path, optimiser in zip(parts, optimisers, strict=True)]
        wide.update(_unflattened([part for dealt in zip_longest(*of_ranks) for part in dealt], names, step))
    tied = aliases(module)
    wide.update({name: wide[first] for name, first in tied.items() if first in wide and name not in wide})
    return module | wide


def _optimiser(path: Path) -> Mapping[str, Any]:
    data = read(path).data
    optimiser = data.get("optimizer_state_dict") if isinstance(data, Mapping) else None
    if not isinstance(optimiser, Mapping):
        raise ValueError(f"{path} must hold an optimiser's states, got something else. Is it of DeepSpeed?")
    if optimiser.get("zero_stage") == 3:
        raise ValueError(f"{path} {_ZERO_3}.")
    return optimiser


def _of_group(path: Path, optimiser: Mapping[str, Any], number: int) -> list[Tensor]:
    """What a rank has of a group of parameters, one vector or several. Raises ValueError."""
    for key in (_FLAT, _DEALT):
        groups = optimiser.get(key)
        if isinstance(groups, list | tuple) and number < len(groups):
            part = [groups[number]] if key == _FLAT else groups[number]
            if isinstance(part, list | tuple) and all(isinstance(tensor, Tensor) for tensor in part):
                return [tensor.reshape(-1) for tensor in part]
    raise ValueError(f"{path} must hold group {number} of the weights as {_FLAT}, got none. Is it of the same step?")


def _shapes(stored: Any) -> list[Mapping[Any, Any]]:
    """Name -> shape of every group; older releases stored one group without its list, yet older ones nothing."""
    groups = [stored] if isinstance(stored, Mapping) else stored if isinstance(stored, list | tuple) else []
    return [group for group in groups if isinstance(group, Mapping)]


def _check_shapes(shapes: Sequence[Mapping[Any, Any]], module: Mapping[str, Tensor], step: Path) -> None:
    wrong = [
        str(name)
        for group in shapes
        for name, shape in group.items()
        if name not in module or not module[name].numel() or not _is_shape(shape, module[name])
    ]
    if wrong:
        raise ValueError(f"{step}: param_shapes must be those of the module, got others for {some(wrong)}.")


def _is_shape(shape: object, tensor: Tensor) -> bool:
    return isinstance(shape, tuple) and shape == tuple(tensor.shape)


def _ranks(optimiser: Mapping[str, Any], otherwise: int) -> int:
    """How many parts a group was cut into, where it is said."""
    count = optimiser.get("partition_count")
    counts = [n for n in (count if isinstance(count, list | tuple) else [count]) if isinstance(n, int)]
    return max(counts, default=otherwise)


def _unflattened(
    given: Sequence[Tensor | None], shapes: Mapping[str, tuple[int, ...]], step: Path
) -> dict[str, Tensor]:
    """Parameters of one group; those that lie in one part are views of it."""
    parts = [part for part in given if part is not None]
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    ends = [0, *accumulate(part.numel() for part in parts)]
    spare = ends[-1] - sum(sizes)
    # zeros fill a group up to a multiple of two numbers a part; some releases leave them out
    if not 0 <= spare <= 2 * len(parts):
        raise ValueError(
            f"{step} must hold {sum(sizes)} float32 weights of a group, got {ends[-1]}. Are the files of one step?"
        )
    tensors = {}
    for (name, shape), (first, last) in zip(shapes.items(), pairwise([0, *accumulate(sizes)]), strict=True):
        at, behind = bisect_right(ends, first) - 1, bisect_left(ends, last)
        pieces = [part[max(first - ends[i], 0) : last - ends[i]] for i, part in enumerate(parts[at:behind], at)]
        tensors[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(shape)
    return tensors


# -------------------------------------------------------------------------------------------------------------- format


def _matches(stored: Stored) -> bool:
    return stored.container == "directory" and (stored.path / _AUXILIARY).is_file()


def _describe(stored: Stored) -> Description:
    if _is_zero_3(_step(stored.path)):
        return Description("DALLE", NAME, {}, f"it {_ZERO_3}")
    return describe_dalle(checkpoint_in(stored.path, merged=False), NAME)


def _load(stored: Stored, companions: Companions) -> DALLE:
    return load_dalle(checkpoint_in(stored.path), companions, stored.path)


FORMATS = (Format(NAME, _matches, _describe, _load, frozenset()),)
