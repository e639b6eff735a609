"""The `.pt` files of dalle_pytorch's trainers, of every release since 0.8.0, and weights alone.

    DALLE  {hparams, vae_params, weights} and, of later releases, epoch, version, vae_class_name, opt_state,
           scheduler_state; weights hold the frozen VAE under `vae.`
    VAE    {hparams, weights}

A DALLE's VAE is in its file: a DiscreteVAE where vae_params are its arguments, else OpenAI's (vae.enc, vae.dec) or a
VQGAN (vae.model). It is float32 here, also where the file holds it in 16 bits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dalle_fast.compat.formats.base import Companions, Description, Format
from dalle_fast.compat.formats.releases import Built, built, check_contents
from dalle_fast.compat.nodes import printable, shortened
from dalle_fast.compat.reading import Stored
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.state_dicts import aliases, some, tie_again
from dalle_fast.models.unfilled import unfilled

DALLE_FORMAT = "dalle_pytorch DALLE (.pt)"
VAE_FORMAT = "dalle_pytorch DiscreteVAE (.pt)"
ALONE_FORMAT = "weights of a dalle_pytorch DALLE, without its arguments"
_Model = TypeVar("_Model", DALLE, DiscreteVAE)
_HALVING, _BLOCK = (re.compile(rf"encoder\.\d+\.{end}\.weight") for end in ("0", r"net\.0"))
_VAE_CLASSES = {"vae.enc.": "OpenAIDiscreteVAE", "vae.model.": "VQGanVAE", "vae.codebook.": "DiscreteVAE"}
_NO_ARGUMENTS = (
    "it holds weights without hparams, and heads, attn_types and others cannot be told from weights. Save it again as"
    " train_dalle.py does: {hparams, vae_params, weights}"
)
_AUXILIARY = "it is the auxiliary.pt of a DeepSpeed checkpoint and holds no weights. Name the folder that it lies in"


def load_dalle(checkpoint: Mapping[str, Any], companions: Companions, where: Path) -> DALLE:
    """The model of what a DALLE file holds, in evaluation mode; its tensors are those of the file, its VAE's float32.

    Raises: ValueError (a release or layer that we cannot run, a VAE that does not fit), FileNotFoundError.
    """
    weights = checkpoint["weights"]
    made = _built(checkpoint)
    if made.problem:
        raise ValueError(f"{where}: must be a model that we can run, got one of {made.release}: {made.problem}.")
    vae = _vae(checkpoint, made, companions, where)
    model = _unfilled(DALLE, where, vae=vae, **made.arguments)
    own = model.state_dict(keep_vars=True)
    inside = {name: tensor.detach() for name, tensor in own.items() if name.startswith("vae.")}
    outside = {name: tensor for name, tensor in weights.items() if not name.startswith("vae.")}
    _fill(model, outside | inside, where)
    vae.requires_grad_(False)
    return model.eval()


def describe_dalle(checkpoint: Mapping[str, Any], layout: str) -> Description:
    """What a DALLE file says of itself. Raises ValueError (it contradicts itself)."""
    made = _built(checkpoint)
    weights = checkpoint["weights"]
    arguments = dict(made.arguments)
    if isinstance(types := arguments.get("attn_types"), tuple):
        arguments["attn_types"] = [str(name).partition(" layout=")[0] for name in types]
    outside = [tensor for name, tensor in weights.items() if not name.startswith("vae.")]
    sizes = {"num_image_tokens": made.num_image_tokens, "image_grid": "{} x {}".format(*made.grid)}
    architecture: dict[str, object] = {
        "release": made.release,
        **arguments,
        **(sizes if made.num_image_tokens else {}),
        "vae": vae_class(checkpoint) if _has_vae(checkpoint) else f"not in the file; --vae names {_needed_vae(made)}",
        "parameters": sum(tensor.numel() for tensor in outside),
        "dtype": _dtypes(outside),
    }
    return Description("DALLE", layout, architecture, made.problem)


def vae_class(checkpoint: Mapping[str, Any]) -> str:
    """The class of a DALLE file's VAE: what the tensors are, else what the file says, else "unknown"."""
    if isinstance(checkpoint["vae_params"], Mapping):
        return "DiscreteVAE"
    for prefix, name in _VAE_CLASSES.items():
        if any(key.startswith(prefix) for key in checkpoint["weights"]):
            return name
    said = checkpoint.get("vae_class_name")
    return said if isinstance(said, str) else "unknown"


# ------------------------------------------------------------------------------------------------------------- the VAE


def _has_vae(checkpoint: Mapping[str, Any]) -> bool:
    return any(name.startswith("vae.") for name in checkpoint["weights"])


def _vae(checkpoint: Mapping[str, Any], made: Built, companions: Companions, where: Path) -> nn.Module:
    """The VAE of a file, or the one that was given instead; it fits the transformer. Raises ValueError."""
    tensors = {
        name.removeprefix("vae."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint["weights"].items()
        if name.startswith("vae.") and not name.startswith("vae.model.loss.")
    }
    kind = vae_class(checkpoint)
    vae: Any
    if companions.vae is not None:
        from dalle_fast.compat.loading import load_vae as loaded_vae  # at call time: loading asks every format

        vae, given = loaded_vae(companions.vae, op="load", yaml=companions.yaml), str(companions.vae)
    elif not tensors:
        raise ValueError(
            f"{where}: must hold its VAE, got a DALLE without one. Name it with --vae: {_needed_vae(made)}."
        )
    elif kind == "DiscreteVAE":
        vae, given = load_vae(checkpoint["vae_params"], tensors, where), f"the one in {where}"
    elif kind == "OpenAIDiscreteVAE":
        from dalle_fast.compat.formats.openai_dvae import openai_dvae_from

        vae, given = openai_dvae_from(tensors, image_size=made.grid[0] * 8), f"the one in {where}"
    elif kind == "VQGanVAE":
        vae, given = _vqgan(tensors, made), f"the one in {where}"
    else:
        raise ValueError(
            f"{where}: its VAE must be a DiscreteVAE, OpenAI's or a VQGAN, got {kind:.60} ({some(list(tensors))}). "
            "Name another one with --vae."
        )
    found = (vae.num_tokens, vae.image_size // 2**vae.num_layers)
    if found != (made.num_image_tokens, made.grid[0]):
        raise ValueError(
            f"vae: must be the one the model was trained with: expected {made.num_image_tokens} codes in a grid of "
            f"{made.grid[0]} x {made.grid[1]}, found {found[0]} codes in a grid of {found[1]} x {found[1]} ({given})."
        )
    return vae


def _vqgan(tensors: Mapping[str, Tensor], made: Built) -> nn.Module:
    """Its tensors say everything but the size of pictures, which the grid says."""
    from dalle_fast.compat.formats.taming_vqgan import vqgan_from

    levels = sum(name.startswith("model.encoder.down.") and name.endswith("downsample.conv.weight") for name in tensors)
    return vqgan_from(tensors, image_size=made.grid[0] << levels)


def _needed_vae(made: Built) -> str:
    codes, side = made.num_image_tokens, made.grid[0]
    known = {
        (8192, 32): "OpenAI's dVAE (encoder.pkl, decoder.pkl) or the VQGAN gumbel_f8",
        (1024, 16): "the VQGAN f16, 1024 codes (vqgan.1024.model.ckpt)",
        (16384, 16): "the VQGAN f16, 16384 codes",
    }.get((codes, side))
    size = f"one of {codes} codes in a grid of {side} x {side}"
    return f"{size}, as {known}" if known else size


# ------------------------------------------------------------------------------------------------------------- a model


def load_vae(hparams: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> DiscreteVAE:
    """A DiscreteVAE with these tensors, frozen by nobody, in evaluation mode. Raises ValueError."""
    _check_vae(hparams, tensors, where)
    vae = _unfilled(DiscreteVAE, where, **hparams)
    _fill(vae, tensors, where)
    return vae.eval()


def _check_vae(hparams: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises ValueError where hparams are not those of the tensors, before anything is built."""
    if not isinstance(hparams, Mapping):
        raise ValueError(f"{where}: must hold the arguments of its DiscreteVAE, got {type(hparams).__name__}.")
    check_contents(hparams, tensors)
    parameters = inspect.signature(DiscreteVAE.__init__).parameters
    if unknown := sorted(set(hparams) - (set(parameters) - {"self"})):
        raise ValueError(f"{where}: must hold arguments of a DiscreteVAE, got {some(unknown)}. Is it such a file?")
    n_layers, n_blocks = (sum(pattern.fullmatch(key) is not None for key in tensors) for pattern in (_HALVING, _BLOCK))
    if 4 * n_layers + 12 * n_blocks > len(tensors):
        raise ValueError(
            f"{where}: must hold all tensors of {n_layers} layers and {n_blocks} blocks, got {len(tensors)}. Is the "
            "file whole?"
        )
    codebook = tensors.get("codebook.weight")
    num_tokens, codebook_dim = (0, 0) if codebook is None or codebook.dim() != 2 else codebook.shape
    for name, found in (
        ("num_layers", n_layers),
        ("num_resnet_blocks", n_blocks),
        ("num_tokens", num_tokens),
        ("codebook_dim", codebook_dim),
    ):
        said = hparams.get(name, parameters[name].default)
        if said != found:
            raise ValueError(
                f"{where}: hparams must be those of the weights, got {name} = {shortened(said)} and weights of {found}."
                " Do they belong together?"
            )


def _unfilled(cls: type[_Model], where: Path, **arguments: Any) -> _Model:
    """A model without values. Raises ValueError (impossible arguments)."""
    try:
        with unfilled():
            return cls(**arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: no tensor is that large
        said = str(error).partition("\n")[0]
        raise ValueError(f"{where}: must hold the arguments of a {cls.__name__}, got others ({said}).") from None


def _fill(model: Pretrained, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Gives an unfilled model its tensors. Raises ValueError."""
    tied = aliases(model.state_dict(keep_vars=True))
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # names that are missing or unknown
        said = printable(" ".join(str(error).split()), 1000)
        raise ValueError(f"{where}: must hold the tensors of its {type(model).__name__}. {said}") from None
    tie_again(model, tied)


def _built(checkpoint: Mapping[str, Any]) -> Built:
    return built(checkpoint["hparams"], checkpoint["weights"], checkpoint.get("version"))


def _dtypes(tensors: Any) -> str:
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
    return ", ".join(sorted(names))


# ------------------------------------------------------------------------------------------------------------- formats


def is_dalle(data: object) -> bool:
    """Whether data is what train_dalle.py saves, with weights or, of DeepSpeed, with a sentence in their place."""
    return isinstance(data, Mapping) and isinstance(data.get("hparams"), Mapping) and "vae_params" in data


def _is_weights(data: object, *names: str) -> bool:
    return isinstance(data, Mapping) and all(isinstance(data.get(name), Tensor) for name in names)


def _matches_dalle(stored: Stored) -> bool:
    data = stored.data
    return is_dalle(data) and (isinstance(data.get("weights"), str) or _is_weights(data.get("weights")))


def _describe_dalle(stored: Stored) -> Description:
    if isinstance(stored.data["weights"], str):
        return Description("DALLE", DALLE_FORMAT, dict(stored.data["hparams"]), _AUXILIARY)
    return describe_dalle(stored.data, DALLE_FORMAT)


def _load_dalle(stored: Stored, companions: Companions) -> DALLE:
    if isinstance(stored.data["weights"], str):
        raise ValueError(f"{stored.path}: must hold weights, got none: {_AUXILIARY}.")
    return load_dalle(stored.data, companions, stored.path)


def _matches_vae(stored: Stored) -> bool:
    data = stored.data
    held = isinstance(data, Mapping) and isinstance(data.get("hparams"), Mapping) and "vae_params" not in data
    return held and _is_weights(data.get("weights"), "codebook.weight")


def _describe_vae(stored: Stored) -> Description:
    hparams, weights = stored.data["hparams"], stored.data["weights"]
    _check_vae(hparams, weights, stored.path)
    architecture: dict[str, object] = {
        **hparams,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "dtype": _dtypes(weights.values()),
    }
    return Description("DiscreteVAE", VAE_FORMAT, architecture)


def _load_vae(stored: Stored, companions: Companions) -> DiscreteVAE:
    return load_vae(stored.data["hparams"], stored.data["weights"], stored.path)


def _matches_alone(stored: Stored) -> bool:
    data = stored.data
    return _is_weights(data, "to_logits.1.weight") and any(str(name).startswith("transformer.layers.") for name in data)


def _describe_alone(stored: Stored) -> Description:
    n = sum(value.numel() for value in stored.data.values() if isinstance(value, Tensor))
    return Description("DALLE", ALONE_FORMAT, {"parameters": n}, _NO_ARGUMENTS)


def _load_alone(stored: Stored, companions: Companions) -> DALLE:
    raise ValueError(f"{stored.path}: must hold the arguments of its model, too: {_NO_ARGUMENTS}.")


_ENDS = {
    0: (
        "scale", "norm.weight", "norm.bias", "to_qkv.weight", "to_out.N.weight", "to_out.N.bias", "norm_out.weight",
    ),
    1: ("scale", "norm.weight", "norm.bias", "net.N.weight", "net.N.bias", "norm_out.weight"),
}  # fmt: skip


def _typical_keys() -> frozenset[str]:
    """Of the releases' layouts, numbers replaced by N."""
    ends = {end for branch in _ENDS.values() for end in branch}
    wrapped = {f"transformer.layers.layers.N.N.{'fn.' * n}{end}" for n in range(6) for end in ends}
    wrapped |= {f"transformer.layers.blocks.N.{f}.net.{'fn.' * n}{end}" for f in "fg" for n in range(6) for end in ends}
    outside = {f"{name}_emb.weight" for name in ("text", "image", "text_pos")} | {"transformer.pos_emb"}
    head = {f"to_logits.N.{leaf}" for leaf in ("weight", "bias")}
    return frozenset(wrapped | outside | head)


_VAE_KEYS = frozenset(
    {"codebook.weight"}
    | {f"{end}.N.{place}{leaf}" for end in ("encoder", "decoder") for place in ("", "N.", "net.N.") for leaf in
       ("weight", "bias")}
)  # fmt: skip

FORMATS = (
    Format(DALLE_FORMAT, _matches_dalle, _describe_dalle, _load_dalle, _typical_keys()),
    Format(VAE_FORMAT, _matches_vae, _describe_vae, _load_vae, _VAE_KEYS),
    Format(ALONE_FORMAT, _matches_alone, _describe_alone, _load_alone, _typical_keys()),
)
