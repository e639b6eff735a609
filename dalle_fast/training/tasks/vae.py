"""Training a VAE: a DiscreteVAE, through the gumbel softmax or as a VQ-VAE, or the paper's OpenAIDiscreteVAE.

    gumbel:  loss = reconstruction + beta(step) KL / (B c S^2) - entropy_weight H(mean code usage) + l1_weight L1
    vq:      loss = reconstruction + commitment_loss_weight commitment + l1_weight L1
    openai:  as gumbel without L1; its reconstruction loss is -ln of the logit-Laplace density (models/logit_laplace.py)

The KL divergence is summed over positions and the reconstruction a mean over c S^2 numbers, so beta is the paper's:
6.6 there is 6.6 / 192 of a position's KL at 256x256 and 32x32 codes. It does not grow with the batch.
vq: for `plain_steps` nothing is quantised; then codes are placed on vectors of a batch. Codes that nobody uses are
moved to where the error is large, until 80 % of the steps are done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.models.dvae import DiscreteVAE, ForwardStatistics
from dalle_fast.models.openai_dvae import OpenAIDiscreteVAE
from dalle_fast.models.quantiser import VectorQuantiser
from dalle_fast.sampling.gallery import to_pixels
from dalle_fast.training import schedules
from dalle_fast.training.codebook_usage import CodebookUsage, TrainingStatistics
from dalle_fast.training.config import VaeConfig
from dalle_fast.training.tasks.common import (
    accumulation,
    as_rgb,
    build,
    device_of,
    first_position,
    grid_of,
    images_of,
    seed_of_step,
    trainable,
)
from dalle_fast.training.tasks.fold import folded

_REVIVE_UNTIL = 0.8  # of the steps: a code that moves late has no time to learn
_SHOWN = 8
_OF_DISCRETE_VAE = ("l1_weight", "plain_steps", "fold")  # settings that mean nothing to the paper's model

Vae = DiscreteVAE | OpenAIDiscreteVAE


class VaeModule(nn.Module):
    """The loss of a batch. Attributes: model.   statistics: of the codes since the last row of the log."""

    def __init__(self, model: Vae, config: VaeConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.statistics: TrainingStatistics | None = None
        self._revive_below = getattr(model.codebook, "revive_below", 0.0)

    def forward(self, batch: Mapping[str, Any], step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its parts) of pixels uint8 [B, c, S, S]."""
        # Channels last: convolutions are faster so.
        images = images_of(batch["pixels"]).contiguous(memory_format=torch.channels_last)
        if isinstance(self.model.codebook, VectorQuantiser):
            return self._vq(images, step, progress)
        return self._gumbel(images, batch["position"], step)

    def _gumbel(self, images: Tensor, positions: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model, config = self.model, self.config
        beta, temperature = schedules.ramp(config.kl, step), schedules.ramp(config.temperature, step)
        rows = (model.image_size // 2**model.num_layers) ** 2
        # The class weighs the sum over the batch.
        model.kl_div_loss_weight = beta / images.numel()
        loss, recons, statistics = model(
            images,
            return_loss=True,
            return_recons=True,
            return_statistics=True,
            temp=temperature,
            seed=seed_of_step(config.loop.seed, step),
            first_row=(first_position(positions) - step * config.loop.batch) * rows,
        )
        parts = {"temperature": loss.new_tensor(temperature)}
        if statistics.penalty is not None:
            parts |= {"kl": statistics.penalty / len(images), "kl_weight": loss.new_tensor(beta)}
        if config.entropy_weight:
            usage = model(images, return_logits=True).float().softmax(dim=1).mean(dim=(0, 2, 3))
            entropy = torch.special.entr(usage).sum()
            loss = loss - config.entropy_weight * entropy
            parts["entropy"] = entropy.detach()
        return self._finished(images, loss, recons, statistics, parts)

    def _vq(self, images: Tensor, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        model, config = self.model, self.config
        assert isinstance(model, DiscreteVAE) and isinstance(model.codebook, VectorQuantiser)
        if step < config.plain_steps:
            target = model.norm(images)
            recons = model.decoder(model.encoder(target))
            return self._finished(images, model.loss_fn(recons, target), recons, None, {})
        model.codebook.batches_per_update = accumulation(config.loop.batch, len(images))
        model.codebook.revive_below = self._revive_below if progress < _REVIVE_UNTIL else 0.0
        loss, recons, statistics = model(images, return_loss=True, return_recons=True, return_statistics=True)
        return self._finished(images, loss, recons, statistics, {"commitment": statistics.penalty})

    def _finished(
        self,
        images: Tensor,
        loss: Tensor,
        recons: Tensor,
        statistics: ForwardStatistics | None,
        parts: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """With L1, and told to the log."""
        parts = {"reconstruction": loss.detach() if statistics is None else statistics.reconstruction, **parts}
        if self.config.l1_weight:
            l1 = F.l1_loss(recons, self.model.norm(images))
            loss = loss + self.config.l1_weight * l1
            parts["l1"] = l1.detach()
        if statistics is not None:
            if self.statistics is None:
                self.statistics = TrainingStatistics(self.model)
            self.statistics.add(images, statistics)
        return loss, parts


class VaeTask:
    """A VAE in training, for `trainer.run`.

    Args: config: its `model` holds the arguments of DiscreteVAE, or of OpenAIDiscreteVAE, as `arch` says.
    Raises: ValueError, TypeError (arguments that the class refuses, or that this section leaves to others).
    """

    name = "vae"

    def __init__(self, config: VaeConfig) -> None:
        if config.model.get("kl_div_loss_weight", 0):
            raise ValueError(
                f"train-vae: model.kl_div_loss_weight must be left out, got {config.model['kl_div_loss_weight']}. "
                "Give kl.end, which does not grow with the batch."
            )
        model = _openai(config) if config.arch == "openai" else build("train-vae", DiscreteVAE, **config.model)
        if config.fold and model.quantizer != "vq":
            raise ValueError("train-vae: fold must go with model.quantizer='vq', got 'gumbel'. Leave it out.")
        self.config = config
        self.module: nn.Module = VaeModule(model, config)

    @property
    def model(self) -> Vae:
        """What is trained, or what the loop put in its place."""
        return cast(VaeModule, self.module).model

    def parameters_for(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained."""
        return trainable(self.model)

    def figures(self) -> dict[str, float]:
        """Of the codes, since the last call; all ranks call it."""
        statistics = cast(VaeModule, self.module).statistics
        row = {} if statistics is None else statistics.row()
        if isinstance(self.model.codebook, VectorQuantiser):
            row["codes_revived"] = float(self.model.codebook.revived)
        return row

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Originals above what their codes decode to."""
        images = images_of(batch["pixels"][:_SHOWN].to(device_of(self.model)))
        return {"reconstructions": grid_of([as_rgb(images), as_rgb(self._reconstructed(images)[0])])}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """PSNR (dB, from the squared error over all pixels in 0..1) of what codes decode to; codes used, perplexity."""
        device = device_of(self.model)
        usage = CodebookUsage(self.model.num_tokens, device)
        squared, numbers = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in batches:
            images = images_of(batch["pixels"].to(device))
            pixels, codes = self._reconstructed(images)
            squared += (pixels - images).square().sum(dtype=torch.float64)
            numbers += images.numel()
            if codes is not None:
                usage.add(codes)
        if not numbers:
            return {}
        figures = {"psnr": -10 * (squared / numbers).log10().item()}
        if usage.used:
            figures |= {"codes_used": float(usage.used), "perplexity": usage.perplexity}
        return figures

    def save(self, directory: Path) -> None:
        """The trained model; a vq one with what its last batch taught, folded where the configuration says so."""
        model = self.model
        if isinstance(model.codebook, VectorQuantiser):
            model = copy.deepcopy(model)
            assert isinstance(model.codebook, VectorQuantiser)
            model.codebook.update()
        saved = folded(model.cpu()) if self.config.fold and isinstance(model, DiscreteVAE) else model
        saved.save_pretrained(directory)

    def _reconstructed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels in 0..1 through noiseless codes, and those; before codes are placed, pixels through none."""
        model = self.model
        if isinstance(model.codebook, VectorQuantiser) and not model.codebook.started:
            return to_pixels(model, model.decoder(model.encoder(model.norm(images)))), None
        codes = model.get_codebook_indices(images)
        return to_pixels(model, model.decode(codes)), codes


def _openai(config: VaeConfig) -> OpenAIDiscreteVAE:
    """The paper's model, untrained. Raises: ValueError (a setting or an argument that is not for it)."""
    for name in _OF_DISCRETE_VAE:
        if value := getattr(config, name):
            raise ValueError(
                f"train-vae: {name} must be left out with arch=openai, got {value}. Start from --preset openai."
            )
    model: OpenAIDiscreteVAE = build("train-vae", OpenAIDiscreteVAE, **{**config.model, "from_scratch": True})
    return model
