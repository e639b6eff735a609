"""Records what released versions of dalle_pytorch compute, for test_dalle_pytorch_releases.py.

    pip download --no-deps dalle-pytorch==1.0.5 and unpack it to FOLDER; then, with the peers of benchmarks/peers.py:
    PYTHONPATH=FOLDER:PEERS:. python tests/compat/record_releases.py 1.0.5

writes releases/1.0.5.safetensors: the file that its train_dalle.py would have saved, as names and shapes (numbers come
from `filled`, buffers are kept), and the logits of a text and a picture's codes.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "releases"
VAE = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4, "num_resnet_blocks": 1}
SIZES = {
    "num_text_tokens": 9, "text_seq_len": 4, "dim": 16, "depth": 4, "heads": 2, "dim_head": 8, "reversible": False,
    "loss_img_weight": 7, "ff_dropout": 0.0, "attn_dropout": 0.0,
}  # fmt: skip
ALL_TYPES = ("full", "axial_row", "axial_col", "conv_like")
# What each release's trainer put into hparams, beyond SIZES. Positions of 1.0.5 - 1.1.1 fit no sparse layer.
HPARAMS: dict[str, dict[str, Any]] = {
    "0.9.0": {"attn_types": ALL_TYPES},
    "0.10.0": {"attn_types": ALL_TYPES, "reversible": True},
    "0.12.1": {"attn_types": ALL_TYPES, "stable": True},
    "0.14.3": {"attn_types": ALL_TYPES, "stable": True, "reversible": True},
    "1.0.0": {"attn_types": ALL_TYPES},
    "1.0.1": {"attn_types": ALL_TYPES},
    "1.0.5": {"attn_types": ("full",)},
    "1.1.1": {"attn_types": ("full",), "stable": True, "sandwich_norm": True},
    "1.1.2": {"attn_types": ALL_TYPES},
    "1.1.6": {"attn_types": ALL_TYPES, "shift_tokens": False, "rotary_emb": True},
    "1.4.0": {"attn_types": ALL_TYPES, "shared_ff_ids": ("a", "b", "a", "b"), "share_input_output_emb": True},
    "1.5.0": {"attn_types": ALL_TYPES, "shift_tokens": True, "rotary_emb": False},
}


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers for a name and shape wherever they are asked for; those of norms and scales around 1."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    numbers = torch.sin(numbers * 12.9898 + zlib.crc32(name.encode()) % 10_000) * 0.4
    is_factor = name.endswith((".scale", "norm.weight", "norm_out.weight", "to_logits.0.weight")) and len(shape) != 2
    return (numbers + 1.0 * is_factor).float().reshape(shape)


def inputs() -> tuple[Tensor, Tensor]:
    """Two texts, one with padding, and the codes of two pictures."""
    return torch.tensor([[3, 8, 1, 5], [7, 2, 0, 0]]), torch.arange(32).reshape(2, 16) * 5 % 12


def recorded(release: str) -> tuple[dict[str, Any], Tensor]:
    """The checkpoint of a release as its trainer would have saved it, and its logits."""
    with safe_open(FOLDER / f"{release}.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    logits = tensors.pop("logits")
    weights = {name: tensors.get(name, filled(name, tuple(shape))) for name, shape in told.pop("shapes").items()}
    for name, first in told.pop("tied").items():
        weights[name] = weights[first]
    told["hparams"] = {k: tuple(v) if isinstance(v, list) else v for k, v in told["hparams"].items()}
    return {**told, "weights": weights}, logits


def _checkpoint(release: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"hparams": dict(hparams), "vae_params": VAE}
    if tuple(map(int, release.split("."))) >= (1, 1, 6):
        told |= {"version": release, "vae_class_name": "DiscreteVAE"}
    return told


def record(release: str) -> None:
    from benchmarks import peers
    from dalle_fast.models.state_dicts import aliases

    for name in ("transformers", "tokenizers", "tokenizers.processors", "pkg_resources"):
        sys.modules[name] = peers._Stub(name)
    sys.modules["pkg_resources"].get_distribution = lambda _: SimpleNamespace(version=release)  # type: ignore[attr-defined]
    with peers._stubbed((*peers.UNUSED, "g_mlp_pytorch")):
        import dalle_pytorch.dalle_pytorch as original
    hparams = SIZES | HPARAMS[release]
    model = original.DALLE(vae=original.DiscreteVAE(**VAE), **hparams).eval()
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = aliases(state)
    model.load_state_dict(
        {name: filled(tied.get(name, name), tuple(t.shape)) if name in parameters else t for name, t in state.items()}
    )
    with torch.no_grad():
        logits = model(*inputs())
    told = _checkpoint(release, hparams) | {"shapes": {n: list(t.shape) for n, t in state.items()}, "tied": tied}
    kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in parameters}
    FOLDER.mkdir(exist_ok=True)
    metadata = {"checkpoint": json.dumps(told)}
    save_file({**kept, "logits": logits}, FOLDER / f"{release}.safetensors", metadata=metadata)
    print(release, logits.shape, sorted(kept), float(logits[logits > -1e30].std()))


if __name__ == "__main__":
    record(sys.argv[1])
