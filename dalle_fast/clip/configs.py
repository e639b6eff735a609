"""What the JSON beside a CLIP's weights says that they do not: Hugging Face's config.json, open_clip's.

Both are read for heads, GELU, end token, eps and the pixels' mean and std; sizes come from the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUGGING_FACE, OPEN_CLIP = "config.json", "open_clip_config.json"
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_OLD_END_TOKEN = 2  # of old files by mistake: it means the largest id, as everywhere
_PIXELS = ("preprocessor_config.json", "processor_config.json")
# keys of open_clip's config whose every value leaves the architecture OpenAI's
_OPEN_CLIP_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_OPEN_CLIP_TEXT = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id",
    "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip


def is_hugging_face(directory: Path) -> bool:
    """Whether there is the config.json of a CLIPModel."""
    config = read_json(directory / HUGGING_FACE)
    return config is not None and (config.get("model_type") == "clip" or config.get("architectures") == ["CLIPModel"])


def of_hugging_face(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Arguments of PretrainedCLIP that a CLIPModel's config says.

    Raises: ValueError (a config that we cannot run).
    """
    path = directory / HUGGING_FACE
    config = read_json(path) or {}
    text, vision = (
        {**_mapping(config.get(f"{which}_config")), **_mapping(config.get(f"{which}_config_dict"))}
        for which in ("text", "vision")
    )
    acts = {str(tower.get("hidden_act", "quick_gelu")) for tower in (text, vision)}
    if len(acts) > 1 or not acts <= set(_ACTIVATIONS):
        raise ValueError(
            f"clip.load: hidden_act in {path} must be quick_gelu or gelu, the same for both towers, got "
            f"{', '.join(sorted(acts))}. Such a model cannot be loaded."
        )
    eps = {float(tower.get("layer_norm_eps", 1e-5)) for tower in (text, vision)}
    if len(eps) > 1:
        raise ValueError(
            f"clip.load: layer_norm_eps in {path} must be the same for both towers, got {sorted(eps)}. Such a model "
            "cannot be loaded."
        )
    end = text.get("eos_token_id")
    largest = not isinstance(end, int) or end == _OLD_END_TOKEN or end >= vocab_size - 1
    return {
        "quick_gelu": _ACTIVATIONS[acts.pop()],
        "norm_eps": eps.pop(),
        "vision_heads": int(vision.get("num_attention_heads", 12)),
        "text_heads": int(text.get("num_attention_heads", 8)),
        "end_token": None if largest else end,
        **_pixels(directory),
    }


def of_open_clip(directory: Path) -> dict[str, Any]:
    """Arguments of PretrainedCLIP that open_clip's config says; {} where there is none.

    Raises: ValueError (an architecture that is not OpenAI's).
    """
    path = directory / OPEN_CLIP
    config = read_json(path)
    if config is None:
        return {}
    model = _mapping(config.get("model_cfg"))
    vision, text = _mapping(model.get("vision_cfg")), _mapping(model.get("text_cfg"))
    other = [key for key, value in vision.items() if value and key not in _OPEN_CLIP_VISION and value != "tok"]
    other += [key for key, value in text.items() if value and key not in _OPEN_CLIP_TEXT]
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos") or (pool == "eos" and not isinstance(text.get("eos_id"), int)):
        other.append(f"pool_type {pool}")
    if other:
        raise ValueError(
            f"clip.load: {path} must describe OpenAI's architecture, got one with {', '.join(other)}. Such a model "
            "cannot be loaded."
        )
    said: dict[str, Any] = {"quick_gelu": bool(model.get("quick_gelu", False))}
    if isinstance(vision.get("width"), int):
        said["vision_heads"] = vision["width"] // int(vision.get("head_width", 64))
    if isinstance(text.get("heads"), int):
        said["text_heads"] = text["heads"]
    if pool == "eos":
        said["end_token"] = text["eos_id"]
    pixels = _mapping(config.get("preprocess_cfg"))
    return said | _mean_and_std(pixels.get("mean"), pixels.get("std"))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _pixels(directory: Path) -> dict[str, Any]:
    for name in _PIXELS:
        config = read_json(directory / name)
        if config is not None:
            pixels = _mapping(config.get("image_processor", config))
            return _mean_and_std(pixels.get("image_mean"), pixels.get("image_std"))
    return {}


def _mean_and_std(mean: Any, std: Any) -> dict[str, Any]:
    both = {"image_mean": mean, "image_std": std}
    fits = all(
        isinstance(three, list) and len(three) == 3 and all(isinstance(value, int | float) for value in three)
        for three in both.values()
    )
    return both if fits else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
