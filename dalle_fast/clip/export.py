"""A PretrainedCLIP as others store it: OpenAI's state dict (open_clip's is the same), Hugging Face's and its config."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dalle_fast.clip.architecture import HEAD_WIDTH, open_clip_head_width
from dalle_fast.clip.model import PretrainedCLIP
from dalle_fast.clip.names import to_hugging_face, to_openai


def openai_state_dict(model: PretrainedCLIP) -> dict[str, Tensor]:
    """The tensors under OpenAI's names, queries, keys and values in one; contiguous, their dtypes kept.

    OpenAI's code and open_clip's infer the sizes from it and assume their own heads, and OpenAI's assumes QuickGELU.

    Raises: ValueError (heads that nobody could infer from it).
    """
    config = model.config
    for which, width_of_head in (
        ("vision", open_clip_head_width(config["vision_width"])),
        ("text", HEAD_WIDTH),
    ):
        width, heads = config[f"{which}_width"], config[f"{which}_heads"]
        if heads is not None and heads * width_of_head != width:
            raise ValueError(
                f"openai_state_dict: {which}_heads must be {width / width_of_head:g} for a width of {width}, which "
                f"is what readers of this format assume, got {heads}. Export it with hugging_face_state_dict."
            )
    return to_openai(model.state_dict())


def hugging_face_state_dict(model: PretrainedCLIP) -> dict[str, Tensor]:
    """The tensors under the names of Hugging Face's CLIPModel; contiguous, their dtypes kept."""
    return to_hugging_face(model.state_dict())


def hugging_face_config(model: PretrainedCLIP) -> dict[str, Any]:
    """config.json of a CLIPModel directory, whose model.safetensors holds `hugging_face_state_dict`."""
    config = model.config
    last = config["vocab_size"] - 1
    shared = {
        "hidden_act": "quick_gelu" if config["quick_gelu"] else "gelu",
        "layer_norm_eps": config["norm_eps"],
        "projection_dim": config["embed_dim"],
    }
    towers: dict[str, dict[str, Any]] = {
        which: {
            "hidden_size": config[f"{which}_width"],
            "num_hidden_layers": config[f"{which}_layers"],
            "num_attention_heads": config[f"{which}_heads"] or config[f"{which}_width"] // HEAD_WIDTH,
            "intermediate_size": config[f"{which}_hidden"] or 4 * config[f"{which}_width"],
            **shared,
        }
        for which in ("text", "vision")
    }
    towers["text"] |= {
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["context_length"],
        "bos_token_id": max(last - 1, 0),
        "eos_token_id": last if config["end_token"] is None else config["end_token"],
        "pad_token_id": None,
    }
    towers["vision"] |= {"image_size": config["image_size"], "patch_size": config["patch_size"], "num_channels": 3}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": {"model_type": "clip_text_model", **towers["text"]},
        "vision_config": {"model_type": "clip_vision_model", **towers["vision"]},
    }
