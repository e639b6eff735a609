"""Small VQGANs with random weights: ours, and the published package's beside stubs of what only its training needs."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from dalle_fast.compat.formats.taming_vqgan import taming_names
from dalle_fast.models.vqgan import VQGanVAE

TARGETS = {"vq": "taming.models.vqgan.VQModel", "gumbel": "taming.models.vqgan.GumbelVQ"}
_STUBS = (
    "pytorch_lightning",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.trainer",
    "pytorch_lightning.utilities",
    "pytorch_lightning.utilities.distributed",
    "torchvision",
    "omegaconf",
)
# as the published ones, 32 channels wide instead of 128
_NETWORKS = {
    "vq": {"ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [4], "z_channels": 24},
    "gumbel": {"ch_mult": [1, 1, 2, 4], "attn_resolutions": [8], "z_channels": 16},
}


def yaml_of(kind: str, **changes: Any) -> dict[str, Any]:
    """What the yaml of a small VQGAN holds: f16 "vq", f8 "gumbel"; pictures 64 wide, 40 codes. changes: of ddconfig."""
    network = {
        "double_z": False,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "num_res_blocks": 1 if kind == "vq" else 2,
        "dropout": 0.0,
    }
    params: dict[str, Any] = {
        "embed_dim": 16,
        "n_embed": 40,
        "ddconfig": {**network, **_NETWORKS[kind], **changes},
        "lossconfig": {"target": "no_such_package.LossThatDownloads", "params": {"disc_start": 0}},
    }
    if kind == "gumbel":
        params["temperature_scheduler_config"] = {"target": "no_such_package.Scheduler"}
    return {"model": {"base_learning_rate": 4.5e-06, "target": TARGETS[kind], "params": params}}


def architecture(kind: str, **changes: Any) -> dict[str, Any]:
    """What `yaml_of(kind)` says, as VQGanVAE takes it."""
    network = _NETWORKS[kind]
    return {
        "image_size": 64,
        "channels": 3,
        "num_tokens": 40,
        "codebook_dim": 16,
        "quantizer": kind,
        "z_channels": network["z_channels"],
        "hidden_dim": 32,
        "multipliers": network["ch_mult"],
        "num_res_blocks": 1 if kind == "vq" else 2,
        "attention_levels": [4] if kind == "vq" else [3],
        **changes,
    }


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Nothing at its initial value: norms that scale and shift, codes apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            if "norm" in name:
                parameter.copy_(0.2 * noise + name.endswith("weight"))
            elif parameter.dim() == 4:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(noise * (0.3 if name.endswith("bias") else 1.0))
    return model


def small_vqgan(kind: str, **changes: Any) -> VQGanVAE:
    """16 ("vq") or 64 ("gumbel") codes of 40 a picture of 64 x 64."""
    return randomised(VQGanVAE(architecture=architecture(kind, **changes))).eval()


def weights(kind: str, **changes: object) -> dict[str, torch.Tensor]:
    """A small VQGAN's state dict under taming-transformers' names."""
    model = small_vqgan(kind, **changes) if changes else known_model(kind)
    names = taming_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


@functools.cache
def known_model(kind: str) -> VQGanVAE:
    """One for all tests; they only read it."""
    return small_vqgan(kind)


def checkpoint(folder: Path, kind: str, **extras: object) -> tuple[Path, Path]:
    """A .ckpt of a state dict, with what else is said, and its .yaml."""
    model, config = folder / "last.ckpt", folder / "model.yaml"
    torch.save({"state_dict": weights(kind), **extras}, model)
    config.write_text(yaml.safe_dump(yaml_of(kind)))
    return model, config


def pictures(batch: int, size: int = 64) -> Tensor:
    """[batch, 3, size, size] in 0..1."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def twin(kind: str) -> nn.Module:
    """The published model of `yaml_of(kind)`, randomised; skips the test in words where the package is not there."""
    if importlib.util.find_spec("taming") is None:
        pytest.skip("taming-transformers is not installed: pip install --no-deps taming-transformers-rom1504==0.0.6")
    params = copy.deepcopy(yaml_of(kind)["model"]["params"])
    for section in ("lossconfig", "temperature_scheduler_config"):
        if section in params:
            params[section] = {"target": "torch.nn.Identity"}
    with _stubs(), contextlib.redirect_stdout(io.StringIO()):
        published = importlib.import_module("taming.models.vqgan")
        model = getattr(published, TARGETS[kind].rpartition(".")[2])(**params)
    return randomised(model).eval().requires_grad_(False)


class _Anything(nn.Module):
    """Of any arguments; a decorator, too, of what nobody calls."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


class _Stub(types.ModuleType):
    """A module with any class in it."""

    __path__: list[str] = []  # noqa: RUF012  (as of any package)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


@contextlib.contextmanager
def _stubs() -> Iterator[None]:
    """Stands in for packages that are not there; none of them is seen afterwards."""
    added = [name for name in _STUBS if name not in sys.modules]
    sys.modules.update({name: _Stub(name) for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
