"""Schedules are functions of the step; the plateau watches the loss as torch's class does."""

import json
import math

import pytest
import torch

pytest.importorskip("pydantic")

from dalle_fast.training.config import OptimiserConfig, Ramp, ScheduleConfig
from dalle_fast.training.schedules import Plateau, learning_rate, learning_rate_share, ramp


def test_ramps_begin_end_and_stay():
    for shape, middle in (("cosine", 0.53125), ("exponential", 0.25), ("linear", 0.53125), ("constant", 1.0)):
        config = Ramp(start=1.0, end=1 / 16, steps=100, shape=shape)
        end = 1.0 if shape == "constant" else 1 / 16
        assert ramp(config, 0) == 1.0
        assert ramp(config, 50) == pytest.approx(middle)
        assert ramp(config, 100) == ramp(config, 10_000) == pytest.approx(end)


def test_the_papers_temperature_falls_slowly_at_first():
    config = Ramp(start=1.0, end=1 / 16, steps=150_000)
    assert 1 - ramp(config, 15_000) < 0.1 * (1 - 1 / 16) / 2


def test_the_originals_temperature_does_not_compound():
    """Its trainer multiplies by exp(-1e-6 step) every 100 steps: 0.61 after 10,000, not 0.99."""
    config = Ramp(start=1.0, end=0.5, steps=round(math.log(2) / 1e-6), shape="exponential")
    assert ramp(config, 10_000) == pytest.approx(math.exp(-1e-2), rel=1e-5)
    compounded = 1.0
    for step in range(0, 10_001, 100):
        compounded *= math.exp(-1e-6 * step)
    assert compounded < 0.62


def test_an_exponential_ramp_to_zero_is_refused():
    with pytest.raises(ValueError, match=r"from a positive number to another, got 1\.0 to 0\.0"):
        ramp(Ramp(start=1.0, end=0.0, steps=5, shape="exponential"), 1)


def test_learning_rates_warm_up_then_fall_to_their_floor():
    cosine = ScheduleConfig(learning_rate="cosine", warmup_steps=4, final_share=0.1)
    shares = [learning_rate_share(cosine, step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(0.25, rel=1e-2) and shares[3] > shares[2]
    assert shares[100] == pytest.approx(0.1)
    assert shares[3:] == sorted(shares[3:], reverse=True)

    decay = ScheduleConfig(learning_rate="exponential", factor=0.98, every=100, final_share=0.5)
    assert learning_rate_share(decay, 250, 1000) == 0.98**2
    assert learning_rate_share(decay, 10**6, 10**7) == 0.5
    assert learning_rate_share(ScheduleConfig(), 7, 10) == 1.0
    part = ScheduleConfig(learning_rate="cosine", steps=10, final_share=0.2)
    assert learning_rate_share(part, 10, 1000) == learning_rate_share(part, 500, 1000) == pytest.approx(0.2)


def test_plateau_is_torchs_and_resumes():
    config = ScheduleConfig(learning_rate="plateau", factor=0.5, patience=1, cooldown=1, final_share=1 / 32)
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([weight], lr=3e-4)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=1, cooldown=1, min_lr=3e-4 / 32, eps=0.0
    )
    losses = [3.0, 2.0, 2.0, 2.5, 2.0, 1.9, *[2.0] * 40]
    plateau = Plateau(config, every=2)
    for number, loss in enumerate(losses):
        theirs.step(loss)
        plateau.read(loss - 0.5)
        # A run that stops in the middle of a reading goes on with what it had.
        stored = json.loads(json.dumps(plateau.state_dict()))
        plateau = Plateau(config, every=2)
        plateau.load_state_dict(stored)
        plateau.read(loss + 0.5)
        assert plateau.share * 3e-4 == optimiser.param_groups[0]["lr"], number
    assert plateau.share == 1 / 32
    assert learning_rate(OptimiserConfig(learning_rate=1e-3), config, 3, 9, plateau) == 1e-3 / 32
