"""The `.pt` files of the original's trainers: `vae.pt` of train_vae.py, `dalle.pt` of train_dalle.py.

    vae.pt    hparams (arguments of DiscreteVAE), weights
    dalle.pt  hparams (arguments of DALLE), vae_params, vae_class_name, version, epoch, weights, opt_state and
              scheduler_state (None here: the states of other optimisers mean nothing to it)

Weights have the names of dalle_pytorch 1.6.6. Its `generate.py --dalle_path` and `train_dalle.py --vae_path` read them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_fast.compat.names import name_of_block_layout, upstream_names
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.whole_files import TEMPORARY, bring_to_disk

VERSION = "1.6.6"
# What its trainers write; other arguments are added where they are not at their defaults.
_DALLE_KEYS = (
    "num_text_tokens", "text_seq_len", "dim", "depth", "heads", "dim_head", "reversible", "loss_img_weight",
    "attn_types", "ff_dropout", "attn_dropout", "stable", "shift_tokens", "rotary_emb", "shared_attn_ids",
    "shared_ff_ids", "share_input_output_emb",
)  # fmt: skip
_VAE_KEYS = (
    "image_size", "num_layers", "num_tokens", "channels", "codebook_dim", "hidden_dim", "num_resnet_blocks",
)  # fmt: skip
_KNOWN_TYPES = frozenset(("full", "sparse", "axial_row", "axial_col", "conv_like", "mlp"))


def upstream_checkpoint(model: DALLE | DiscreteVAE) -> dict[str, Any]:
    """What the original's trainer would have written for a model, tensors on the CPU.

    Raises: ValueError (a model that the original has no class or argument for), TypeError (another class).
    """
    if isinstance(model, DiscreteVAE):
        return {"hparams": _vae_params(model), "weights": upstream_weights(model)}
    if not isinstance(model, DALLE):
        raise TypeError(f"upstream_checkpoint: model must be a DALLE or DiscreteVAE, got {type(model).__name__}.")
    if not isinstance(model.vae, DiscreteVAE):
        raise ValueError(
            f"upstream_checkpoint: the VAE must be a DiscreteVAE, got {type(model.vae).__name__}. The file holds its "
            "arguments."
        )
    return {
        "hparams": _dalle_params(model),
        "vae_params": _vae_params(model.vae),
        "epoch": 0,
        "version": VERSION,
        "vae_class_name": "DiscreteVAE",
        "weights": upstream_weights(model),
        "opt_state": None,
        "scheduler_state": None,
    }


def upstream_weights(model: DALLE | DiscreteVAE) -> dict[str, Tensor]:
    """The state dict that the original's model would have: its names, shapes, buffers and copies of tied tensors."""
    names = upstream_names(model)
    weights = {names[name]: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if not isinstance(model, DALLE):
        return weights
    if model.transformer.angles is not None:
        weights["transformer.pos_emb"] = model.transformer.angles.detach().cpu()[None]
    for axis, place in enumerate((2, 1)):
        if (name := f"image_pos_emb.weights_{axis}") in weights:
            weights[name] = weights[name].unsqueeze(0).unsqueeze(place)  # [1, R, 1, dim] and [1, 1, C, dim]
    blocks: Iterable[Any] = model.transformer.blocks
    for layer, block in enumerate(blocks):
        attention = block.attn.fn
        if attention.pattern.name == "block_sparse":
            layout = torch.tensor(dict(attention.pattern.options)["layout"], dtype=torch.int64)
            weights[name_of_block_layout(model, layer)] = layout.repeat(attention.heads, 1, 1)
    if model.share_input_output_emb:
        for kind in ("weight", "bias"):
            for embedding in ("text_emb", "image_emb"):
                weights[f"{embedding}.linear.{kind}"] = weights[f"to_logits.1.{kind}"]
    return weights


def write_upstream(model: DALLE | DiscreteVAE, path: Path) -> None:
    """Writes `upstream_checkpoint(model)` to a file, whole or not at all, without a copy of it in memory.

    Raises: ValueError, TypeError (as there), OSError.
    """
    checkpoint = upstream_checkpoint(model)
    scratch = path.with_name(TEMPORARY + path.name)
    try:
        with open(scratch, "wb") as file:
            torch.save(checkpoint, file)
        bring_to_disk(scratch)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
    bring_to_disk(path.parent)


def _dalle_params(model: DALLE) -> dict[str, Any]:
    config = {name: value for name, value in model.config.items() if name != "rotary_dtype"}  # its pos_emb says it
    types = config["attn_types"]
    types = ("full",) if types is None else (types,) if isinstance(types, str) else tuple(types)
    types = tuple("sparse" if name.startswith("sparse block=16 layout=") else name for name in types)
    if unknown := sorted(set(types) - _KNOWN_TYPES):
        raise ValueError(
            f"upstream_checkpoint: attn_types must be of the original's ({', '.join(sorted(_KNOWN_TYPES))}), got "
            f"{', '.join(unknown)}. It cannot run such a model."
        )
    return {**_chosen(DALLE, config, _DALLE_KEYS), "attn_types": types}


def _vae_params(vae: DiscreteVAE) -> dict[str, Any]:
    if vae.quantizer != "gumbel":
        raise ValueError(
            f"upstream_checkpoint: the VAE must have quantizer='gumbel', got {vae.quantizer!r}, which the original "
            "has not. Fold it into one: `train-vae --set fold=true`."
        )
    params = _chosen(DiscreteVAE, vae.config, _VAE_KEYS)
    params.pop("quantizer", None)
    return params


def _chosen(cls: type, config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Those of `keys`, and what is not at its default."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    others = [name for name in config if name not in keys and _changed(config[name], parameters[name].default)]
    return {name: config[name] for name in (*keys, *others)}


def _changed(value: Any, default: Any) -> bool:
    """Whether an argument is not its default; sequences of a saved configuration are lists."""
    return _as_lists(value) != _as_lists(default)


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value
