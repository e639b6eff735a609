"""VQGANs of taming-transformers: a Lightning checkpoint (.ckpt), or its state dict alone, and a .yaml.

The yaml is read as text and numbers: no class that it names is imported, and its lossconfig is not looked at (the loss
that it names downloads weights when it is made). Nearly all of it can be read off the tensors, too, and must agree with
them; the size of pictures cannot. A codebook renumbered for fewer codes (`quantize.used`) is cut to those.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from dalle_fast.compat.formats.base import Companions, Description, Format, rows_of
from dalle_fast.models.state_dicts import some
from dalle_fast.models.unfilled import unfilled
from dalle_fast.models.vqgan import WHERE_FROM, VQGanArchitecture, VQGanVAE

if TYPE_CHECKING:
    from dalle_fast.compat.reading import Stored

_NAME = "taming-transformers VQGAN (.ckpt, .yaml)"
_TARGETS = {"taming.models.vqgan.VQModel": "vq", "taming.models.vqgan.GumbelVQ": "gumbel"}
_CODEBOOKS = {"quantize.embedding.weight": "vq", "quantize.embed.weight": "gumbel"}
_ALWAYS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight")
_LEAST_OF_BLOCK = 2 * 8  # tensors: a block of the encoder and one of the decoder, two norms and two convolutions each
_MOST_YAML = 1 << 18  # bytes; those that were published have 2,000
_USED = "quantize.used"
_NOT_OURS = ("loss.", "colorize")  # the loss of the training; colours for its pictures of segmentations

# where the yaml says what the tensors say, too
_SAID_BY = {
    "quantizer": "model.target",
    "num_tokens": "n_embed",
    "codebook_dim": "embed_dim",
    "z_channels": "ddconfig.z_channels",
    "channels": "ddconfig.in_channels",
    "hidden_dim": "ddconfig.ch",
    "multipliers": "ddconfig.ch_mult",
    "num_res_blocks": "ddconfig.num_res_blocks",
    "attention_levels": "ddconfig.attn_resolutions, as levels below ddconfig.resolution,",
}

# our part of a name -> theirs, where they differ; of encoder and decoder
_THEIRS = {
    "blocks": "block",
    "attentions": "attn",
    "shortcut": "nin_shortcut",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "proj_out",
    "middle": "mid",
    "before": "block_1",
    "attention": "attn_1",
    "after": "block_2",
    "to_codebook": "quant_conv",
    "from_codebook": "post_quant_conv",
    "to_logits": "quantize.proj",
}
_THEIRS_OF = {
    "encoder": {"levels": "down", "resample": "downsample.conv"},
    "decoder": {"levels": "up", "resample": "upsample.conv"},
    "vq": {"codebook": "quantize.embedding"},
    "gumbel": {"codebook": "quantize.embed"},
}


def vqgan_from(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, image_size: int | None = None
) -> VQGanVAE:
    """A VQGAN with these weights, whose tensors it takes as they are (no copy), in evaluation mode.

    Args: as `architecture_of`.
    Raises: ValueError (not the weights of such a VQGAN, a yaml of another one, no image size).
    """
    architecture = architecture_of(state_dict, config, image_size=image_size)
    with unfilled():
        model = VQGanVAE(architecture=architecture)
    check_names(model, state_dict)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def architecture_of(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, image_size: int | None = None
) -> VQGanArchitecture:
    """What the tensors say, and of the yaml the image size; both must agree.

    Args:
        state_dict: taming-transformers' names -> tensors, after `model.` or without.
        config: what the yaml holds; None: the tensors say everything but the size of pictures.
        image_size: of the pictures; None: the yaml's resolution.
    Raises: ValueError.
    """
    weights = _without_prefix(state_dict)
    seen = _seen_in_tensors(weights)
    if config is not None:
        said = _said_by_yaml(config)
        _check_agreement(said, seen)
        if said["remap"] is not None and _USED not in weights:
            raise ValueError(
                f"VQGanVAE: the weights must hold {_USED}, the codes that remap ({said['remap']!r}) of the yaml keeps,"
                " got none. Write null there for all codes."
            )
        image_size = said["image_size"] if image_size is None else image_size
    if image_size is None:
        raise ValueError(
            "VQGanVAE: the size of pictures must be known, got weights alone, which do not tell. Give the .yaml that"
            f" belongs to them (commands: --yaml). {WHERE_FROM}"
        )
    architecture = VQGanArchitecture(image_size=image_size, **seen)
    used = _used(weights)
    return architecture if used is None else replace(architecture, num_tokens=len(used))


def taming_names(model: VQGanVAE) -> dict[str, str]:
    """Every parameter name of ours -> that of taming-transformers."""
    return {name: _taming_name(name, model.architecture.quantizer) for name in model.state_dict()}


def own_names(model: VQGanVAE, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with taming-transformers' names, after `model.` or without, under ours.

    What belongs to the loss of the training is left out; names neither side knows stay, for strict loading to report.
    """
    ours = {theirs: name for name, theirs in taming_names(model).items()}
    weights = {name: t for name, t in _without_prefix(state_dict).items() if not name.startswith(_NOT_OURS)}
    if (used := _used(weights)) is not None:
        del weights[_USED]
        for name in (*_CODEBOOKS, "quantize.proj.weight", "quantize.proj.bias"):
            if name in weights and rows_of(weights[name]) > int(used.max()):  # of another shape: for loading to report
                weights[name] = weights[name][used]
    return {ours.get(name, name): tensor for name, tensor in weights.items()}


def check_names(model: VQGanVAE, state_dict: Mapping[str, Tensor]) -> None:
    """Raises ValueError where weights lack a tensor of the model, hold others, or are not of one floating dtype."""
    theirs, weights = taming_names(model), own_names(model, state_dict)
    missing = [theirs[name] for name in theirs if name not in weights]
    unknown = [name for name in weights if name not in theirs]
    if missing or unknown:
        raise ValueError(
            f"VQGanVAE: weights must be those of a VQModel or GumbelVQ; missing: {some(missing)}; "
            f"unknown: {some(unknown)}. Is the file whole, and of taming-transformers?"
        )
    dtypes = {str(tensor.dtype) for tensor in weights.values()}
    if len(dtypes) > 1 or not next(iter(weights.values())).is_floating_point():
        raise ValueError(f"VQGanVAE: weights must be of one floating dtype, got {', '.join(sorted(dtypes))}.")


def weights_of(stored: Stored) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. Raises ValueError (it is not taming-transformers')."""
    if not _matches(stored):
        raise ValueError(
            f"VQGanVAE: {stored.path} must hold a VQModel or GumbelVQ of taming-transformers"
            f" ({', '.join(_ALWAYS)}, ...), got something else. `dalle-fast info` says what it is."
        )
    return {name: t for name, t in _named(stored).items() if isinstance(name, str) and isinstance(t, Tensor)}


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them mean 2 ** 100 values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which no configuration needs")
        return super().compose_node(parent, index)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The yaml of a VQGAN. Raises ValueError (it is none), OSError."""
    with open(path, "rb") as file:
        data = file.read(_MOST_YAML + 1)
    if len(data) > _MOST_YAML:
        raise ValueError(f"VQGanVAE: {path} must be the YAML of a model, got more than {_MOST_YAML} bytes.")
    try:
        config = yaml.load(data.decode("utf-8"), _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: numbers, dates, UTF-8
        reason = str(error).partition("\n")[0]
        raise ValueError(f"VQGanVAE: {path} must be YAML, got something else ({reason}). Copy it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"VQGanVAE: {path} must be YAML with a model section, got {type(config).__name__}.")
    return config


# --- the tensors ------------------------------------------------------------------------------------------------------


def _named(stored: Stored) -> Mapping[Any, Any]:
    """The state dict of a Lightning checkpoint, or the dict that a file is."""
    data = stored.data
    if not isinstance(data, Mapping):
        return {}
    inner = data.get("state_dict")
    return inner if isinstance(inner, Mapping) else data


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dalle_pytorch keeps a VQGAN as `model` of its VAE."""
    return {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}


def _seen_in_tensors(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The attributes of a VQGanArchitecture but image_size. Raises ValueError (one is missing, or of other axes)."""
    codebook = next((name for name in _CODEBOOKS if name in weights), "quantize.embedding.weight")
    num_tokens, codebook_dim = _shape(weights, codebook, 2)
    first_width, channels, *_ = _shape(weights, "encoder.conv_in.weight", 4)
    levels = _count(weights, "encoder.down.{}.block.0.conv1.weight")
    widths = [_shape(weights, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    if not first_width or any(width % first_width for width in widths):
        raise ValueError(
            f"VQGanVAE: the widths of encoder.down must be multiples of that of encoder.conv_in, {first_width}, got"
            f" {', '.join(map(str, widths))}."
        )
    num_res_blocks = _count(weights, "encoder.down.0.block.{}.conv1.weight")
    if _LEAST_OF_BLOCK * levels * num_res_blocks > len(weights):
        raise ValueError(
            f"VQGanVAE: weights must be those of {levels} levels of {num_res_blocks} blocks, got {len(weights)} in all."
            " Is the file whole?"
        )
    return {
        "channels": channels,
        "num_tokens": num_tokens,
        "codebook_dim": codebook_dim,
        "quantizer": _CODEBOOKS[codebook],
        "z_channels": _shape(weights, "encoder.conv_out.weight", 4)[0],
        "hidden_dim": first_width,
        "multipliers": tuple(width // first_width for width in widths),
        "num_res_blocks": num_res_blocks,
        "attention_levels": tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in weights),
    }


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    """How many of `name`, numbered from 0, there are."""
    n = 0
    while name.format(n) in weights:
        n += 1
    return n


def _shape(weights: Mapping[str, Tensor], name: str, n_axes: int) -> tuple[int, ...]:
    found = weights.get(name)
    if not isinstance(found, Tensor) or found.dim() != n_axes or not found.numel():
        got = f"one {list(found.shape)}" if isinstance(found, Tensor) else "none"
        raise ValueError(f"VQGanVAE: weights must hold {name}, a tensor with {n_axes} axes, got {got}.")
    return tuple(found.shape)


def _used(weights: Mapping[str, Tensor]) -> Tensor | None:
    """The codes that are left of a renumbered codebook. Raises ValueError."""
    used = weights.get(_USED)
    if used is None:
        return None
    num_tokens = next((_shape(weights, name, 2)[0] for name in _CODEBOOKS if name in weights), 0)
    is_list = used.dtype in (torch.int64, torch.int32) and used.dim() == 1 and used.numel() > 0
    if not is_list or used.min() < 0 or used.max() >= num_tokens or len(used.unique()) < len(used):
        raise ValueError(
            f"VQGanVAE: {_USED} must be different codes below {num_tokens}, got a tensor {list(used.shape)} of"
            f" {str(used.dtype).removeprefix('torch.')}. Remove it to keep all codes under their own numbers."
        )
    return used.long()


def _taming_name(name: str, quantizer: str) -> str:
    parts = name.split(".")
    theirs = _THEIRS | _THEIRS_OF.get(parts[0], {}) | _THEIRS_OF[quantizer]
    return ".".join(theirs.get(part, part) for part in parts)


# --- the yaml ---------------------------------------------------------------------------------------------------------


def _said_by_yaml(config: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a VQGanArchitecture, and `remap`. Raises ValueError (another model, a value that is none)."""
    model = _section(config, "model", "")
    target = model.get("target")
    if not isinstance(target, str) or target not in _TARGETS:
        raise ValueError(
            f"VQGanVAE: model.target of the yaml must be one of {', '.join(_TARGETS)}, got {target!r}."
            " That is another model."
        )
    params = _section(model, "params", "model.")
    network = _section(params, "ddconfig", "model.params.")
    for key, wanted in (("double_z", False), ("resamp_with_conv", True)):
        if network.get(key, True) is not wanted:
            raise ValueError(
                f"VQGanVAE: ddconfig.{key} of the yaml must be {str(wanted).lower()}, got {network.get(key, True)!r}."
                " No VQGAN was published with that."
            )
    resolution = _integer(network, "resolution")
    attention = _integers(network, "attn_resolutions")
    multipliers = _integers(network, "ch_mult")
    channels = _integer(network, "in_channels")
    if _integer(network, "out_ch") != channels:
        raise ValueError(
            f"VQGanVAE: ddconfig.out_ch of the yaml must be in_channels, {channels}, got {network['out_ch']}."
            " What it decodes to are no pictures."
        )
    return {
        "quantizer": _TARGETS[target],
        "image_size": resolution,
        "channels": channels,
        "num_tokens": _integer(params, "n_embed"),
        "codebook_dim": _integer(params, "embed_dim"),
        "z_channels": _integer(network, "z_channels"),
        "hidden_dim": _integer(network, "ch"),
        "multipliers": multipliers,
        "num_res_blocks": _integer(network, "num_res_blocks"),
        "attention_levels": tuple(i for i in range(len(multipliers)) if resolution >> i in attention),
        "remap": params.get("remap"),
    }


def _check_agreement(said: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    for attribute, where in _SAID_BY.items():
        if said[attribute] != seen[attribute]:
            raise ValueError(
                f"VQGanVAE: {where} of the yaml must be what the weights have, {_shown(seen[attribute])}, got"
                f" {_shown(said[attribute])}. Does this .yaml belong to these weights?"
            )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, Mapping):
        raise ValueError(
            f"VQGanVAE: the yaml must have a section {where}{key}, got {_kind(section)}. Give the one that belongs to"
            " the weights."
        )
    return section


def _integer(section: Mapping[str, Any], key: str) -> int:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"VQGanVAE: {key} of the yaml must be an integer from 1, got {_kind(value)}.")
    return value


def _integers(section: Mapping[str, Any], key: str) -> tuple[int, ...]:
    values = section.get(key)
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"VQGanVAE: {key} of the yaml must be a list of integers from 1, got {_kind(values)}.")
    return tuple(values)


def _kind(value: object) -> str:
    return "none" if value is None else f"{value!r:.60}"


# --- the format -------------------------------------------------------------------------------------------------------


def _matches(stored: Stored) -> bool:
    names = _named(stored)
    return all(name in names for name in _ALWAYS) and any(name in names for name in _CODEBOOKS)


def _describe(stored: Stored) -> Description:
    weights = _without_prefix(weights_of(stored))
    seen = _seen_in_tensors(weights)
    if (used := _used(weights)) is not None:
        seen["num_tokens"] = len(used)
    return Description("VQGanVAE", _NAME, seen | {"image_size": "the resolution of its .yaml"})


def _load(stored: Stored, companions: Companions) -> VQGanVAE:
    weights = weights_of(stored)
    return vqgan_from(weights, None if companions.yaml is None else read_config(companions.yaml))


def _typical_keys() -> frozenset[str]:
    """Of both kinds, numbers replaced by N."""
    shape = {"image_size": 64, "channels": 3, "num_tokens": 1, "codebook_dim": 1, "z_channels": 1, "hidden_dim": 32}
    levels = {"multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": (1,)}
    with unfilled():
        models = [VQGanVAE(architecture={**shape, **levels, "quantizer": kind}) for kind in ("vq", "gumbel")]
    return frozenset(re.sub(r"\.\d+\.", ".N.", name) for model in models for name in taming_names(model).values())


FORMATS = (Format(_NAME, _matches, _describe, _load, _typical_keys()),)
