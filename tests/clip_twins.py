"""Published CLIPs with small random weights, as twins: those of clip-anytorch, open_clip and transformers.

The first two import torchvision for what no test needs: their model files are taken alone, from packages that are
entered without running their `__init__`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from tolerance import assert_within_budget
from torch import Tensor, nn

from dalle_fast.clip import PretrainedCLIP

SIDE, CONTEXT, VOCABULARY = 32, 16, 60
END = VOCABULARY - 1


def openai_module(name: str = "model") -> types.ModuleType:
    """A module of clip-anytorch: OpenAI's code."""
    return _entered("clip", name, "clip-anytorch", {})


def open_clip_module(name: str = "model") -> types.ModuleType:
    """A module of open_clip."""
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = nn.BatchNorm2d
    names = ("torchvision", "torchvision.ops")
    stubs = {name: types.ModuleType(name) for name in names} | {"torchvision.ops.misc": misc, "transformers": None}
    return _entered("open_clip", name, "open_clip_torch", stubs)


def openai_twin(**changes) -> nn.Module:
    """OpenAI's CLIP: two heads in the image tower, one in the text tower."""
    sizes = {
        "embed_dim": 24, "image_resolution": SIDE, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 8,
        "context_length": CONTEXT, "vocab_size": VOCABULARY, "transformer_width": 64, "transformer_heads": 1,
        "transformer_layers": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    return shaken(openai_module().CLIP(**sizes | changes))


def open_clip_twin(kind: str = "CLIP", *, quick_gelu: bool = False, vision: dict | None = None, **more) -> nn.Module:
    """open_clip's CLIP or CustomTextCLIP of the same sizes."""
    module = open_clip_module()
    vision_cfg = {"layers": 2, "width": 128, "patch_size": 8, "image_size": SIDE} | (vision or {})
    text_cfg = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 3}
    torch.manual_seed(0)
    return shaken(getattr(module, kind)(24, vision_cfg, text_cfg, quick_gelu=quick_gelu, **more))


def hugging_face_twin(*, act: str = "quick_gelu", eps: float = 1e-5, end: int = END) -> nn.Module:
    """transformers' CLIPModel: heads that are not 64 wide."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shared = {"hidden_act": act, "layer_norm_eps": eps, "projection_dim": 24}
    text = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
        "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": end, "bos_token_id": 1,
        "pad_token_id": 0, **shared,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 160,
        "image_size": SIDE, "patch_size": 8, **shared,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return shaken(transformers.CLIPModel(config))


def shaken(model: nn.Module) -> nn.Module:
    """The model with nothing left at its initial value, in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pictures(n: int = 3) -> Tensor:
    """Normalised pixels [n, 3, 32, 32]."""
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(n))


def texts() -> Tensor:
    """Ids [4, 16] of texts of several lengths, the end token last, then zeros; one fills the row."""
    rows = torch.zeros(4, CONTEXT, dtype=torch.long)
    chance = torch.Generator().manual_seed(4)
    for row, length in zip(rows, (3, 7, CONTEXT, 2), strict=True):
        row[:length] = torch.randint(3, END, (length,), generator=chance)
        row[length - 1] = END
    return rows


@torch.no_grad()
def check_against_twin(model: PretrainedCLIP, twin: nn.Module) -> None:
    """Features and logits of the model are within the budget that the twin itself has in float32."""
    exact, own, got = (_all_of(one, dtype) for one, dtype in (
        (_in_float64(twin), torch.float64), (twin, torch.float32), (model, torch.float32))
    )  # fmt: skip
    for name, value in got.items():
        assert_within_budget(value, exact[name], own[name], name)


def _all_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    images, ids = pictures().to(dtype), texts()
    if hasattr(model, "vision_model"):
        said = model(input_ids=ids, pixel_values=images)
        unit = {"image": said.image_embeds, "text": said.text_embeds}
        logits = said.logits_per_image
    else:
        features = {"image": model.encode_image(images), "text": model.encode_text(ids)}
        unit = {name: nn.functional.normalize(value, dim=-1) for name, value in features.items()}
        logits = model.logit_scale.exp() * unit["image"] @ unit["text"].t()
    if isinstance(model, PretrainedCLIP):
        logits = model(images, ids)[0]
    return unit | {"logits": logits}


def _in_float64(twin: nn.Module) -> nn.Module:
    twin = copy.deepcopy(twin).double()
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):  # OpenAI's rounds to float32
            module.forward = types.MethodType(nn.LayerNorm.forward, module)
    return twin


def _entered(package: str, name: str, distribution: str, stubs: dict[str, types.ModuleType | None]) -> types.ModuleType:
    """package.name, imported with stand-ins for what it imports and does not need."""
    full = f"{package}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    folders = spec.submodule_search_locations if spec else getattr(sys.modules.get(package), "__path__", None)
    folder = next((place for place in folders or () if (Path(place) / f"{name}.py").is_file()), None)
    if folder is None:
        pytest.skip(f"{distribution} is not installed. Install it: pip install --no-deps {distribution}")
    entered = types.ModuleType(package)
    entered.__path__ = [folder]
    missing = object()
    before = {module: sys.modules.get(module, missing) for module in stubs}
    sys.modules[package] = entered
    sys.modules.update(stubs)
    try:
        return importlib.import_module(full)
    finally:
        for module, was in before.items():
            if was is missing:
                del sys.modules[module]
            else:
                sys.modules[module] = was
