"""DALLE against the original's numbers: losses, every gradient, partial sequences, guidance, cached steps."""

from __future__ import annotations

import pytest
import torch
from golden_cases import GoldenCase, golden, names
from torch import Tensor

from dalle_fast.compat import upstream_names

pytestmark = pytest.mark.usefixtures("attention")


@pytest.mark.parametrize("name", names("dalle_loss"))
def test_logits_loss_and_gradients(name: str) -> None:
    case = golden(name)
    dalle = case.build_dalle()
    text, image = case.inputs["text"], case.inputs["image"]
    if "codes" in case.outputs:
        assert torch.equal(dalle.vae.get_codebook_indices(image), case.outputs["codes"])
    with torch.no_grad():
        case.check("logits", dalle(text, image))
    loss = dalle(text, image, return_loss=True)
    case.check("loss", loss)
    loss.backward()

    mapping = upstream_names(dalle)
    gradients = {mapping[n]: p.grad for n, p in dalle.named_parameters() if p.requires_grad}
    for output in case.outputs:
        if output.startswith("grad."):
            case.check(output, gradients[output.removeprefix("grad.")].reshape(case.outputs[output].shape))
    assert gradients.keys() == case.spec["grad_norms"].keys()
    for upstream_name, norm in case.spec["grad_norms"].items():
        assert_norm(case, upstream_name, gradients[upstream_name], norm)


def assert_norm(case: GoldenCase, name: str, gradient: Tensor, norm: float) -> None:
    """If every element differs by at most atol + rtol |g|, the norm does by at most atol sqrt(n) + rtol norm."""
    per_element = [t for output, t in case.spec["tolerance"].items() if output.startswith("grad.")]
    atol, rtol = max(t["atol"] for t in per_element), max(t["rtol"] for t in per_element)
    got = float(gradient.norm())
    assert abs(got - norm) <= atol * gradient.numel() ** 0.5 + rtol * norm, f"{case.name}: {name}: {got} against {norm}"


@pytest.mark.parametrize("name", names("dalle_partial"))
@torch.no_grad()
def test_partial_images(name: str) -> None:
    case = golden(name)
    dalle = case.build_dalle()
    for length in case.spec["call"]["lens"]:
        output = f"logits_len_{'none' if length is None else length}"
        image = None if length is None else case.inputs["image"][:, :length]
        case.check(output, dalle(case.inputs["text"], image), tolerance="logits")


@pytest.mark.parametrize("name", names("dalle_null_cond"))
@torch.no_grad()
def test_null_conditioning(name: str) -> None:
    case = golden(name)
    dalle = case.build_dalle()
    text, image = case.inputs["text"], case.inputs["image"]
    case.check("logits", dalle(text, image, null_cond_prob=1.0))
    case.check("loss", dalle(text, image, null_cond_prob=1.0, return_loss=True))
    case.check("logits_cond_scale", dalle.forward_with_cond_scale(text, image[:, :9], cond_scale=2.5))
    assert torch.equal(text, golden(name).inputs["text"])  # the original zeroed it (B1)


@pytest.mark.parametrize("name", names("dalle_cached"))
@torch.no_grad()
def test_cached_steps_equal_uncached_ones(name: str) -> None:
    case = golden(name)
    dalle = case.build_dalle()
    start, steps = case.spec["call"]["start"], case.spec["call"]["steps"]
    cache: dict = {}
    rows = [
        dalle(case.inputs["text"], case.inputs["image"][:, : start + step], cache=cache)[:, -1] for step in range(steps)
    ]
    case.check("logits_uncached", torch.stack(rows, dim=1), tolerance="logits")
