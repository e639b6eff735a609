"""Drawing against the original: greedy codes exactly, pictures and scores within tolerance; a trainer's checkpoint."""

from __future__ import annotations

import pytest
import torch
from golden_cases import FOLDER, golden, names
from torch import Tensor

from dalle_fast import DALLE, DiscreteVAE
from dalle_fast.compat import upstream_names

TINY_GRADIENT = 1e-3  # share of a tensor's largest gradient below which Adam's first steps are mostly rounding


@pytest.mark.parametrize("name", names("dalle_generate"))
@pytest.mark.parametrize("use_cache", [False, True])
def test_drawn_codes_and_pictures(name: str, use_cache: bool) -> None:
    case = golden(name)
    dalle = case.build_dalle()
    text = case.inputs["text"]
    clip = case.build_clip(case.inputs_below("clip.")).eval() if "clip" in case.models else None
    arguments = {**case.spec["call"]["kwargs"], "use_cache": use_cache, "img": case.inputs.get("img"), "clip": clip}
    images, *scores, codes = dalle.generate_images(text, return_tokens=True, **arguments)
    case.check("tokens", codes)
    case.check("images", images)
    assert len(scores) == (clip is not None)
    for score in scores:
        case.check("scores", score)
    assert torch.equal(text, golden(name).inputs["text"])


@pytest.mark.parametrize("name", names("dalle_generate"))
def test_other_calls_of_a_case_differ_in_the_cache_alone(name: str) -> None:
    """So the test above makes every call that must give the same codes."""
    spec = golden(name).spec
    for other in spec["also_equal"]:
        assert {**other["kwargs"], "use_cache": None} == {**spec["call"]["kwargs"], "use_cache": None}


@pytest.fixture(scope="module")
def checkpoint() -> dict:
    return torch.load(FOLDER / "checkpoint_dalle.pt", weights_only=True)


def from_checkpoint(checkpoint: dict) -> DALLE:
    return DALLE(vae=DiscreteVAE(**checkpoint["vae_params"]), **checkpoint["hparams"])


def test_a_trained_checkpoint_gives_its_logits_and_codes(checkpoint: dict) -> None:
    case = golden("checkpoint_dalle")
    dalle = from_checkpoint(checkpoint)
    dalle.load_state_dict(checkpoint["weights"])
    dalle.eval()
    with torch.no_grad():
        case.check("logits", dalle(case.inputs["text"], case.inputs["image"]))
    for use_cache in (False, True):
        _, codes = dalle.generate_images(
            case.inputs["gen_text"], filter_thres=0.9999, use_cache=use_cache, return_tokens=True
        )
        case.check("tokens", codes)


def test_three_steps_of_training_end_in_the_checkpoint(checkpoint: dict) -> None:
    case = golden("checkpoint_dalle")
    dalle = from_checkpoint(checkpoint)
    dalle.load_state_dict(case.weights)
    dalle.train()
    trained = {name: p for name, p in dalle.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=3e-4)
    losses, clear = [], {}
    for step in range(3):
        loss = dalle(case.inputs[f"text_{step}"], case.inputs[f"images_{step}"], return_loss=True)
        loss.backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        for name, p in trained.items():
            clear[name] = clear.get(name, True) & (p.grad.abs() > TINY_GRADIENT * p.grad.abs().max())
        optimizer.step()
        optimizer.zero_grad()
    case.check("losses", torch.stack(losses))

    mapping, atol = upstream_names(dalle), case.spec["tolerance"]["weights_after"]["atol"]
    compared = 0
    for name, p in trained.items():
        stored: Tensor = checkpoint["weights"][mapping[name]].reshape(p.shape)
        difference = (p.detach() - stored).abs()[clear[name]]
        compared += difference.numel()
        assert difference.numel() == 0 or float(difference.max()) <= atol, name
    assert compared > 0.5 * sum(p.numel() for p in trained.values())
