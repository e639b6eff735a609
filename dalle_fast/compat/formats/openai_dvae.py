"""OpenAI's discrete VAE: `encoder.pkl` and `decoder.pkl`, two whole modules of the package dall_e, and their tensors.

    theirs (enc. | dec.)blocks.<place>.(w | b)          ours (encoder. | decoder.)<place>.(weight | bias)
      input                                               input; of the decoder: codebook.weight [K, D], input.bias [D]
      group_G.block_B.id_path                             group_G.block_B.shortcut
      group_G.block_B.res_path.conv_N                     group_G.block_B.convs.(N - 1)
      output.conv                                         output

Each file is half of a model: the other one is looked for beside it. What the pickles say of code is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_fast.compat.formats.base import Companions, Description, Format
from dalle_fast.compat.reading import Node, Stored, read, state_dict_of
from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE, Sizes
from dalle_fast.models.saving import PathLike
from dalle_fast.models.state_dicts import some
from dalle_fast.models.unfilled import unfilled

CACHE = Path("~/.cache/dalle")  # where the original's class keeps them
_SOURCE = "https://cdn.openai.com/dall-e/"
_FILES = {"encoder": "encoder.pkl", "decoder": "decoder.pkl"}
_OTHER = {"encoder": "decoder", "decoder": "encoder"}
_SHORT = {"encoder": "enc.", "decoder": "dec."}
_CLASSES = {"encoder": "dall_e.encoder.Encoder", "decoder": "dall_e.decoder.Decoder"}
_THEIRS = re.compile(r"(?P<part>enc|dec)\.blocks\.(?P<place>.+)\.(?P<kind>[wb])")
_PLACES = (
    (re.compile(r"(group_\d+\.block_\d+)\.id_path"), r"\1.shortcut"),
    (re.compile(r"output\.conv"), "output"),
    (re.compile(r"input"), "input"),
)
_CONV = re.compile(r"(group_\d+\.block_\d+)\.res_path\.conv_(\d+)")
_FIRST = "blocks.input.w"
_LEAST_OF_BLOCK = 2 * 4 * 8  # tensors: one block in each group of both parts, four convolutions each


# ---------------------------------------------------------------------------------------------------------- tensors


def our_names(state_dict: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Takes the original's tensors below `prefix` out of `state_dict` and gives them back under our names.

    Names that are neither stay, for strict loading to report.
    """
    renamed: dict[str, Tensor] = {}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        match = _THEIRS.fullmatch(name[len(prefix) :])
        if match and (ours := _our_name(**match.groupdict())):
            tensor = state_dict.pop(name)
            if ours == "codebook.weight" and tensor.dim() == 4:
                # A 1x1 convolution of one-hot codes picks columns of its weight: here they are rows.
                tensor = tensor.flatten(1).T.contiguous()
            renamed[prefix + ours] = tensor
    return renamed


def _our_name(part: str, place: str, kind: str) -> str | None:
    whole, leaf = {"enc": "encoder", "dec": "decoder"}[part], {"w": "weight", "b": "bias"}[kind]
    if (part, place, kind) == ("dec", "input", "w"):
        return "codebook.weight"
    if conv := _CONV.fullmatch(place):
        return f"{whole}.{conv[1]}.convs.{int(conv[2]) - 1}.{leaf}"
    for pattern, ours in _PLACES:
        if match := pattern.fullmatch(place):
            return f"{whole}.{match.expand(ours)}.{leaf}"
    return None


def sizes_of(tensors: Mapping[str, Tensor]) -> Sizes:
    """The model's sizes, of its tensors under our names. Raises: ValueError (those that tell are missing, or odd)."""
    try:
        hidden_dim, channels = tensors["encoder.input.weight"].shape[:2]
        num_tokens, codebook_dim = tensors["codebook.weight"].shape
        blocks = {name.split(".")[2] for name in tensors if name.startswith("encoder.group_1.block_")}
        if _LEAST_OF_BLOCK * len(blocks) > len(tensors):
            raise ValueError(f"{len(tensors)} tensors for groups of {len(blocks)} blocks")
        return Sizes(num_tokens, channels, hidden_dim, codebook_dim, len(blocks))
    except (KeyError, ValueError) as error:
        raise ValueError(
            "OpenAIDiscreteVAE: the tensors must be those of encoder.pkl and decoder.pkl, got others "
            f"({error}); the first are {some(list(tensors))}."
        ) from None


def openai_dvae_from(state_dict: Mapping[str, Tensor], *, image_size: int = 256) -> OpenAIDiscreteVAE:
    """The model of a state dict under the original's names (`enc.blocks...`, `dec.blocks...`) or ours.

    Returns: it holds the very tensors, frozen, in evaluation mode.
    Raises: ValueError (tensors missing, unknown or of another shape).
    """
    tensors = dict(state_dict)
    tensors.update(our_names(tensors))
    sizes = sizes_of(tensors)
    with unfilled():
        model = OpenAIDiscreteVAE(from_scratch=True, image_size=image_size, **vars(sizes))
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ValueError(
            "OpenAIDiscreteVAE: the tensors must be those of encoder.pkl and decoder.pkl; "
            f"missing: {some(missing)}; unknown: {some(unknown)}. Give both files, whole."
        )
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------------ files


def read_parts(encoder_path: PathLike | None = None, decoder_path: PathLike | None = None) -> dict[str, Tensor]:
    """The tensors of both files under our names; None: the file in the original's cache.

    Raises: FileNotFoundError (a missing file, and where people get it), ValueError (another file, e.g. both the same).
    """
    tensors: dict[str, Tensor] = {}
    for part, given in (("encoder", encoder_path), ("decoder", decoder_path)):
        path = CACHE.expanduser() / _FILES[part] if given is None else Path(given)
        if not path.is_file():
            raise FileNotFoundError(
                f"OpenAIDiscreteVAE: {part}_path must be an existing file, got {path}, which is not there. Nothing is "
                f"downloaded here: get it from {_SOURCE}{_FILES[part]}, put it there or name it with {part}_path=."
            )
        tensors |= _tensors_of(read(path), part)
    return tensors


def _tensors_of(stored: Stored, part: str) -> dict[str, Tensor]:
    """Of one file, under our names. Raises: ValueError (it holds something else than that part)."""
    found = _part_of(stored)
    if found != part:
        what = "something else" if found is None else f"the {found}"
        raise ValueError(
            f"OpenAIDiscreteVAE: {stored.path} must hold the {part} of OpenAI's dVAE, got {what}. "
            f"It is the file that is called {_FILES[part]}."
        )
    return our_names({_SHORT[part] + name: tensor for name, tensor in state_dict_of(stored.data).items()})


def _part_of(stored: Stored) -> str | None:
    """ "encoder" or "decoder", of a whole module or of its state dict; None of anything else."""
    if isinstance(stored.data, Node):
        return next((part for part, name in _CLASSES.items() if stored.data.name == name), None)
    if isinstance(stored.data, dict) and isinstance(first := stored.data.get(_FIRST), Tensor) and first.dim() == 4:
        return "encoder" if first.shape[-1] > 1 else "decoder"
    return None


def _other_file(stored: Stored, part: str, companions: Companions) -> Path:
    """The file with the other half: the companion, or beside this one under its usual name."""
    return companions.vae or stored.path.with_name(_FILES[_OTHER[part]])


# ---------------------------------------------------------------------------------------------------------- formats


def _describe_part(stored: Stored) -> Description:
    part = _part_of(stored)
    assert part is not None
    other = _other_file(stored, part, Companions())
    tensors = state_dict_of(stored.data)
    found = [tensors.get(name) for name in (_FIRST, "blocks.output.conv.w")]
    first, last = ((0, 0) if tensor is None or tensor.dim() != 4 else tensor.shape[:2] for tensor in found)
    sizes = {"channels": first[1], "hidden_dim": first[0], "num_tokens": last[0]}
    if part == "decoder":
        sizes = {"channels": last[0] // 2, "hidden_dim": last[1], "num_tokens": first[1], "codebook_dim": first[0]}
    problem = ""
    if not other.is_file():
        problem = (
            f"{stored.path.name} is half of the model: {_FILES[_OTHER[part]]} must lie beside it; people get it from "
            f"{_SOURCE}{_FILES[_OTHER[part]]}"
        )
    return Description("OpenAIDiscreteVAE", f"OpenAI dVAE, {part}", {"part": part, "num_layers": 3, **sizes}, problem)


def _load_part(stored: Stored, companions: Companions) -> OpenAIDiscreteVAE:
    part = _part_of(stored)
    assert part is not None
    paths = {part: stored.path, _OTHER[part]: _other_file(stored, part, companions)}
    return openai_dvae_from(read_parts(paths["encoder"], paths["decoder"]))


def _is_folder(stored: Stored) -> bool:
    return stored.container == "directory" and all((stored.path / name).is_file() for name in _FILES.values())


def _describe_model(model: OpenAIDiscreteVAE, format_name: str) -> Description:
    architecture = {"image_size": model.image_size, "num_layers": model.num_layers, **vars(model.sizes)}
    return Description("OpenAIDiscreteVAE", format_name, architecture)


def _load_folder(stored: Stored, companions: Companions) -> OpenAIDiscreteVAE:
    return openai_dvae_from(read_parts(*(stored.path / name for name in _FILES.values())))


def _is_state_dict(stored: Stored) -> bool:
    return isinstance(stored.data, dict) and all(f"{short}{_FIRST}" in stored.data for short in _SHORT.values())


def _load_state_dict(stored: Stored, companions: Companions) -> OpenAIDiscreteVAE:
    return openai_dvae_from(state_dict_of(stored.data))


_PART, _FOLDER, _STATE = (
    "OpenAI dVAE (encoder.pkl or decoder.pkl)",
    "OpenAI dVAE (folder of encoder.pkl and decoder.pkl)",
    "OpenAI dVAE (state dict of the original's OpenAIDiscreteVAE)",
)
_KEYS = frozenset(
    f"blocks.{place}.{kind}"
    for place in ("input", "output.conv", "group_N.block_N.id_path", "group_N.block_N.res_path.conv_N")
    for kind in "wb"
)
FORMATS = (
    Format(_PART, lambda stored: _part_of(stored) is not None, _describe_part, _load_part, _KEYS),
    Format(
        _FOLDER, _is_folder, lambda stored: _describe_model(_load_folder(stored, Companions()), _FOLDER), _load_folder,
        frozenset(),
    ),
    Format(
        _STATE, _is_state_dict, lambda stored: _describe_model(_load_state_dict(stored, Companions()), _STATE),
        _load_state_dict, frozenset(f"{short}{key}" for short in _SHORT.values() for key in _KEYS),
    ),
)  # fmt: skip
