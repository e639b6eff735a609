"""The discrete VAE: pictures to a grid of codes and back, trained through a gumbel softmax or as a VQ-VAE.

    image [B, c, S, S] -> encoder: num_layers strided convolutions, residual blocks -> features [B, F, S/2^L, S/2^L]
    gumbel: features -> gumbel_codebook (1x1 convolution to num_tokens logits, noise, softmax, codebook) -> decoder
    vq:     features -> 1x1 convolution to codebook_dim -> VectorQuantiser (the nearest code) -> decoder

Parameter names are those of dalle_pytorch 1.6.6. Pictures are normalised inside; the decoder returns normalised ones.
Source: DALLE-pytorch DiscreteVAE; DALL-E paper, section 2.1; VQ-VAE, arXiv 1711.00937.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_fast import rng
from dalle_fast.models.alone import computed_alone, each_alone, in_float32, rounded
from dalle_fast.models.quantiser import VectorQuantiser
from dalle_fast.models.saving import Pretrained
from dalle_fast.models.vae_protocol import check_pictures, side_of_codes
from dalle_fast.ops.codebook_indices import codebook_indices
from dalle_fast.ops.gumbel_codebook import gumbel_codebook

Normalization = tuple[Sequence[float], Sequence[float]]

# Numbers of the decoder's widest map that a CPU decodes at once. Torch's transposed convolutions copy their maps twice
# for a while: the copies of a whole batch would be a training step's peak, and fit into no cache.
_AT_ONCE = 2**22

# Arguments of the constructor that mean something to one quantizer only.
ARGUMENTS_OF = {
    "gumbel": ("temperature", "straight_through", "reinmax", "kl_div_loss_weight"),
    "vq": ("commitment_loss_weight", "codebook_decay", "revive_codes_below", "normalised_codes"),
}


@dataclass(frozen=True)
class ForwardStatistics:
    """What a forward pass with a loss knows anyway, without gradients; `training.codebook_usage` makes logs of it.

    codes: int64 [B, h, w], without noise.   noisy_codes: [B, h, w], drawn with the noise (vq: `codes`).
    reconstruction: the loss of the pictures alone.   penalty: the KL divergence (None where its weight is 0), or the
    commitment loss, before its weight.
    """

    codes: Tensor
    noisy_codes: Tensor
    reconstruction: Tensor
    penalty: Tensor | None


class ResBlock(nn.Module):
    """x + three convolutions of x, [B, C, h, w] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class DiscreteVAE(Pretrained):
    """A discrete VAE with the arguments of dalle_pytorch 1.6.6.

    Args:
        image_size: S, a power of two.   num_tokens: K, codes.   codebook_dim: D.   num_layers: L, halvings of S.
        num_resnet_blocks: residual blocks at each end.   hidden_dim: width of convolutions.   channels: of a picture.
        smooth_l1_loss: that instead of the mean squared error.   temperature: of the softmax where forward names none.
        straight_through, reinmax: hard codes forward, see `gumbel_codebook`; reinmax acts with straight_through only.
        kl_div_loss_weight: times the KL divergence from the uniform distribution, summed over batch and positions.
        normalization: (means, stds), one number a channel, or None. Longer ones are cut to `channels`, shorter ones
            repeat their last number: the default leaves channels from the fourth (alpha) on as they are.
        quantizer: "gumbel", or "vq", whose encoder ends in codebook_dim channels, and whose `codebook` is a
            VectorQuantiser. Each has arguments of its own, which the other refuses. Of gumbel: temperature,
            straight_through, reinmax, kl_div_loss_weight. Of vq, the following:
        commitment_loss_weight: times the mean squared distance of the encoder's vectors from their codes.
        codebook_decay: of the moving averages.   revive_codes_below: average count below which a code is moved.
        normalised_codes: vectors and codes of length 1.
    Raises: ValueError (an argument out of range or of the other quantizer, in words).
    """

    def __init__(
        self,
        image_size: int = 256,
        num_tokens: int = 512,
        codebook_dim: int = 512,
        num_layers: int = 3,
        num_resnet_blocks: int = 0,
        hidden_dim: int = 64,
        channels: int = 3,
        smooth_l1_loss: bool = False,
        temperature: float = 0.9,
        straight_through: bool = False,
        reinmax: bool = False,
        kl_div_loss_weight: float = 0.0,
        normalization: Normalization | None = ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)),
        *,
        quantizer: str = "gumbel",
        commitment_loss_weight: float = 0.25,
        codebook_decay: float = 0.99,
        revive_codes_below: float = 0.05,
        normalised_codes: bool = False,
    ) -> None:
        super().__init__()
        _check_quantizer(quantizer, locals())
        _check_minimum("num_tokens", num_tokens, 1)
        _check_minimum("codebook_dim", codebook_dim, 1)
        _check_minimum("num_layers", num_layers, 1)
        _check_minimum("hidden_dim", hidden_dim, 1)
        _check_minimum("channels", channels, 1)
        _check_minimum("num_resnet_blocks", num_resnet_blocks, 0)
        _check_image_size(image_size, num_layers)
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.channels = channels
        self.hidden_dim = hidden_dim
        self.temperature = temperature
        self.straight_through = straight_through
        self.reinmax = reinmax
        self.kl_div_loss_weight = kl_div_loss_weight
        self.quantizer = quantizer
        self.commitment_loss_weight = commitment_loss_weight
        self.normalization = None if normalization is None else _per_channel(normalization, channels)
        self.loss_fn = F.smooth_l1_loss if smooth_l1_loss else F.mse_loss

        self.codebook: nn.Embedding | VectorQuantiser
        if quantizer == "gumbel":
            self.codebook = nn.Embedding(num_tokens, codebook_dim)
        else:
            self.codebook = VectorQuantiser(
                num_tokens,
                codebook_dim,
                decay=codebook_decay,
                revive_below=revive_codes_below,
                normalised=normalised_codes,
            )
        width = num_tokens if quantizer == "gumbel" else codebook_dim
        self.encoder = _encoder(channels, hidden_dim, num_layers, num_resnet_blocks, width)
        self.decoder = _decoder(channels, hidden_dim, num_layers, num_resnet_blocks, codebook_dim)

    def norm(self, images: Tensor) -> Tensor:
        """(images - mean) / std by channel, a new tensor; `images` itself where normalization is None."""
        if self.normalization is None:
            return images
        means, stds = (images.new_tensor(values).view(-1, 1, 1) for values in self.normalization)
        return (images - means) / stds

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The codes of pictures, without noise.

        Args: images [B, c, S, S], not normalised.
        Returns: int64 [B, n], raster order. No layer here depends on the training flag, so it is left alone.
        """
        check_pictures("DiscreteVAE", images, self.channels, self.image_size)
        features = self.encoder[:-1](self.norm(images))
        last = cast(nn.Conv2d, self.encoder[-1])
        if isinstance(self.codebook, VectorQuantiser):
            return self.codebook.nearest(last(features)).flatten(1)
        return codebook_indices(features, last.weight.flatten(1), last.bias).flatten(1)

    def decode(self, img_seq: Tensor) -> Tensor:
        """Pictures of code grids.

        Args: img_seq: int64 or int32 [B, n], n a square number, ids below num_tokens.
        Returns: [B, c, sqrt(n) 2^L, sqrt(n) 2^L], normalised as the inputs of training were.
        Numerics: on CPUs a picture's bits depend on its codes and the weights alone; 16-bit models compute in float32.
        """
        side = side_of_codes("DiscreteVAE", img_seq, self.num_tokens)
        if not computed_alone(img_seq):
            return self.decoder(self._embeds(img_seq, side))
        decoder, rows = in_float32(self.decoder), img_seq.split(1)
        return torch.cat(each_alone(lambda i: rounded(decoder, self._embeds(rows[i], side)), len(rows)))

    def _embeds(self, img_seq: Tensor, side: int) -> Tensor:
        """[B, n] -> [B, D, h, w]."""
        return F.embedding(img_seq, self.codebook.weight).unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def _decode_embeds(self, embeds: Tensor) -> Tensor:
        """[B, D, h, w] -> pictures; on CPUs as many at a time as `_AT_ONCE` says."""
        widest = self.hidden_dim * embeds.shape[2] * embeds.shape[3] * 4**self.num_layers
        at_once = max(1, _AT_ONCE // widest)
        if embeds.device.type != "cpu" or len(embeds) <= at_once:
            return self.decoder(embeds)
        return torch.cat([self.decoder(part) for part in embeds.split(at_once)])

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
        """Reconstructs pictures through noisily chosen codes, or through the nearest ones (vq).

        Args:
            img: [B, c, S, S], not normalised.   temp: temperature; default the model's (0.0 is a value, and refused).
            return_logits: only the logits of every code.   return_loss: the loss.   return_recons: (loss, pictures).
            gumbel_noise: [B, K, h, w] instead of noise from a seed.
            seed: of the noise; default drawn from torch's default generator, so that a second call differs.
            first_row: number of the first of these B h w positions in the batch of all ranks and accumulation steps
                that share a seed; default `rng.first_row_of_rank`: ranks never meet each other's noise.
            return_statistics: with return_loss, also ForwardStatistics, last. Costs nothing.
        Returns: pictures [B, c, S, S], normalised; or logits [B, K, h, w]; or the scalar loss; or what was asked for
            of (loss, pictures, statistics).
        Raises: ValueError (wrong size, channels, temperature or noise; what vq does not know).
        """
        check_pictures("DiscreteVAE", img, self.channels, self.image_size)
        if return_statistics and not return_loss:
            raise ValueError("DiscreteVAE: return_statistics must come with return_loss=True, got False. Ask for both.")
        img = self.norm(img)
        if self.quantizer == "vq":
            logits = return_logits or None
            _check_unknown_to_vq(
                return_logits=logits, temp=temp, gumbel_noise=gumbel_noise, seed=seed, first_row=first_row
            )
        elif return_logits:
            return self.encoder(img)

        if isinstance(self.codebook, VectorQuantiser):
            embeds, codes, penalty = self.codebook(self.encoder(img))
            noisy_codes, weight = codes, self.commitment_loss_weight
        else:
            with_kl = return_loss and self.kl_div_loss_weight != 0
            embeds, codes, noisy_codes, penalty = self._through_gumbel(
                img, with_kl=with_kl, temp=temp, gumbel_noise=gumbel_noise, seed=seed, first_row=first_row
            )
            weight = self.kl_div_loss_weight
        out = self._decode_embeds(embeds)
        if not return_loss:
            return out

        reconstruction = self.loss_fn(out, img)
        loss = reconstruction if penalty is None else reconstruction + penalty * weight
        wanted = (loss, out) if return_recons else (loss,)
        if return_statistics:
            penalty = None if penalty is None else penalty.detach()
            return *wanted, ForwardStatistics(codes, noisy_codes, reconstruction.detach(), penalty)
        return wanted if return_recons else loss

    def _through_gumbel(
        self,
        img: Tensor,
        *,
        with_kl: bool,
        temp: float | None,
        gumbel_noise: Tensor | None,
        seed: int | Tensor | None,
        first_row: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Normalised pictures -> embeds [B, D, h, w], codes and noisy codes [B, h, w], KL or None."""
        features = self.encoder[:-1](img)
        to_logits = cast(nn.Conv2d, self.encoder[-1])
        if first_row is None:
            first_row = rng.first_row_of_rank(features.shape[0] * features.shape[2] * features.shape[3])
        return gumbel_codebook(
            features,
            to_logits.weight.flatten(1),
            to_logits.bias,
            self.codebook.weight,
            temperature=self.temperature if temp is None else temp,
            seed=seed,
            first_row=first_row,
            straight_through=self.straight_through,
            reinmax=self.reinmax,
            with_kl=with_kl,
            gumbel_noise=gumbel_noise,
        )


def _encoder(channels: int, hidden: int, n_layers: int, n_blocks: int, width: int) -> nn.Sequential:
    widths = [channels] + [hidden] * n_layers
    halve = [
        nn.Sequential(nn.Conv2d(wide_in, wide_out, 4, stride=2, padding=1), nn.ReLU())
        for wide_in, wide_out in pairwise(widths)
    ]
    blocks = [ResBlock(hidden) for _ in range(n_blocks)]
    return nn.Sequential(*halve, *blocks, nn.Conv2d(hidden, width, 1))


def _decoder(channels: int, hidden: int, n_layers: int, n_blocks: int, codebook_dim: int) -> nn.Sequential:
    # With residual blocks a 1x1 convolution brings the codes to their width; without, the first doubling does.
    blocks = [nn.Conv2d(codebook_dim, hidden, 1)] + [ResBlock(hidden) for _ in range(n_blocks)] if n_blocks else []
    widths = [hidden if n_blocks else codebook_dim] + [hidden] * n_layers
    double = [
        nn.Sequential(nn.ConvTranspose2d(wide_in, wide_out, 4, stride=2, padding=1), nn.ReLU(inplace=True))
        for wide_in, wide_out in pairwise(widths)
    ]
    return nn.Sequential(*blocks, *double, nn.Conv2d(hidden, channels, 1))


def _check_quantizer(quantizer: str, arguments: Mapping[str, object]) -> None:
    """Raises ValueError where `quantizer` is unknown, or where an argument of the other one is not at its default."""
    if quantizer not in ARGUMENTS_OF:
        raise ValueError(
            f"DiscreteVAE: quantizer must be one of {', '.join(map(repr, ARGUMENTS_OF))}, got {quantizer!r}."
        )
    parameters = inspect.signature(DiscreteVAE.__init__).parameters
    for other, names in ARGUMENTS_OF.items():
        for name in names:
            if other != quantizer and arguments[name] != parameters[name].default:
                raise ValueError(
                    f"DiscreteVAE: {name} must be left out with quantizer={quantizer!r}, got {arguments[name]!r}."
                    f" It is an argument of quantizer={other!r}."
                )


def _check_unknown_to_vq(**given: object) -> None:
    """Raises ValueError where forward got an argument that quantizer="vq" has no use for."""
    for name, value in given.items():
        if value is not None:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"DiscreteVAE: {name} must be left out with quantizer='vq', got {shown}."
                " It takes the nearest code: there are no logits, and there is no noise."
            )


def _check_minimum(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"DiscreteVAE: {name} must be at least {minimum}, got {value}.")


def _check_image_size(image_size: int, num_layers: int) -> None:
    if image_size < 1 or image_size & (image_size - 1):
        raise ValueError(f"DiscreteVAE: image_size must be a power of two, got {image_size}. Resize the pictures.")
    if image_size < 2**num_layers:
        raise ValueError(
            f"DiscreteVAE: image_size must be at least 2^num_layers = {2**num_layers}, got {image_size}."
            " Take fewer layers."
        )


def _per_channel(normalization: Normalization, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, stds) of `channels` numbers each."""
    if len(normalization) != 2 or not all(len(values) for values in normalization):
        raise ValueError(
            f"DiscreteVAE: normalization must be (means, stds), one number a channel, got {normalization!r}."
            " Give None for no normalization."
        )
    means, stds = ((*values, *([values[-1]] * channels))[:channels] for values in normalization)
    if 0 in stds:
        raise ValueError(
            f"DiscreteVAE: normalization's stds must not be 0, got {stds}. Give 1 to leave a channel as it is."
        )
    return means, stds
