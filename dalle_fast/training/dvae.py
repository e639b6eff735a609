"""Train the demo's DiscreteVAE as a VQ-VAE and fold the quantiser into it.

The gumbel softmax of the original used 67 of 256 codes on this data; a quantiser with revival uses nearly all
of them, and folds exactly into the original's architecture: a plain DiscreteVAE is shipped.

Folding: z = P h + b_P (P: [D, F], the projection of the encoder's features h), |z - c_k|^2 = |z|^2 - 2 (c_k . z -
|c_k|^2 / 2), so the nearest code is the argmax over k of (P^T c_k) . h + c_k . b_P - |c_k|^2 / 2: a 1x1 convolution
with weight [K, F] and bias [K], a gumbel DiscreteVAE's last layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.models.quantiser import VectorQuantiser
from dalle_fast.training.codebook_usage import CodebookUsage
from dalle_fast.training.loop import (
    Budget,
    CsvLog,
    learning_rate_scale,
    load_checkpoint,
    save_checkpoint,
    step_generator,
)

logger = logging.getLogger(__name__)

_DECAY = 0.98
_REVIVE_BELOW = 0.5
_REVIVE_UNTIL = 0.8
_GRADIENT_CLIP = 1.0
_L1_WEIGHT = 0.1
_COMMITMENT_WEIGHT = 0.25
_MAX_SHIFT = 3


@dataclass(frozen=True)
class VaeRecipe:
    """Numbers of a run; the defaults are the shipped model's."""

    batch: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    seed: int = 0
    plain_steps: int = 150
    save_seconds: float = 120.0
    log_steps: int = 20
    evaluate_steps: int = 200


class VqTrainer(nn.Module):
    """A DiscreteVAE whose last encoder layer is replaced, while training, by a projection and a quantiser.

    Args: vae: its encoder and decoder are trained in place; its codebook sets K and D.
    Raises: ValueError (a vae without logits to fold into).
    """

    def __init__(self, vae: DiscreteVAE) -> None:
        super().__init__()
        if vae.quantizer != "gumbel":
            raise ValueError(f"VqTrainer: vae must have quantizer='gumbel' to fold into, got {vae.quantizer!r}.")
        num_codes, dim = vae.codebook.weight.shape
        self.trunk = vae.encoder[:-1]
        self.decoder = vae.decoder
        head = vae.encoder[-1]
        assert isinstance(head, nn.Conv2d)
        self.projection = nn.Conv2d(head.in_channels, dim, 1)
        self.quantiser = VectorQuantiser(num_codes, dim, decay=_DECAY, revive_below=_REVIVE_BELOW)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels [B, 3, H, W] -> reconstruction, codes [B, h, w], commitment loss.

        Until the codebook has been placed, nothing is quantised: a plain autoencoder.
        """
        z = self.projection(self.trunk(pixels))
        if not self.quantiser.started:
            codes = z.new_zeros(z.shape[0], *z.shape[2:], dtype=torch.long)
            return self.decoder(z), codes, z.new_zeros(())
        quantised, codes, commitment = self.quantiser(z)
        return self.decoder(quantised), codes, commitment

    @torch.no_grad()
    def fold_into(self, vae: DiscreteVAE) -> None:
        """Copy what was learnt into `vae`, whose codes are then exactly the nearest rows."""
        vae.encoder[:-1].load_state_dict(self.trunk.state_dict())
        vae.decoder.load_state_dict(self.decoder.state_dict())
        vae.codebook.weight.copy_(self.quantiser.weight)
        weight, bias = fold(self.quantiser.weight, self.projection)
        vae.encoder[-1].load_state_dict({"weight": weight, "bias": bias})


@torch.no_grad()
def fold(codebook: Tensor, projection: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """(weight [K, F, 1, 1], bias [K]) of the convolution whose argmax over features is the nearest row of `codebook`.

    `projection` is the 1x1 convolution [D, F] in front of the quantiser. Computed in float64, returned in float32.
    """
    rows = codebook.double()
    weight = rows @ projection.weight.double().flatten(1)
    bias = -0.5 * rows.square().sum(1)
    if projection.bias is not None:
        bias = bias + rows @ projection.bias.double()
    return weight.float()[:, :, None, None], bias.float()


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flips and a transposition of the whole batch, half the time a shift by at most 3 pixels; borders are white."""
    flip_rows, flip_columns, transpose, shift = torch.rand(4, generator=generator).lt(0.5).tolist()
    if flip_rows:
        pixels = pixels.flip(2)
    if flip_columns:
        pixels = pixels.flip(3)
    if transpose:
        pixels = pixels.transpose(2, 3)
    if shift:
        down, right = torch.randint(0, 2 * _MAX_SHIFT + 1, (2,), generator=generator).tolist()
        rows, columns = pixels.shape[2:]
        pixels = F.pad(pixels, (_MAX_SHIFT,) * 4, value=1.0)[:, :, down : down + rows, right : right + columns]
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def reconstruction_figures(model: VqTrainer, pictures: Tensor) -> dict[str, float]:
    """PSNR (dB, from the squared error over all pixels in 0..1) and codes used, for uint8 pictures [n, 3, H, W]."""
    squared, usage = 0.0, CodebookUsage(len(model.quantiser.weight))
    for batch in pictures.split(64):
        pixels = batch.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        out, codes, _ = model(pixels)
        squared += (out.clamp(-1, 1) - pixels).square().sum().item() / 4
        usage.add(codes)
    psnr = -10 * torch.tensor(squared / pictures.numel()).log10().item()
    return {"psnr": psnr, "codes": float(usage.used)}


def train_vae(
    vae: DiscreteVAE,
    pictures: Tensor,
    held_out: Tensor,
    out: Path,
    budget: Budget,
    recipe: VaeRecipe = VaeRecipe(),
    on_log: Callable[[dict[str, float | int]], None] | None = None,
) -> VqTrainer:
    """Train on uint8 pictures [n, 3, H, W]; checkpoints `out`/vae.pt, log `out`/vae.csv; `vae` holds the folded result.

    Run again with the same arguments to resume.
    """
    torch.manual_seed(recipe.seed)
    model: VqTrainer = VqTrainer(vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    log, path, step = CsvLog(out / "vae.csv"), out / "vae.pt", 0
    if (state := load_checkpoint(path)) is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, budget.elapsed = state["step"], state["seconds"]

    def save() -> None:
        facts = {"step": step, "seconds": budget.seconds()}
        save_checkpoint(path, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), **facts})

    saved = budget.seconds()
    while (progress := budget.progress(step)) < 1:
        scale = learning_rate_scale(step, progress, recipe.warmup_steps)
        row = _vae_step(model, optimiser, pictures, step, progress, recipe, scale)
        step += 1
        if step % recipe.evaluate_steps == 0:
            row.update(reconstruction_figures(model.eval(), held_out))
            model.train()
            logger.info(
                "step %d, %.0f s: held-out PSNR %.2f dB, %d codes", step, budget.seconds(), row["psnr"], row["codes"]
            )
        if step % recipe.log_steps == 0:
            row = {"step": step, "seconds": budget.seconds(), "psnr": 0.0, "codes": 0.0, **row}
            log.write(row)
            if on_log is not None:
                on_log(row)
        if budget.seconds() - saved > recipe.save_seconds:
            save()
            saved = budget.seconds()
    save()
    model.quantiser.update()
    model.fold_into(vae)
    return model


def _vae_step(
    model: VqTrainer,
    optimiser: torch.optim.Optimizer,
    pictures: Tensor,
    step: int,
    progress: float,
    recipe: VaeRecipe,
    scale: float,
) -> dict[str, float | int]:
    generator = step_generator(recipe.seed, step)
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * scale
    index = torch.randint(len(pictures), (recipe.batch,), generator=generator)
    pixels = augment(pictures[index].float().div(127.5).sub(1), generator)
    if step == recipe.plain_steps:
        with torch.no_grad():
            model.quantiser.start(model.projection(model.trunk(pixels)))
    if progress >= _REVIVE_UNTIL:
        model.quantiser.revive_below = 0.0
    out, _, commitment = model(pixels)
    mse, l1 = F.mse_loss(out, pixels), F.l1_loss(out, pixels)
    optimiser.zero_grad(set_to_none=True)
    (mse + _L1_WEIGHT * l1 + _COMMITMENT_WEIGHT * commitment).backward()
    nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_CLIP)
    optimiser.step()
    revived = int(model.quantiser.revived)
    return {"mse": mse.item(), "l1": l1.item(), "commitment": commitment.item(), "revived": revived}
