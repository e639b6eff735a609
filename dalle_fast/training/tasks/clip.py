"""Training a CLIP: every text of the global batch against every picture of it.

    similarity S = exp(temperature) T I^T   loss = (cross entropy of rows + of columns) / 2, the pairs on the diagonal

With several processes the latents of all are gathered, gradients included, so the loss is that of one process with the
whole batch. Accumulation adds up losses of smaller batches, which is another task: a step is one forward pass.
Padding (id 0) is masked out of the texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from dalle_fast.models.clip import CLIP
from dalle_fast.tokenizers.base import BatchTokenizer
from dalle_fast.training.config import ClipConfig
from dalle_fast.training.tasks.common import build, device_of, images_of, trainable, world_size
from dalle_fast.training.tasks.text import load_tokenizer, saved_tokenizer, with_vocabulary


def text_mask(text: Tensor) -> Tensor:
    """bool [B, n]: no padding; the first position always, so that an empty text has one."""
    mask = text != 0
    mask[:, 0] = True
    return mask


class ClipModule(nn.Module):
    """The loss of a batch. Attributes: model."""

    def __init__(self, model: CLIP, config: ClipConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, batch: Mapping[str, Any], step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its parts) of text [B, n] and pixels uint8 [B, c, S, S]: the same on all processes."""
        world, here = world_size(), len(batch["text"])
        if here * world != self.config.loop.batch:
            raise ValueError(micro_batch_rule(self.config, world, here))
        texts, pictures = latents(self.model, batch["text"], images_of(batch["pixels"]))
        if world > 1:
            texts, pictures = torch.cat(all_gather(texts)), torch.cat(all_gather(pictures))
        similarity = texts.float() @ pictures.float().t() * self.model.temperature.exp()
        pairs = torch.arange(len(similarity), device=similarity.device)
        loss = (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.t(), pairs)) / 2
        hits = (similarity.argmax(dim=1) == pairs).float().mean()
        return loss, {"batch_recall": hits, "temperature": self.model.temperature.detach()}


class ClipTask:
    """A CLIP in training, for `trainer.run`.

    Args:
        config: its `model` holds the arguments of CLIP; num_text_tokens is the tokenizer's where it is left out.
        tokenizer: of the texts.
    Raises: ValueError, TypeError (arguments that CLIP refuses; a micro-batch that is not all of a process's share).
    """

    name = "clip"

    def __init__(self, config: ClipConfig, tokenizer: BatchTokenizer | None = None) -> None:
        world, micro_batch = int(os.environ.get("WORLD_SIZE", "1")), config.loop.micro_batch
        if micro_batch is not None and micro_batch * world != config.loop.batch:
            raise ValueError(micro_batch_rule(config, world, micro_batch))
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
        arguments = with_vocabulary("train-clip", config.model, self.tokenizer)
        self.module: nn.Module = ClipModule(build("train-clip", CLIP, **arguments), config)

    @property
    def model(self) -> CLIP:
        """What is trained, or what the loop put in its place."""
        return cast(ClipModule, self.module).model

    def parameters_for(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained."""
        return trainable(self.model)

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def pictures(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """There is nothing to draw."""
        return {}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """recall@1 over all held-out samples: the share of texts whose picture is the nearest, and the other way.

        As near as the nearest counts: some captions or pictures may be equal.
        """
        device = device_of(self.model)
        both = [
            latents(self.model, batch["text"].to(device), images_of(batch["pixels"].to(device))) for batch in batches
        ]
        if not both:
            return {}
        texts, pictures = (torch.cat(parts) for parts in zip(*both, strict=True))
        similarity = texts @ pictures.t()
        own = similarity.diagonal()
        return {
            "recall_text_to_picture": (similarity.amax(dim=1) <= own).float().mean().item(),
            "recall_picture_to_text": (similarity.amax(dim=0) <= own).float().mean().item(),
            "pairs": float(len(own)),
        }

    def save(self, directory: Path) -> None:
        """The trained model with its tokenizer: a ranker for `dalle-fast sample --rank`."""
        self.model.save_pretrained(directory, tokenizer=saved_tokenizer(self.config.tokenizer))


def latents(model: CLIP, text: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of texts and of pictures, [B, dim_latent] each."""
    return model._text_latents(text, text_mask(text)), model._image_latents(images)


def micro_batch_rule(config: ClipConfig, world: int, got: int) -> str:
    """The sentence of a batch that is not whole."""
    return (
        f"train-clip: micro_batch must be a process's whole share of the batch, {config.loop.batch // world} of "
        f"{config.loop.batch} on {world} process{'es' * (world > 1)}, got {got}. Accumulation cannot enlarge a "
        "contrastive batch: leave micro_batch out, lower loop.batch, or train on more processes."
    )
