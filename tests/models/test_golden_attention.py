"""Single attention layers against the original's numbers."""

from __future__ import annotations

import pytest
from golden_cases import golden, names

from dalle_fast import attention

pytestmark = pytest.mark.usefixtures("attention")


@pytest.mark.parametrize("name", names("attn_module"))
def test_attention_layer(name: str) -> None:
    case = golden(name)
    spec = case.models["attn"]
    arguments = dict(spec["kwargs"])
    if spec["static_mask"] is not None:
        arguments["static_mask"] = case.inputs["static_mask"]
    layer = getattr(attention, spec["cls"])(**arguments)
    layer.load_state_dict(case.weights)
    x = case.inputs["x"].requires_grad_()
    y = layer(x, mask=case.inputs.get("mask"), rotary_pos_emb=case.inputs.get("rotary_pos_emb"))
    case.check("y", y)
    (y * case.inputs["grad_out"]).sum().backward()
    case.check("grad.x", x.grad)
    for parameter, value in layer.named_parameters():
        case.check(f"grad.{parameter}", value.grad)
