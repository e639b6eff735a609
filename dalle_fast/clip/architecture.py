"""What a CLIP's tensors say of the model: its sizes, and why we cannot run it where we cannot.

Sizes follow from shapes. Two things do not: how many heads share a width, and which GELU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle_fast.clip.names import layers_of, our_names, without_wrappers
from dalle_fast.models.state_dicts import some

HEAD_WIDTH = 64  # OpenAI's, everywhere
# open_clip's large image towers: model width -> width of a head (H, g, bigG, e)
_OTHER_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
_RESNETS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "RN50", (3, 4, 23, 3): "RN101", (4, 6, 10, 6): "RN50x4", (6, 8, 18, 8): "RN50x16",
    (3, 15, 36, 10): "RN50x64",
}  # fmt: skip
# of the tensors that sizes are taken from
_DIMENSIONS = {
    "image_tower.to_patches.weight": 4,
    "image_tower.pos_emb": 2,
    "image_tower.to_latent.weight": 2,
    "image_tower.blocks.0.w_in.weight": 2,
    "text_tower.token_emb.weight": 2,
    "text_tower.pos_emb": 2,
    "text_tower.blocks.0.w_in.weight": 2,
}
_MARKS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", "visual.layer1.0.conv1.weight")
_OF_TIMM = "visual.trunk."


def is_clip(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are those of a CLIP, one that we run or one that we name."""
    bare = {without_wrappers(name) for name in names if isinstance(name, str)}
    towers = any(mark in bare for mark in _MARKS) or any(name.startswith(_OF_TIMM) for name in bare)
    return towers and "logit_scale" in bare


def why_not(names: Mapping[str, Tensor]) -> str | None:
    """Why a CLIP of these tensors is none that we run, by the kind it is of; None where it is not one of these."""
    bare = {without_wrappers(name) for name in names}
    if "visual.layer1.0.conv1.weight" in bare:
        stages = tuple(
            len({name.split(".")[2] for name in bare if name.startswith(f"visual.layer{stage}.")})
            for stage in range(1, 5)
        )
        name = _RESNETS.get(stages, "a ResNet")
        return f"its image tower is a ResNet ({name}), and only vision transformers run here. Take a ViT, like ViT-B/32"
    if any(name.startswith(_OF_TIMM) for name in bare):
        return "its image tower is a model of timm, and only OpenAI's vision transformer runs here. Take a ViT"
    if "logit_bias" in bare:
        return "it has a logit_bias: it is a SigLIP, whose scores are not CLIP's. Take a CLIP"
    if any(name.startswith("text_decoder.") for name in bare):
        return "it has a text_decoder: it is a CoCa, which reads texts differently. Take a CLIP"
    if "text_emb.weight" in bare and "to_visual_embedding.weight" in bare:
        return "it is the CLIP of dalle_pytorch, another architecture. Load it with dalle_fast.CLIP"
    return None


def sizes_of(
    weights: Mapping[str, Tensor], where: str, *, vision_heads: int | None = None, text_heads: int | None = None
) -> dict[str, Any]:
    """Arguments of PretrainedCLIP that fit tensors under our names.

    Args:
        where: what they are from, for the error.
        vision_heads, text_heads: None: a head for every 64 of the width, or as open_clip's models of that width.
    Raises: ValueError (tensors missing or unknown, shapes that are no CLIP's).
    """
    image_layers, text_layers = layers_of(weights)
    own = our_names(image_layers, text_layers)
    missing, unknown = sorted(own - set(weights)), sorted(set(weights) - own)
    if missing or unknown or not image_layers or not text_layers:
        raise ValueError(
            f"clip.load: {where} must hold the tensors of OpenAI's vision transformer and text transformer; missing: "
            f"{some(missing)}; unknown: {some(unknown)}. Another architecture under the name of CLIP cannot be loaded."
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.dim() != _DIMENSIONS.get(name, tensor.dim()):
            raise ValueError(
                f"clip.load: {name} in {where} must be floating{_dimensions(name)}, got {tensor.dtype} "
                f"{list(tensor.shape)}. Is the file damaged, or its weights quantised?"
            )
    patches, positions = weights["image_tower.to_patches.weight"], weights["image_tower.pos_emb"]
    width, channels, patch_size, other_side = patches.shape
    side = math.isqrt(max(len(positions) - 1, 0))
    if channels != 3 or patch_size != other_side or side < 1 or side * side + 1 != len(positions):
        raise ValueError(
            f"clip.load: {where} must cut square pictures of 3 channels into square patches, got patches "
            f"{list(patches.shape)} and {len(positions)} positions. Another architecture cannot be loaded."
        )
    text_width = weights["text_tower.token_emb.weight"].shape[-1]
    return {
        "embed_dim": len(weights["image_tower.to_latent.weight"]),
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "vision_width": width,
        "vision_layers": image_layers,
        "vision_heads": _heads("vision", width, vision_heads, open_clip_head_width(width), where),
        "vision_hidden": len(weights["image_tower.blocks.0.w_in.weight"]),
        "context_length": len(weights["text_tower.pos_emb"]),
        "vocab_size": len(weights["text_tower.token_emb.weight"]),
        "text_width": text_width,
        "text_layers": text_layers,
        "text_heads": _heads("text", text_width, text_heads, HEAD_WIDTH, where),
        "text_hidden": len(weights["text_tower.blocks.0.w_in.weight"]),
    }


def open_clip_head_width(width: int) -> int:
    """How wide a head of an image tower of this width is, in the models that OpenAI and open_clip published."""
    return _OTHER_HEAD_WIDTHS.get(width, HEAD_WIDTH)


def _dimensions(name: str) -> str:
    return f" with {_DIMENSIONS[name]} dimensions" if name in _DIMENSIONS else ""


def _heads(which: str, width: int, given: int | None, head_width: int, where: str) -> int:
    if given is None and width % head_width:
        raise ValueError(
            f"clip.load: {where} must have a {which} width of whole heads of {head_width}, got {width}. "
            f"Pass {which}_heads, the number of heads it was trained with."
        )
    return width // head_width if given is None else given
