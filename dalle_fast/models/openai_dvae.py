"""The DALL-E paper's discrete VAE: 256x256 pictures to 32x32 codes of 8192 and back.

    x' = 0.8 x + 0.1      encoder: 7x7 convolution, 4 groups of residual blocks, the first three halved by max-pooling,
                          -> features [B, 8F, S/8, S/8] -> 1x1 convolution -> logits of K codes
    decoder: rows of a codebook [K, D] (its first 1x1 convolution, whose input would be one-hot), 4 groups, the first
             three doubled by repetition -> 2c maps: mu and ln b of a logit-Laplace distribution a pixel and channel
    picture = clamp((sigmoid(mu) - 0.1) / 0.8, 0, 1)      block(x) = shortcut(x) + convolutions(x) / blocks^2

In training the codebook is mixed under the gumbel softmax by `gumbel_codebook`, which stores no logits.
Source: DALL-E paper (arXiv 2102.12092), section 2.1 and appendix A; openai/DALL-E for sizes and constants.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast import rng
from dalle_fast.models.alone import computed_alone, each_alone, in_float32, widened
from dalle_fast.models.dvae import ForwardStatistics
from dalle_fast.models.logit_laplace import logit_laplace_loss, map_pixels, unmap_pixels
from dalle_fast.models.saving import PathLike, Pretrained
from dalle_fast.models.unfilled import unfilled
from dalle_fast.models.vae_protocol import check_pictures, side_of_codes
from dalle_fast.ops.codebook_indices import codebook_indices
from dalle_fast.ops.gumbel_codebook import gumbel_codebook

_NAME = "OpenAIDiscreteVAE"
_HALVINGS = 3
_ENCODER_KERNELS, _DECODER_KERNELS = (3, 3, 3, 1), (1, 3, 3, 3)


@dataclass(frozen=True)
class Sizes:
    """What the tensors' shapes say, and a file does not otherwise: K, c, F, D and the residual blocks of a group."""

    num_tokens: int = 8192
    channels: int = 3
    hidden_dim: int = 256
    codebook_dim: int = 128
    blocks_per_group: int = 2


class Block(nn.Module):
    """shortcut(x) + gain * four convolutions, each behind a ReLU: [B, n_in, h, w] -> [B, n_out, h, w]."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        widths = (n_in, *[n_out // 4] * 3, n_out)
        self.gain = gain
        self.shortcut = _convolution(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.convs = nn.ModuleList(_convolution(*sizes) for sizes in zip(widths, widths[1:], kernels, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(F.relu(y))
        return self.shortcut(x) + self.gain * y


class Bias(nn.Module):
    """x [B, D, h, w] + bias [D]: what is left of the decoder's first convolution beside its weight, the codebook."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


class OpenAIDiscreteVAE(Pretrained):
    """The paper's discrete VAE, of OpenAI's files or untrained.

    `OpenAIDiscreteVAE()` reads `encoder.pkl` and `decoder.pkl` from ~/.cache/dalle, the original's cache. Nothing is
    downloaded and no code of the files is run. Such a model is frozen and in evaluation mode.

    Args:
        encoder_path, decoder_path: those files, elsewhere.
        from_scratch: read nothing; weights are drawn as the paper's code does.
        image_size: S, a multiple of 8.   temperature: of the softmax where forward names none.
        kl_div_loss_weight: times the KL divergence from the uniform distribution, summed over batch and positions.
        num_tokens: K.   channels: c.   hidden_dim: F, a multiple of 4: width of the convolutions next to the pictures.
        codebook_dim: D.   blocks_per_group: residual blocks of each of the four groups.
            These five are 8192, 3, 256, 128 and 2 from scratch, else the files'.
    Attributes: encoder, whose last layer gives the logits; codebook; decoder, from rows of the codebook to mu and ln b.
    Raises: FileNotFoundError (a file is missing: its name, and where people get it), ValueError (another file; an
        argument out of range, or that the files contradict).
    Source: DALLE-pytorch OpenAIDiscreteVAE; openai/DALL-E.
    """

    num_layers = _HALVINGS
    normalization = None  # `decode` gives pixels in 0..1
    quantizer = "gumbel"
    num_tokens: int
    channels: int

    def __init__(
        self,
        encoder_path: PathLike | None = None,
        decoder_path: PathLike | None = None,
        *,
        from_scratch: bool = False,
        image_size: int = 256,
        num_tokens: int | None = None,
        channels: int | None = None,
        hidden_dim: int | None = None,
        codebook_dim: int | None = None,
        blocks_per_group: int | None = None,
        temperature: float = 1.0,
        kl_div_loss_weight: float = 0.0,
    ) -> None:
        super().__init__()
        arguments = locals()
        given = {f.name: arguments[f.name] for f in fields(Sizes) if arguments[f.name] is not None}
        _check_sizes(image_size, given)
        self.image_size = image_size
        self.temperature = temperature
        self.kl_div_loss_weight = kl_div_loss_weight
        # What is saved: a training changes the attributes from step to step.
        self._settings = {
            "image_size": image_size, "temperature": temperature, "kl_div_loss_weight": kl_div_loss_weight,
        }  # fmt: skip
        self.loss_fn = logit_laplace_loss
        if from_scratch:
            for name, path in (("encoder_path", encoder_path), ("decoder_path", decoder_path)):
                if path is not None:
                    raise ValueError(f"{_NAME}: {name} must be left out with from_scratch=True, got {path}.")
            self._build(Sizes(**given))
            return
        from dalle_fast.compat.formats.openai_dvae import (
            read_parts,
            sizes_of,
        )  # at call time: compat stands above models

        tensors = read_parts(encoder_path, decoder_path)
        found = sizes_of(tensors)
        for name, value in given.items():
            if value != getattr(found, name):
                raise ValueError(
                    f"{_NAME}: {name} must be as in the files, {getattr(found, name)}, got {value}. Leave it out."
                )
        with unfilled():
            self._build(found)
        self.load_state_dict(tensors, assign=True)
        self.requires_grad_(False).eval()

    def _build(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.num_tokens, self.channels = sizes.num_tokens, sizes.channels
        self.encoder = _encoder(sizes)
        self.codebook = nn.Embedding(sizes.num_tokens, sizes.codebook_dim)
        with torch.no_grad():
            self.codebook.weight.normal_(std=sizes.num_tokens**-0.5)  # as a 1x1 convolution of one-hot codes
        self.decoder = _decoder(sizes)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this model again, without files: the weights lie beside."""
        return {"from_scratch": True, **self._settings, **asdict(self.sizes)}

    def norm(self, images: Tensor) -> Tensor:
        """Pixels in 0..1 -> 0.1..0.9, as the encoder and the loss take them."""
        return map_pixels(images)

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The codes of pictures, without noise.

        Args: images [B, c, S, S] in 0..1.
        Returns: int64 [B, (S / 8)^2], raster order.
        Raises: ValueError (shape), TypeError (dtype).
        Numerics: on CPUs a picture's codes depend on it and the weights alone; 16-bit models compute in float32.
        """
        check_pictures(_NAME, images, self.channels, self.image_size)
        if not computed_alone(images):
            return _codes(self.encoder, images)
        encoder, rows = in_float32(self.encoder), images.contiguous().split(1)
        return torch.cat(each_alone(lambda i: _codes(encoder, rows[i]), len(rows)))

    def decode(self, img_seq: Tensor) -> Tensor:
        """Pictures of code grids.

        Args: img_seq: int64 or int32 [B, n], n a square number, ids below num_tokens.
        Returns: [B, c, 8 sqrt(n), 8 sqrt(n)] in 0..1.
        Raises: TypeError (dtype, axes), ValueError (n, an id out of range).
        Numerics: as `get_codebook_indices`.
        """
        side = side_of_codes(_NAME, img_seq, self.num_tokens)
        if not computed_alone(img_seq):
            return self._pictures(self.decoder(self._embeds(img_seq, side)))
        decoder, rows, dtype = in_float32(self.decoder), img_seq.split(1), self.codebook.weight.dtype

        def picture(i: int) -> Tensor:
            return self._pictures(decoder(widened(self._embeds(rows[i], side)))).to(dtype)

        return torch.cat(each_alone(picture, len(rows)))

    def forward(
        self,
        img: Tensor,
        return_loss: bool = False,
        return_recons: bool = False,
        return_logits: bool = False,
        temp: float | None = None,
        gumbel_noise: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        first_row: int | None = None,
        return_statistics: bool = False,
    ) -> Tensor | tuple[Tensor | ForwardStatistics, ...]:
        """Reconstructs pictures through noisily chosen codes; arguments as `DiscreteVAE.forward`.

        The loss is -ln of the logit-Laplace density, a mean over pixels and channels, plus kl_div_loss_weight times
        the KL divergence.
        Returns: pictures [B, c, S, S] in 0..1; or logits [B, K, S / 8, S / 8]; or the scalar loss; or what was asked
            for of (loss, pictures, statistics).
        Raises: ValueError, TypeError (shapes, dtypes, temperature, noise).
        """
        check_pictures(_NAME, img, self.channels, self.image_size)
        if return_statistics and not return_loss:
            raise ValueError(f"{_NAME}: return_statistics must come with return_loss=True, got False. Ask for both.")
        target = self.norm(img)
        if return_logits:
            return self.encoder(target)
        features, last = self.encoder[:-1](target), cast(nn.Conv2d, self.encoder[-1])
        if first_row is None:
            first_row = rng.first_row_of_rank(features.shape[0] * features.shape[2] * features.shape[3])
        # As in the paper's code, logits and codebook are never 16 bits wide in mixed precision.
        with torch.autocast(img.device.type, enabled=False):
            embeds, codes, noisy_codes, kl = gumbel_codebook(
                features.to(last.weight.dtype), last.weight.flatten(1), last.bias, self.codebook.weight,
                temperature=self.temperature if temp is None else temp, seed=seed, first_row=first_row,
                with_kl=return_loss and self.kl_div_loss_weight != 0, gumbel_noise=gumbel_noise,
            )  # fmt: skip
        maps = self.decoder(embeds)
        if not return_loss:
            return self._pictures(maps)
        reconstruction = self.loss_fn(maps, target)
        loss = reconstruction if kl is None else reconstruction + kl * self.kl_div_loss_weight
        result: list[Tensor | ForwardStatistics] = [loss]
        if return_recons:
            result.append(self._pictures(maps))
        if return_statistics:
            penalty = None if kl is None else kl.detach()
            result.append(ForwardStatistics(codes, noisy_codes, reconstruction.detach(), penalty))
        return tuple(result) if len(result) > 1 else loss

    def _embeds(self, img_seq: Tensor, side: int) -> Tensor:
        """[B, n] -> [B, D, h, w]."""
        return F.embedding(img_seq, self.codebook.weight).unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def _pictures(self, maps: Tensor) -> Tensor:
        """mu and ln b [B, 2c, S, S] -> pixels [B, c, S, S] in 0..1, in the dtype of the maps."""
        mu = cast(Tensor, widened(maps[:, : self.channels]))
        return unmap_pixels(mu.sigmoid()).to(maps.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the original's names, too, wherever this VAE is: `enc.blocks...`, `dec.blocks...`."""
        if any(name.startswith((f"{prefix}enc.", f"{prefix}dec.")) for name in state_dict):
            from dalle_fast.compat.formats.openai_dvae import our_names  # at call time: compat stands above models

            state_dict.update(our_names(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _codes(encoder: nn.Sequential, images: Tensor) -> Tensor:
    """[B, c, S, S] in 0..1 -> int64 [B, n], in the dtype of the weights."""
    last = cast(nn.Conv2d, encoder[-1])
    features = encoder[:-1](map_pixels(images.to(last.weight.dtype)))
    return codebook_indices(features, last.weight.flatten(1), last.bias).flatten(1)


def _encoder(sizes: Sizes) -> nn.Sequential:
    width = sizes.hidden_dim
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    groups = _groups(widths, sizes.blocks_per_group, _ENCODER_KERNELS, "pool", lambda: nn.MaxPool2d(2))
    layers: dict[str, nn.Module] = {"input": _convolution(sizes.channels, width, 7), **groups, "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, output=_convolution(8 * width, sizes.num_tokens, 1)))


def _decoder(sizes: Sizes) -> nn.Sequential:
    width = sizes.hidden_dim
    widths = (sizes.codebook_dim, 8 * width, 4 * width, 2 * width, width)
    groups = _groups(widths, sizes.blocks_per_group, _DECODER_KERNELS, "upsample", lambda: nn.Upsample(scale_factor=2))
    layers: dict[str, nn.Module] = {"input": Bias(sizes.codebook_dim), **groups, "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, output=_convolution(width, 2 * sizes.channels, 1)))


def _groups(
    widths: tuple[int, ...], n_blocks: int, kernels: tuple[int, ...], resized_by: str, resize: Callable[[], nn.Module]
) -> dict[str, nn.Module]:
    """Groups of residual blocks by name, from widths[0] to widths[4]; all but the last end in `resize`."""
    gain = 1 / ((len(widths) - 1) * n_blocks) ** 2
    groups: dict[str, nn.Module] = {}
    for g, (n_in, n_out) in enumerate(pairwise(widths), start=1):
        blocks: dict[str, nn.Module] = {
            f"block_{b}": Block(n_in if b == 1 else n_out, n_out, kernels, gain) for b in range(1, n_blocks + 1)
        }
        if g <= _HALVINGS:
            blocks[resized_by] = resize()
        groups[f"group_{g}"] = nn.Sequential(OrderedDict(blocks))
    return groups


def _convolution(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    """One that keeps height and width, with the paper's first weights: outputs as large as inputs, no bias."""
    conv = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)
    with torch.no_grad():
        conv.weight.normal_(std=1 / math.sqrt(n_in * kernel**2))
        cast(Tensor, conv.bias).zero_()
    return conv


def _check_sizes(image_size: int, given: dict[str, int]) -> None:
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{_NAME}: {name} must be at least 1, got {value}.")
    if given.get("hidden_dim", 4) % 4:
        raise ValueError(f"{_NAME}: hidden_dim must be a multiple of 4, got {given['hidden_dim']}.")
    if image_size < 1 or image_size % 2**_HALVINGS:
        raise ValueError(
            f"{_NAME}: image_size must be a multiple of {2**_HALVINGS}, got {image_size}. Resize the pictures."
        )
