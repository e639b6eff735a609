"""Training a DALLE on codes: those of a cache, or of pictures that its frozen VAE encodes in the step.

    loss = (text loss + loss_img_weight * image loss) / (1 + loss_img_weight), means in nats a token

Text positions after a caption's end hold padding. Which of them count is `padding_loss`: the original averages over
all of them, "first" counts the one that ends the caption. The sum over those that count is divided by what a batch of
average captions has, not by what this one has: so the loss is a mean over samples, however a batch is split.

end_to_end: the VAE is trained too. What the transformer reads are the embeddings of noiseless codes; backwards, they
are the mean of the embeddings under the gumbel softmax of the encoder's logits, so that the token loss moves the
encoder. One pass of `gumbel_codebook` mixes the rows of the VAE's codebook and of the embedding under the same noise.
The reconstruction loss is added: the token loss alone would make all codes alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE, ForwardStatistics
from dalle_fast.ops.gumbel_codebook import gumbel_codebook
from dalle_fast.ops.vocab_cross_entropy import IGNORED, vocab_cross_entropy
from dalle_fast.sampling.gallery import labelled_grid, to_pixels
from dalle_fast.tokenizers.base import BatchTokenizer
from dalle_fast.training.codebook_usage import TrainingStatistics
from dalle_fast.training.config import DalleConfig
from dalle_fast.training.task import Source
from dalle_fast.training.tasks.common import build, device_of, first_position, images_of, seed_of_step, trainable
from dalle_fast.training.tasks.noise import drawn_in_step
from dalle_fast.training.tasks.text import load_tokenizer, saved_tokenizer, with_vocabulary

_SHOWN, _SHOWN_SIDE = 4, 128  # pictures, pixels
_POOL = 512  # samples that noise takes its codes from
_AT_ONCE = 32  # of them are encoded


class Relaxed(NamedTuple):
    """Codes [B, n] whose embeddings pass gradients to the VAE's encoder.

    embeds: [B, n, C], a zero with that gradient, to add to those of the codes.   reconstruction: the VAE's loss.
    statistics: of the codes.
    """

    codes: Tensor
    embeds: Tensor
    reconstruction: Tensor
    statistics: ForwardStatistics


def token_losses(
    model: DALLE,
    text: Tensor,
    codes: Tensor,
    wanted: Tensor,
    *,
    padding_loss: str = "all",
    relaxed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(text loss, image loss, text positions), means in nats a token, and over how many texts' positions the first is.

    With "all" they are those that `DALLE.forward` weighs.

    Args:
        text: ids [B, text_seq_len].   codes, wanted: int64 [B, n], what is read and what is predicted.
        padding_loss: "all", or "first": of the padding of each text only the first position counts.
        relaxed: [B, n, C], added to the embeddings of the codes.
    """
    padded = model.padded_text(text)
    image = model.embed_image(codes)
    if relaxed is not None:
        image = image + relaxed
    tokens = torch.cat((model.embed_text(padded), image), dim=1)[:, : model.total_seq_len]
    hidden = model.transformer(tokens)
    text_labels = padded[:, 1:]
    if padding_loss == "first":
        later = (text == 0) & (F.pad(text, (1, 0), value=1)[:, :-1] == 0)
        text_labels = text_labels.masked_fill(later, IGNORED)
    labels = torch.cat((text_labels, wanted), dim=1)
    text_loss, image_loss = vocab_cross_entropy(
        hidden, (model.logits_norm.weight, model.logits_norm.bias), model.to_logits.weight, model.to_logits.bias,
        labels, model.layout, model.num_text_tokens, divide_max=model.stable,
    )  # fmt: skip
    return text_loss, image_loss, (text_labels != IGNORED).sum()


class DalleModule(nn.Module):
    """The loss of a batch. Attributes: model.   statistics: of the VAE's codes, when it is trained too."""

    def __init__(self, model: DALLE, config: DalleConfig, pool: Tensor | None, text_length: float) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.text_length = model.text_seq_len if config.padding_loss == "all" else text_length
        self.statistics: TrainingStatistics | None = None
        self._pool = pool  # no buffer: processes would send it to each other

    def forward(self, batch: Mapping[str, Any], step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its parts) of text [B, text_seq_len] and codes [B, n] or pixels uint8 [B, c, S, S]."""
        model, config = self.model, self.config
        if config.end_to_end:
            return self._end_to_end(batch, step)
        wanted = codes_of(model, batch)
        text, read = self._drawn(batch, wanted)
        losses = token_losses(model, text, read, wanted, padding_loss=config.padding_loss)
        return self._weighed(*losses, len(text))

    def _end_to_end(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model, config = self.model, self.config
        images = images_of(batch["pixels"])
        rows = first_position(batch["position"]) - step * config.loop.batch
        relaxed = relax(model, images, seed=seed_of_step(config.loop.seed, step), first_sample=rows)
        text, read = self._drawn(batch, relaxed.codes)
        # Where noise put another code, the encoder had no say.
        own = (read == relaxed.codes)[..., None]
        losses = token_losses(
            model, text, read, relaxed.codes, padding_loss=config.padding_loss, relaxed=relaxed.embeds * own
        )
        loss, parts = self._weighed(*losses, len(text))
        if self.statistics is None:
            self.statistics = TrainingStatistics(model.vae)
        self.statistics.add(images, relaxed.statistics)
        return loss + relaxed.reconstruction, parts | {"reconstruction": relaxed.statistics.reconstruction}

    def _drawn(self, batch: Mapping[str, Any], codes: Tensor) -> tuple[Tensor, Tensor]:
        """Text, some left empty, and the codes that are read, some replaced."""
        config = self.config
        return drawn_in_step(
            batch["text"], codes, batch["position"], self._pool, config.code_noise,
            null_cond_prob=config.null_cond_prob, seed=config.loop.seed,
        )  # fmt: skip

    def _weighed(
        self, text_loss: Tensor, image_loss: Tensor, n_text: Tensor, samples: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight = self.model.loss_img_weight
        text_loss = text_loss * (n_text / (samples * self.text_length))
        loss = (text_loss + weight * image_loss) / (1 + weight)
        return loss, {"text_loss": text_loss.detach(), "image_loss": image_loss.detach()}


class DalleTask:
    """A DALLE in training, for `trainer.run`.

    Args:
        config: its `model` holds the arguments of DALLE; num_text_tokens is the tokenizer's where it is left out.
        vae: whose codes are learnt.   tokenizer: of the texts.   pool: codes [P, n] that noise is drawn from.
        text_length: of the data's captions, with their end, on average; matters with padding_loss="first" alone.
    Raises: ValueError, TypeError (arguments that DALLE refuses, or that do not go together).
    """

    name = "dalle"

    def __init__(
        self,
        config: DalleConfig,
        vae: DiscreteVAE,
        tokenizer: BatchTokenizer | None = None,
        pool: Tensor | None = None,
        text_length: float = 1.0,
    ) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
        arguments = with_vocabulary("train", config.model, self.tokenizer)
        model = build("train", DALLE, vae=vae, **arguments)
        if config.end_to_end:
            if getattr(vae, "quantizer", None) != "gumbel":
                raise ValueError(
                    "train: end_to_end must have a VAE with quantizer='gumbel', got another. Its logits carry the "
                    "gradients; a vq VAE can be folded into one (`train-vae --set fold=true`)."
                )
            vae.requires_grad_(True)
        if config.code_noise.share and pool is None:
            raise ValueError("train: code_noise must have a pool of codes to draw from, got none. Give noise_pool().")
        model.transformer.checkpointing = config.checkpointing
        self.module: nn.Module = DalleModule(model, config, pool, text_length)

    @property
    def model(self) -> DALLE:
        """What is trained, or what the loop put in its place."""
        return cast(DalleModule, self.module).model

    def parameters_for(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained."""
        return trainable(self.model)

    def figures(self) -> dict[str, float]:
        """Of the VAE's codes, since the last call, when it is trained too; all ranks call it."""
        statistics = cast(DalleModule, self.module).statistics
        return {} if statistics is None else statistics.row()

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Of each caption: what its codes decode to, and what is drawn from it."""
        model = self.model
        shown = {key: value[:_SHOWN] for key, value in batch.items()}
        text = shown["text"].to(device_of(model))
        codes = codes_of(model, shown)
        top_k = max(1, model.num_image_tokens // 10)
        drawn = model.generate_images(text, top_k=top_k, seed=self.config.loop.seed)
        assert isinstance(drawn, Tensor)
        pairs = torch.stack((to_pixels(model.vae, model.vae.decode(codes)), to_pixels(model.vae, drawn)), dim=1)
        captions = [self._caption(ids) for ids in text.cpu()]
        scale = max(1, _SHOWN_SIDE // model.vae.image_size)
        sheet = labelled_grid(list(zip(captions, pairs[:, :, :3].cpu(), strict=True)), scale=scale)
        return {"samples": torch.from_numpy(np.array(sheet)).permute(2, 0, 1)}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """The losses of held-out samples, nothing left out and no noise."""
        model, device = self.model, device_of(self.model)
        sums = torch.zeros(2, dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            codes, text = codes_of(model, batch), batch["text"].to(device)
            *losses, n_text = token_losses(model, text, codes, codes, padding_loss=self.config.padding_loss)
            tokens = torch.tensor([n_text.item(), codes.numel()], dtype=torch.float64)
            sums += torch.stack(losses).double().cpu() * tokens
            counts += tokens
        if not counts.any():
            return {}
        text_loss, image_loss = (sums / counts).tolist()
        weight = model.loss_img_weight
        loss = (text_loss + weight * image_loss) / (1 + weight)
        return {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}

    def save(self, directory: Path) -> None:
        """The trained model with its VAE and tokenizer."""
        self.model.save_pretrained(directory, tokenizer=saved_tokenizer(self.config.tokenizer))

    def _caption(self, ids: Tensor) -> str:
        kept = ids[ids != 0]
        return str(self.tokenizer.decode(kept)).strip() if len(kept) else "(no caption)"  # type: ignore[attr-defined]


@torch.no_grad()
def codes_of(model: DALLE, batch: Mapping[str, Any]) -> Tensor:
    """The codes [B, n] of a batch, on the model's device; encoded in float32, as a cache of codes is."""
    device = device_of(model)
    if "codes" in batch:
        return batch["codes"].to(device)
    with torch.autocast(device.type, enabled=False):
        return model.vae.get_codebook_indices(images_of(batch["pixels"].to(device)))


def relax(model: DALLE, images: Tensor, *, seed: int, first_sample: int) -> Relaxed:
    """The codes of images [B, c, S, S] in 0..1, with gradients for the encoder.

    Args: seed: of the noise.   first_sample: which sample of the step's batch the first is.
    """
    vae = model.vae
    target = vae.norm(images)
    features, last = vae.encoder[:-1](target), vae.encoder[-1]
    head = model.to_logits.weight[model.num_text_tokens :] if model.share_input_output_emb else model.image_emb.weight
    # The embedding learns from the codes that are read; here it is what codes mean to the transformer.
    rows = torch.cat((vae.codebook.weight, head.detach()), dim=1)
    mixed, codes, noisy_codes, _ = gumbel_codebook(
        features, last.weight.flatten(1), last.bias, rows,
        temperature=vae.temperature, seed=seed, first_row=first_sample * features.shape[2] * features.shape[3],
    )  # fmt: skip
    for_decoder, for_transformer = mixed.split((vae.codebook.weight.shape[1], head.shape[1]), dim=1)
    reconstruction = vae.loss_fn(vae.decoder(for_decoder), target)
    embeds = for_transformer.flatten(2).transpose(1, 2)
    statistics = ForwardStatistics(codes, noisy_codes, reconstruction.detach(), None)
    return Relaxed(codes.flatten(1), embeds - embeds.detach(), reconstruction, statistics)


def noise_pool(source: Source, vae: DiscreteVAE, config: DalleConfig) -> Tensor | None:
    """Codes [P, n] of the run's first samples, for `code_noise`; None where the configuration has none.

    A function of data and seed alone: every process draws from the same.
    """
    if not config.code_noise.share:
        return None
    count = min(_POOL, source.n)
    batch = min(_AT_ONCE, count)
    loader = source.loader(
        rank=0, world=1, batch=batch, micro_batch=batch, first_step=0, steps=-(-count // batch), seed=config.loop.seed,
        workers=0, pin_memory=False,
    )  # fmt: skip
    rows = [b["codes"] if "codes" in b else vae.get_codebook_indices(images_of(b["pixels"])) for b in loader]
    return torch.cat(rows)
