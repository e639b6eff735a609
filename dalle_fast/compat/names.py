"""Parameter names of dalle_pytorch: ours -> those of 1.6.6, and those of any release since 0.8.0 -> ours.

The original wraps a layer's function in one module per feature (LayerScale, PreNorm, token shift, cache), and each adds
an `.fn` to every name below it; reversible blocks add `.net`. One rule covers its releases: between a layer's branch
and the leaf (`scale`, `norm`, `norm_out`, `to_qkv`, `to_out`, `net.0`, `net.3`), wrappers say nothing and are removed.
What the wrappers do tell is whether the weights were trained with token shift, which the values cannot tell: a model
built the other way is refused.

Equal names do not prove equal numbers: releases before 0.9.0 have no padding ids, and `conv_like` layers before 1.5.0
see another window. `compat.formats.releases` knows what a file tells of its release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dalle_fast.models.dvae import DiscreteVAE

# our name below a branch -> the original's, by branch
_LEAVES = {
    "attn": {
        "scale": "scale",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "norm_out.weight": "norm_out.weight",
        "norm_out.bias": "norm_out.bias",
        "fn.to_qkv.weight": "to_qkv.weight",
        "fn.to_out.weight": "to_out.0.weight",
        "fn.to_out.bias": "to_out.0.bias",
    },
    "ff": {
        "scale": "scale",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "norm_out.weight": "norm_out.weight",
        "norm_out.bias": "norm_out.bias",
        "fn.w_in.weight": "net.0.weight",
        "fn.w_in.bias": "net.0.bias",
        "fn.w_out.weight": "net.3.weight",
        "fn.w_out.bias": "net.3.bias",
    },
}
_LEAVES_BACK = {branch: {theirs: ours for ours, theirs in leaves.items()} for branch, leaves in _LEAVES.items()}
_BRANCH_OF = {"0": "attn", "1": "ff", "f": "attn", "g": "ff"}

# wrappers around (attention, feed-forward) -> trained with token shift; 1.4.0 wraps attention once more for its cache
_SHIFT_OF_WRAPPERS = {(2, 2): False, (3, 3): True, (3, 2): False, (5, 4): True}

_OURS = re.compile(r"^(?P<prefix>(?:.*\.)?)blocks\.(?P<layer>\d+)\.(?P<branch>attn|ff)\.(?P<leaf>.+)$")
_THEIRS = re.compile(
    r"^(?P<prefix>(?:.*\.)?)layers\.(?P<kind>layers|blocks)\.(?P<layer>\d+)\.(?P<branch>[01fg])\.(?P<rest>.+)$"
)
_AXIAL = re.compile(r"^image_pos_emb\.weights[._](?P<axis>[01])$")
_AXIAL_OURS = {"0": "image_row_emb", "1": "image_col_emb"}
_HEAD = re.compile(r"^to_logits\.(?P<index>\d)\.(?P<leaf>weight|bias)$")
_TIED_COPIES = ("text_emb.linear.", "image_emb.linear.")
_BLOCK_LAYOUT = "attn_fn.master_layout"  # DeepSpeed's, of a `sparse` layer: int64 [heads, n_blocks, n_blocks]


@dataclass(frozen=True)
class Wrapping:
    """How the names of a transformer's layers are wrapped.

    Attributes:
        reversible: whether its layers lie in reversible blocks.
        wrappers: of attention and feed-forward, how many; 0 where there is no such layer.
        shift_tokens: whether such weights were trained with token shift; None: no release wraps so.
    """

    reversible: bool
    wrappers: tuple[int, int]

    @property
    def shift_tokens(self) -> bool | None:
        return _SHIFT_OF_WRAPPERS.get(self.wrappers)


def wrapping_of(state_dict: Mapping[str, Tensor]) -> dict[str, Wrapping]:
    """Prefix of every transformer of the original in a state dict ("transformer.") -> how its names are wrapped."""
    kinds: dict[str, str] = {}
    depths: dict[tuple[str, str], int] = {}
    for name in state_dict:
        if match := _THEIRS.match(name):
            kinds[match["prefix"]] = match["kind"]
            leaf, n_fn = _without_wrappers(match["rest"])
            if leaf in ("to_qkv.weight", "net.0.weight"):
                depths[match["prefix"], _BRANCH_OF[match["branch"]]] = n_fn
    return {
        prefix: Wrapping(kind == "blocks", (depths.get((prefix, "attn"), 0), depths.get((prefix, "ff"), 0)))
        for prefix, kind in kinds.items()
    }


def name_of_block_layout(model: nn.Module, layer: int) -> str:
    """Where 1.6.6 stores the layout of the blocks of a `sparse` layer of a DALLE."""
    beside = _upstream_block_name(model, "transformer.", str(layer), "attn", "fn.to_qkv.weight")
    return beside.replace("to_qkv.weight", _BLOCK_LAYOUT)


def block_layouts(state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Layer -> the layout of its blocks that DeepSpeed's sparse attention stored, [heads, n_blocks, n_blocks]."""
    found = {}
    for name, tensor in state_dict.items():
        match = _THEIRS.match(name) if name.endswith(_BLOCK_LAYOUT) else None
        if match and match["prefix"] == "transformer.":
            found[int(match["layer"])] = tensor
    return found


def upstream_names(model: nn.Module) -> dict[str, str]:
    """Every parameter name of a DALLE, DiscreteVAE, CLIP or Transformer -> its name in dalle_pytorch 1.6.6.

    Tied embeddings: the original stores copies of `to_logits.1.*` as `text_emb.linear.*` and `image_emb.linear.*`; they
    are one tensor and have the name `to_logits.1.*` here. Axial positions have the spelling of
    axial-positional-embedding 0.2 (`image_pos_emb.weights_0`, shape [1, R, 1, dim]; ours is `image_row_emb` [R, dim]).
    """
    head = hasattr(model, "logits_norm")
    names = {}
    for name in model.state_dict():
        match = _OURS.match(name)
        if name.startswith("vae."):
            continue
        if match:
            names[name] = _upstream_block_name(model, **match.groupdict())
        elif name in _AXIAL_OURS.values():
            names[name] = f"image_pos_emb.weights_{int(name == 'image_col_emb')}"
        elif head and name.startswith("logits_norm."):
            names[name] = name.replace("logits_norm.", "to_logits.0.")
        elif head and name.startswith("to_logits."):
            names[name] = name.replace("to_logits.", "to_logits.1.")
        else:
            names[name] = name
    vae = getattr(model, "vae", None)
    if isinstance(vae, nn.Module):
        names.update({f"vae.{ours}": f"vae.{theirs}" for ours, theirs in upstream_names(vae).items()})
    return names


def translate(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with dalle_pytorch's names (any release since 0.8.0) under the names of `model`.

    Names that are ours already stay, and so do names neither side knows, for strict loading to report. The original's
    buffers (`pos_emb`, `logits_mask`) and the copies of a tied head are left out.

    Raises: TypeError (not a mapping), ValueError (weights of a model built with other `reversible` or `shift_tokens`).
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict: state_dict must map names to tensors, got {type(state_dict).__name__}. "
            "Pass the dict itself, not the file that holds it."
        )
    inner = [name for name in ("weights", "state_dict", "module", "model") if isinstance(state_dict.get(name), Mapping)]
    if inner:
        raise ValueError(
            f"load_state_dict: state_dict must map names to tensors, got a checkpoint that holds one as {inner[0]!r}. "
            f"Pass checkpoint[{inner[0]!r}]."
        )
    own = set(model.state_dict())
    prefixes = {m["prefix"] for m in map(_OURS.match, own) if m}
    _check_options(model, prefixes, state_dict)
    _check_padding_ids(model, state_dict)
    first_of_head = int("to_logits.2.weight" in state_dict)  # 0.12.1 to 0.12.4 put a DivideMax before the norm
    translated: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name in own:
            translated[name] = tensor
        elif not _is_dropped(name, own, prefixes):
            ours = _our_name(name, prefixes, first_of_head)
            is_axial = ours in _AXIAL_OURS.values()
            translated[ours] = tensor.flatten(0, -2) if is_axial and tensor.dim() == 4 else tensor
    return _with_vae(model, translated)


def _our_name(name: str, prefixes: set[str], first_of_head: int) -> str:
    """Our name for one of the original's, or the name itself where neither side knows it."""
    if match := _THEIRS.match(name):
        leaf = _LEAVES_BACK[_BRANCH_OF[match["branch"]]].get(_without_wrappers(match["rest"])[0])
        if leaf is not None and match["prefix"] in prefixes:
            return f"{match['prefix']}blocks.{match['layer']}.{_BRANCH_OF[match['branch']]}.{leaf}"
    if "transformer." in prefixes:
        if match := _AXIAL.match(name):
            return _AXIAL_OURS[match["axis"]]
        if match := _HEAD.match(name):
            module = {first_of_head: "logits_norm", first_of_head + 1: "to_logits"}.get(int(match["index"]))
            return f"{module}.{match['leaf']}" if module else name
    return name


def _is_dropped(name: str, own: set[str], prefixes: set[str]) -> bool:
    """Whether `name` is one of the original's buffers, or a copy of a tied head in a model that ties it too."""
    if name == "logits_mask" or any(name == f"{prefix}pos_emb" for prefix in prefixes):
        return True
    if name.endswith(_BLOCK_LAYOUT) and (match := _THEIRS.match(name)) and match["prefix"] in prefixes:
        return True  # of a model's pattern, which is not a tensor here
    return name.startswith(_TIED_COPIES) and "text_emb.weight" not in own


def _with_vae(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    vae = getattr(model, "vae", None)
    if not isinstance(vae, nn.Module):
        return state_dict
    inner = {name.removeprefix("vae."): tensor for name, tensor in state_dict.items() if name.startswith("vae.")}
    outer = {name: tensor for name, tensor in state_dict.items() if not name.startswith("vae.")}
    return outer | {f"vae.{name}": tensor for name, tensor in _names_of_vae(vae, inner).items()}


def _names_of_vae(vae: nn.Module, state_dict: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a VAE under the names of its class, whoever named them."""
    if isinstance(vae, DiscreteVAE):
        return translate(vae, state_dict)
    # at call time: the others are rare, and their modules stand above this one
    from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE
    from dalle_fast.models.vqgan import VQGanVAE

    if isinstance(vae, OpenAIDiscreteVAE):
        from dalle_fast.compat.formats.openai_dvae import our_names

        return our_names(state_dict) | state_dict
    if isinstance(vae, VQGanVAE):
        from dalle_fast.compat.formats.taming_vqgan import own_names

        return own_names(vae, state_dict)
    return state_dict


def _upstream_block_name(model: nn.Module, prefix: str, layer: str, branch: str, leaf: str) -> str:
    transformer = model.get_submodule(prefix.rstrip("."))
    theirs = _LEAVES[branch][leaf]
    is_attention = branch == "attn"
    wrappers = 0
    if leaf.startswith("norm"):
        wrappers = 1
    elif leaf.startswith("fn."):
        wrappers = 2 + is_attention + 2 * _built_with(transformer, "shift_tokens")
    path = (
        ("blocks", "f.net" if is_attention else "g.net")
        if _built_with(transformer, "reversible")
        else ("layers", "01"[not is_attention])
    )
    return ".".join([f"{prefix}layers.{path[0]}.{layer}.{path[1]}", *["fn"] * wrappers, theirs])


def _without_wrappers(rest: str) -> tuple[str, int]:
    """A name below a branch without its wrappers, and how many `fn` there were."""
    parts, n_fn = rest.split("."), 0
    while parts[0] == "fn" or (parts[0] == "net" and len(parts) > 1 and not parts[1].isdigit()):
        n_fn += parts.pop(0) == "fn"
        if not parts:
            return rest, n_fn
    return ".".join(parts), n_fn


def _check_options(model: nn.Module, prefixes: set[str], state_dict: Mapping[str, Tensor]) -> None:
    """Refuses weights whose names show that they were trained with another `reversible` or `shift_tokens`."""
    for prefix, wrapping in wrapping_of(state_dict).items():
        if prefix in prefixes:
            transformer = model.get_submodule(prefix.rstrip("."))
            _check_option("reversible", wrapping.reversible, transformer)
            if wrapping.shift_tokens is not None:
                _check_option("shift_tokens", wrapping.shift_tokens, transformer)


def _check_padding_ids(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuses weights from before 0.9.0, which pad with id 0 under a mask and have no rows for padding ids."""
    embedding = state_dict.get("text_emb.weight")
    rows = embedding.shape[0] if isinstance(embedding, Tensor) and embedding.dim() else None
    if rows is not None and rows == getattr(model, "num_text_tokens", -1) - getattr(model, "text_seq_len", 0):
        raise ValueError(
            f"load_state_dict: text_emb.weight must have a row for every padding id, {model.num_text_tokens} in all, "
            f"got {rows}. dalle_pytorch before 0.9.0 masked padding instead; train such weights on, or convert them."
        )


def _check_option(option: str, trained_with: bool, transformer: nn.Module) -> None:
    built_with = _built_with(transformer, option)
    if trained_with != built_with:
        raise ValueError(
            f"load_state_dict: weights trained with {option}={trained_with} must go into a model built so, "
            f"got one with {option}={built_with}. Build the model with {option}={trained_with}."
        )


def _built_with(transformer: nn.Module, option: str) -> bool:
    if option == "reversible":
        return bool(transformer.reversible)
    return transformer.blocks[0].attn.layout is not None  # type: ignore[union-attr, index]
