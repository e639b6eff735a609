"""Tensor names of CLIP: OpenAI's (open_clip's are the same), Hugging Face's CLIPModel, and ours, each way.

Same numbers, three spellings, and two differences of form, both exact: OpenAI multiplies by its two projections from
the right (ours and Hugging Face's are turned), and Hugging Face splits queries, keys and values into three tensors.
Wrappers (`module.`, `_orig_mod.`, open_clip's `text.`) and buffers that say nothing are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# ours, OpenAI's, Hugging Face's
_TOP = (
    ("image_tower.to_patches.weight", "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("image_tower.class_emb", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("image_tower.pos_emb", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("image_tower.norm_in.weight", "visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("image_tower.norm_in.bias", "visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("image_tower.norm_out.weight", "visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("image_tower.norm_out.bias", "visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    ("image_tower.to_latent.weight", "visual.proj", "visual_projection.weight"),
    ("text_tower.token_emb.weight", "token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text_tower.pos_emb", "positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("text_tower.norm_out.weight", "ln_final.weight", "text_model.final_layer_norm.weight"),
    ("text_tower.norm_out.bias", "ln_final.bias", "text_model.final_layer_norm.bias"),
    ("text_tower.to_latent.weight", "text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale", "logit_scale"),
)
_STACKS = (
    ("image_tower.blocks", "visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("text_tower.blocks", "transformer.resblocks", "text_model.encoder.layers"),
)
_LEAVES = (
    ("attn_norm.weight", "ln_1.weight", "layer_norm1.weight"),
    ("attn_norm.bias", "ln_1.bias", "layer_norm1.bias"),
    ("to_qkv.weight", "attn.in_proj_weight", "self_attn.{}_proj.weight"),
    ("to_qkv.bias", "attn.in_proj_bias", "self_attn.{}_proj.bias"),
    ("to_out.weight", "attn.out_proj.weight", "self_attn.out_proj.weight"),
    ("to_out.bias", "attn.out_proj.bias", "self_attn.out_proj.bias"),
    ("ff_norm.weight", "ln_2.weight", "layer_norm2.weight"),
    ("ff_norm.bias", "ln_2.bias", "layer_norm2.bias"),
    ("w_in.weight", "mlp.c_fc.weight", "mlp.fc1.weight"),
    ("w_in.bias", "mlp.c_fc.bias", "mlp.fc1.bias"),
    ("w_out.weight", "mlp.c_proj.weight", "mlp.fc2.weight"),
    ("w_out.bias", "mlp.c_proj.bias", "mlp.fc2.bias"),
)
_SPLIT = "qkv"
_TURNED = ("visual.proj", "text_projection")

_FROM_TOP = {theirs: ours for ours, *both in _TOP for theirs in both}
_FROM_STACK = {theirs: ours for ours, *both in _STACKS for theirs in both}
# a leaf's name -> ours, and which of the three it is
_FROM_LEAF: dict[str, tuple[str, str | None]] = {theirs: (ours, None) for ours, theirs, _ in _LEAVES}
_FROM_LEAF |= {theirs: (ours, None) for ours, _, theirs in _LEAVES if "{}" not in theirs}
_FROM_LEAF |= {theirs.format(part): (ours, part) for ours, _, theirs in _LEAVES if "{}" in theirs for part in _SPLIT}

_IN_STACK = re.compile(r"^(?P<stack>[a-z_.]+)\.(?P<layer>\d+)\.(?P<leaf>.+)$")
_WRAPPERS = ("module.", "_orig_mod.")
_CUSTOM_TEXT = "text."
_SAYS_NOTHING = re.compile(r"^(input_resolution|context_length|vocab_size|(text\.)?attn_mask)$|\.position_ids$")


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names; of names that nobody here uses, and of thirds that do not fit together, as they came.

    Tensors are those given, but for turned projections, and queries, keys and values that come apart.
    """
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in state_dict.items():
        bare = without_wrappers(name)
        if _SAYS_NOTHING.search(bare):
            continue
        ours, part = _our_name(bare)
        if part is not None:
            apart.setdefault(ours, {})[part] = (name, tensor)
        elif bare in _TURNED and tensor.dim() == 2:
            found[ours] = tensor.t().contiguous()  # a product's bits depend on how its matrix lies in memory
        else:
            found[ours] = tensor.reshape(()) if ours == "logit_scale" and tensor.numel() == 1 else tensor
    for ours, parts in apart.items():
        thirds = [parts[part][1] for part in _SPLIT if part in parts]
        alike = len({(t.shape, t.dtype) for t in thirds}) == 1 and thirds[0].dim() > 0
        if len(thirds) == len(_SPLIT) and alike:
            found[ours] = torch.cat(thirds)
        else:
            found.update(parts.values())
    return found


def to_openai(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under OpenAI's names and in its form, contiguous."""
    renamed = {_their_name(name, 1): tensor for name, tensor in state_dict.items()}
    return {name: (t.t() if name in _TURNED else t).contiguous() for name, t in renamed.items()}


def to_hugging_face(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of Hugging Face's CLIPModel and in its form, contiguous."""
    renamed = {}
    for name, tensor in state_dict.items():
        theirs = _their_name(name, 2)
        if "{}" in theirs:
            parts = tensor.chunk(len(_SPLIT))
            renamed.update({theirs.format(part): t.contiguous() for part, t in zip(_SPLIT, parts, strict=True)})
        else:
            renamed[theirs] = tensor.contiguous()
    return renamed


def our_names(image_layers: int, text_layers: int) -> set[str]:
    """Every tensor of a PretrainedCLIP with that many layers."""
    names = {ours for ours, *_ in _TOP}
    for (stack, *_), layers in zip(_STACKS, (image_layers, text_layers), strict=True):
        names |= {f"{stack}.{layer}.{leaf}" for layer in range(layers) for leaf, *_ in _LEAVES}
    return names


def layers_of(names: Iterable[str]) -> tuple[int, int]:
    """How many blocks the image and the text tower have, of our names."""
    found = [match for match in map(_IN_STACK.match, names) if match]
    image, text = (len({m["layer"] for m in found if m["stack"] == ours}) for ours, *_ in _STACKS)
    return image, text


def without_wrappers(name: str) -> str:
    """A name as OpenAI or Hugging Face writes it, without what training scripts and open_clip put before it."""
    before = None
    while before != name:
        before = name
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    inner = name.removeprefix(_CUSTOM_TEXT)
    return inner if inner in _FROM_TOP or _our_name(inner)[0] != inner else name


def normal_forms() -> frozenset[str]:
    """Names of OpenAI's and Hugging Face's files, with layer numbers replaced by N."""
    names = set(_FROM_TOP)
    for _, openai, hugging_face in _STACKS:
        for _, one, other in _LEAVES:
            names.add(f"{openai}.N.{one}")
            names |= {f"{hugging_face}.N.{other.format(part)}" for part in _SPLIT}
    return frozenset(names)


def _our_name(name: str) -> tuple[str, str | None]:
    """Our name (or the name itself), and which third of it this is."""
    if name in _FROM_TOP:
        return _FROM_TOP[name], None
    match = _IN_STACK.match(name)
    if match and match["stack"] in _FROM_STACK and match["leaf"] in _FROM_LEAF:
        leaf, part = _FROM_LEAF[match["leaf"]]
        return f"{_FROM_STACK[match['stack']]}.{match['layer']}.{leaf}", part
    return name, None


def _their_name(name: str, column: int) -> str:
    """The name in a column of the tables above, with {} where three tensors are one of ours."""
    top = {row[0]: row[column] for row in _TOP}
    if name in top:
        return top[name]
    match = _IN_STACK.match(name)
    stacks, leaves = ({row[0]: row[column] for row in table} for table in (_STACKS, _LEAVES))
    if not match or match["stack"] not in stacks or match["leaf"] not in leaves:
        raise ValueError(f"clip: a tensor must be one of PretrainedCLIP, got {name}. Pass model.state_dict().")
    return f"{stacks[match['stack']]}.{match['layer']}.{leaves[match['leaf']]}"
