"""The golden cases of dalle_pytorch 1.6.6 (tests/golden): one loader, and one comparison with a case's own tolerance.

case = golden("dalle_full")
dalle = case.build_dalle()
case.check("logits", dalle(case.inputs["text"], case.inputs["image"]))
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """One case: what to build (`spec`), its weights under upstream's names, its inputs, what the original gave."""

    name: str
    kind: str
    spec: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def models(self) -> dict[str, Any]:
        """Constructor arguments, by model."""
        return self.spec["models"]

    def build_dalle(self, **changes: Any) -> nn.Module:
        """DALLE with the case's arguments (`changes` over them) and weights, in the case's mode."""
        from dalle_fast import DALLE

        dalle = DALLE(vae=self.build_vae(load=False), **{**self.models["dalle"], **changes})
        return self._ready(dalle, self.weights)

    def build_vae(self, *, load: bool = True) -> nn.Module:
        from dalle_fast import DiscreteVAE

        vae = DiscreteVAE(**self.models["vae"])
        return self._ready(vae, self.weights) if load else vae

    def build_clip(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """CLIP with the case's weights, or with `weights` (generation cases carry theirs among the inputs)."""
        from dalle_fast import CLIP

        return self._ready(CLIP(**self.models["clip"]), self.weights if weights is None else weights)

    def inputs_below(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.inputs.items() if k.startswith(prefix)}

    def check(self, output: str, got: Tensor, *, tolerance: str | None = None) -> None:
        """`got` is the stored output: |got - stored| <= atol + rtol * |stored|, or equal where the case says exact.

        tolerance: the name the tolerance is stored under, where it is not the output's own.
        """
        stored = self.outputs[output]
        allowed = self.spec["tolerance"][tolerance or output]
        if allowed == "exact":
            assert torch.equal(got.cpu().to(stored.dtype), stored), f"{self.name}: {output} differs"
            return
        torch.testing.assert_close(
            got.detach().cpu().to(stored.dtype),
            stored,
            atol=allowed["atol"],
            rtol=allowed["rtol"],
            msg=lambda text: f"{self.name}: {output}\n{text}",
        )

    def _ready(self, model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
        model.load_state_dict(weights)
        return model.train(self.spec["mode"] == "train")


@functools.cache
def _specs() -> dict[str, dict[str, Any]]:
    listed = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))["cases"]
    return {spec["name"]: spec for spec in listed}


@functools.cache
def _tensors(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / file)


def names(kind: str) -> list[str]:
    """Names of the cases of a kind, in the order of cases.json."""
    return [name for name, spec in _specs().items() if spec["kind"] == kind]


def golden(name: str) -> GoldenCase:
    """A case with fresh copies of its tensors, so that a test may write into them."""
    spec = _specs()[name]
    own = _tensors(spec["file"])
    shared = _tensors(spec.get("weights_file", spec["file"]))
    return GoldenCase(name, spec["kind"], spec, _below(shared, "w."), _below(own, "in."), _below(own, "out."))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
