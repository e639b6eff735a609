"""CLIP against the original's numbers."""

from __future__ import annotations

import pytest
import torch
from golden_cases import golden
from torch import Tensor

from dalle_fast.compat import upstream_names

pytestmark = pytest.mark.usefixtures("attention")


def test_similarities_losses_and_gradients() -> None:
    case = golden("clip")
    clip = case.build_clip()
    text, image, mask = case.inputs["text"], case.inputs["image"], case.inputs["mask"].bool()
    with torch.no_grad():
        case.check("sim", clip(text, image))
        case.check("sim_mask", clip(text, image, text_mask=mask))
        short = text[:, : text.shape[1] - 4]
        case.check("sim_short_text", clip(short, image))
    for suffix, arguments in (("", {}), ("_mask", {"text_mask": mask})):
        clip.zero_grad()
        loss: Tensor = clip(text, image, return_loss=True, **arguments)
        case.check(f"loss{suffix}", loss)
        loss.backward()
        mapping = upstream_names(clip)
        gradients = {f"grad{suffix}.{mapping[name]}": p.grad for name, p in clip.named_parameters()}
        stored = [output for output in case.outputs if output.startswith(f"grad{suffix}.")]
        assert len(stored) > 5
        for output in stored:
            case.check(output, gradients[output])
