"""Train the demo's DALLE on pictures encoded once into codes, with captions drawn anew each time.

Optimisers: Muon (muon.py) for the hidden matrices of the transformer, AdamW for embeddings, head, norms and scales.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.captions import draw_caption, encode_captions
from dalle_fast.training.loop import (
    Budget,
    CsvLog,
    learning_rate_scale,
    load_checkpoint,
    save_checkpoint,
    step_generator,
)
from dalle_fast.training.muon import Muon

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DalleRecipe:
    """Numbers of a run; the defaults are the shipped model's.

    noisy_share, noise_rate: in this share of the samples, codes that are read (not those to predict) are replaced, each
        with a probability drawn from 0..noise_rate. Without it the model recognises a picture by its first codes, and
        what the caption says matters at a few codes only; with it the caption matters everywhere.
    """

    text_seq_len: int = 16
    batch: int = 16
    workers: int = 2
    learning_rate: float = 2e-3
    muon: bool = True
    weight_decay: float = 0.01
    warmup_steps: int = 50
    clip: float = 1.0
    plain_captions: float = 0.6
    word_dropout: float = 0.03
    null_cond_prob: float = 0.05
    noisy_share: float = 0.6
    noise_rate: float = 0.7
    seed: int = 0
    save_seconds: float = 180.0
    log_steps: int = 20


def make_optimisers(
    model: nn.Module, recipe: DalleRecipe, parallel: Callable[..., Iterable[Tensor]] = map
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the trainable parameters of `model`, or AdamW alone."""
    hidden: list[tuple[Tensor, int]] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if recipe.muon and name.startswith("transformer.") and parameter.ndim == 2:
            maps = 3 if name.endswith("to_qkv.weight") else 2 if name.endswith("w_in.weight") else 1
            hidden.append((parameter, maps))
        else:
            others.append(parameter)
    adamw = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.96), weight_decay=recipe.weight_decay)
    optimisers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        optimisers.append(Muon(hidden, recipe.learning_rate, weight_decay=recipe.weight_decay, parallel=parallel))
    return optimisers


@torch.no_grad()
def encode_pictures(vae: DiscreteVAE, pictures: Tensor, *, batch: int = 64) -> Tensor:
    """uint8 [n, 3, H, W] -> long codes [n, grid * grid]."""
    return torch.cat([vae.get_codebook_indices(part.float() / 255) for part in pictures.split(batch)])


def epoch_indices(n: int, step: int, batch: int, seed: int) -> Tensor:
    """The pictures of one step: a fresh order each epoch, every picture once an epoch, batches may straddle two."""
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    orders = {epoch: torch.randperm(n, generator=step_generator(seed + 1, epoch)) for epoch in epochs.unique().tolist()}
    return torch.stack([orders[epoch][place] for epoch, place in zip(epochs.tolist(), (positions % n), strict=True)])


def train_dalle(
    dalle: DALLE,
    tokenizer: Tokenizer,
    codes: Tensor,
    captions: Sequence[Sequence[str]],
    out: Path,
    budget: Budget,
    recipe: DalleRecipe = DalleRecipe(),
    on_log: Callable[[dict[str, float | int]], None] | None = None,
) -> None:
    """Train `dalle` in place on codes [n, grid * grid] and the caption lines of each picture.

    Checkpoints `out`/dalle.pt, log `out`/dalle.csv. Run again with the same arguments to resume.

    Each step is split over `recipe.workers` threads, which suits a shared machine better than one thread pool that
    waits at every operation: call with torch.set_num_threads(1).
    """
    if recipe.batch % recipe.workers:
        raise ValueError(
            f"train_dalle: batch must be a multiple of workers, got {recipe.batch} and {recipe.workers}. Change one."
        )
    with ThreadPoolExecutor(recipe.workers) as threads:
        _train(dalle, tokenizer, codes, captions, out, budget, recipe, on_log, threads)


def _train(
    dalle: DALLE,
    tokenizer: Tokenizer,
    codes: Tensor,
    captions: Sequence[Sequence[str]],
    out: Path,
    budget: Budget,
    recipe: DalleRecipe,
    on_log: Callable[[dict[str, float | int]], None] | None,
    threads: ThreadPoolExecutor,
) -> None:
    optimisers = make_optimisers(dalle, recipe, threads.map)
    trainable = {name: p for name, p in dalle.named_parameters() if p.requires_grad}
    log, path, step = CsvLog(out / "dalle.csv"), out / "dalle.pt", 0
    if (state := load_checkpoint(path)) is not None:
        for name, parameter in trainable.items():
            parameter.data.copy_(state["model"][name])
        for optimiser, saved_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        step, budget.elapsed = state["step"], state["seconds"]

    def save() -> None:
        model = {name: p.detach().clone() for name, p in trainable.items()}
        facts = {"step": step, "seconds": budget.seconds(), "optimisers": [o.state_dict() for o in optimisers]}
        save_checkpoint(path, {"model": model, **facts})

    dalle.train()
    saved, losses = budget.seconds(), []
    while (progress := budget.progress(step)) < 1:
        scale = learning_rate_scale(step, progress, recipe.warmup_steps)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * scale
        batch = _draw_batch(tokenizer, codes, captions, step, recipe)
        losses.append(_accumulate(dalle, list(trainable.values()), batch, threads, recipe.workers))
        nn.utils.clip_grad_norm_(trainable.values(), recipe.clip)
        for optimiser in optimisers:
            optimiser.step()
        step += 1
        if step % recipe.log_steps == 0:
            row = {
                "step": step,
                "seconds": budget.seconds(),
                "epoch": step * recipe.batch / len(codes),
                "loss": sum(losses) / len(losses),
                "learning_rate": recipe.learning_rate * scale,
            }
            losses.clear()
            log.write(row)
            if on_log is not None:
                on_log(row)
        if budget.seconds() - saved > recipe.save_seconds:
            save()
            saved = budget.seconds()
    save()
    dalle.eval()


def _draw_batch(
    tokenizer: Tokenizer, codes: Tensor, captions: Sequence[Sequence[str]], step: int, recipe: DalleRecipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Text ids [batch, text_seq_len], codes to predict and codes to read [batch, R * C] of one step.

    Some texts are left empty, for guidance.
    """
    generator = step_generator(recipe.seed, step)
    index = epoch_indices(len(codes), step, recipe.batch, recipe.seed)
    lines = [
        draw_caption(captions[i], generator, plain=recipe.plain_captions, word_dropout=recipe.word_dropout)
        for i in index.tolist()
    ]
    text = encode_captions(tokenizer, lines, recipe.text_seq_len)
    text[torch.rand(len(text), generator=generator) < recipe.null_cond_prob] = 0
    wanted = codes[index]
    return text, wanted, add_noise(wanted, codes, generator, share=recipe.noisy_share, rate=recipe.noise_rate)


def add_noise(wanted: Tensor, codes: Tensor, generator: torch.Generator, *, share: float, rate: float) -> Tensor:
    """`wanted` [B, R * C] with some codes replaced: those of the neighbour in the batch, or of anywhere in `codes`.

    A sample is touched with probability `share`, each of its codes then with a probability drawn from 0..rate.
    """
    noisy = torch.rand(len(wanted), 1, generator=generator) < share
    rates = torch.rand(len(wanted), 1, generator=generator) * rate
    replaced = noisy & (torch.rand(wanted.shape, generator=generator) < rates)
    anywhere = codes.flatten()[torch.randint(codes.numel(), wanted.shape, generator=generator)]
    neighbour = torch.rand(wanted.shape, generator=generator) < 0.5
    return torch.where(replaced, torch.where(neighbour, wanted.roll(1, 0), anywhere), wanted)


def _accumulate(
    dalle: DALLE,
    parameters: Sequence[Tensor],
    batch: tuple[Tensor, Tensor, Tensor],
    threads: ThreadPoolExecutor,
    workers: int,
) -> float:
    """Set every parameter's gradient to the mean over the parts of the batch, in order; returns the mean loss."""

    def part(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        text, wanted, read = tensors
        loss = dalle(text, read, return_loss=True, labels=wanted)
        return loss.item(), torch.autograd.grad(loss, parameters)

    parts = list(threads.map(part, zip(*(tensor.chunk(workers) for tensor in batch), strict=True)))
    for place, parameter in enumerate(parameters):
        parameter.grad = torch.stack([gradients[place] for _, gradients in parts]).mean(0)
    return sum(loss for loss, _ in parts) / workers
