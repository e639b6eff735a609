"""Fold a vq DiscreteVAE into a gumbel one, a plain DiscreteVAE of the original with exactly the quantiser's codes.

z = P h + b_P (P: [D, F], the encoder's last convolution, of its features h), |z - c_k|^2 = |z|^2 - 2 (c_k . z -
|c_k|^2 / 2), so the nearest code is the argmax over k of (P^T c_k) . h + c_k . b_P - |c_k|^2 / 2: a 1x1 convolution
with weight [K, F] and bias [K], a gumbel DiscreteVAE's last layer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dalle_fast.models.dvae import ARGUMENTS_OF, DiscreteVAE
from dalle_fast.models.quantiser import VectorQuantiser

_OF_VQ = {"quantizer", *ARGUMENTS_OF["vq"]}


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


@torch.no_grad()
def folded(vae: DiscreteVAE) -> DiscreteVAE:
    """A gumbel DiscreteVAE with the codes and the pictures of a vq one, which stays as it is.

    Raises: ValueError (no vq; codes of length 1, whose nearest is no linear function of features).
    """
    if not isinstance(vae.codebook, VectorQuantiser):
        raise ValueError(f"fold: vae must have quantizer='vq', got {vae.quantizer!r}. It needs no folding.")
    if vae.codebook.normalised:
        raise ValueError("fold: vae must have normalised_codes=False, got True. Save it as it is, with fold=false.")
    result = DiscreteVAE(**{name: value for name, value in vae.config.items() if name not in _OF_VQ})
    result.encoder[:-1].load_state_dict(vae.encoder[:-1].state_dict())
    result.decoder.load_state_dict(vae.decoder.state_dict())
    result.codebook.weight.copy_(vae.codebook.weight)
    weight, bias = fold(vae.codebook.weight, cast(nn.Conv2d, vae.encoder[-1]))
    result.encoder[-1].load_state_dict({"weight": weight, "bias": bias})
    return result.eval()
