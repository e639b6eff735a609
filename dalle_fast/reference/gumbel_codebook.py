"""Oracle of the gumbel-softmax bottleneck of the discrete VAE, in plain torch.

    l = x . weight^T + bias    noiseless logits of M = B h w rows, [M, K]        n = gumbel noise, tau = temperature
    codes = argmax l           noisy_codes = j = argmax (l + n)                  ties go to the lowest index
    soft:              embeds = softmax((l + n) / tau) . codebook
    straight-through:  embeds = codebook_j, gradient of the softmax above
    reinmax:           embeds = codebook_j, gradient of 2 pi1 - pi0 / 2          (arXiv 2304.08612, algorithm 2)
                       pi0 = softmax(l), pi1 = softmax of l kept at the values (onehot_j + softmax(l / tau)) / 2
    kl = sum over rows of sum_k q_k (log q_k + log K), q = softmax(l)            summed over batch and positions

It is attention whose queries are the features and whose keys are the codes; this oracle stores what a kernel streams.
Precision: float32 and float64 stay what they are. For 16-bit inputs logits, noise, softmax and sums are float32, the
softmax weights are rounded to 16 bits for their product with the codebook.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gumbel_codebook(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    *,
    temperature: float,
    noise: Tensor,
    straight_through: bool = False,
    reinmax: bool = False,
    with_kl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Embeddings of noisily chosen codes; arguments were checked by the op.

    Args:
        features: [B, F, h, w].   weight: [K, F].   bias: [K] or None.   codebook: [K, D].
        noise: [B, K, h, w].
    Returns: embeds [B, D, h, w] in the dtype of features; codes and noisy_codes int64 [B, h, w]; kl, a scalar in the
        dtype of the logits, or None.
    """
    batch, _, height, width = features.shape
    with torch.autocast(features.device.type, enabled=False):
        logits = code_logits(features, weight, bias)
        noisy = logits + _rows(noise).to(logits.dtype)
        codes, noisy_codes = logits.argmax(dim=-1), noisy.argmax(dim=-1)
        if not straight_through:
            embeds = (noisy / temperature).softmax(dim=-1).to(codebook.dtype) @ codebook
        else:
            if reinmax:
                surrogate = _reinmax_weights(logits, noisy_codes, temperature)
            else:
                surrogate = (noisy / temperature).softmax(dim=-1)
            embeds = _hard_embeds(codebook, noisy_codes, surrogate)
        kl = _kl_from_uniform(logits) if with_kl else None
    embeds = embeds.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
    return embeds, codes.view(batch, height, width), noisy_codes.view(batch, height, width), kl


def code_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The noiseless logits, [M, K], float32 for 16-bit inputs."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    x, weight = _rows(features).to(dtype), weight.to(dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))


def _rows(x: Tensor) -> Tensor:
    """[B, C, h, w] as [B h w, C], the last index contiguous."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _hard_embeds(codebook: Tensor, chosen: Tensor, surrogate: Tensor) -> Tensor:
    """codebook[chosen]: its gradient reaches the logits through `surrogate` [M, K], the codebook by the chosen rows."""
    # The difference is exactly zero: values come from the gather alone, and so does the codebook's gradient, which
    # detaching spares a product of zeros.
    through = (surrogate - surrogate.detach()).to(codebook.dtype) @ codebook.detach()
    return codebook[chosen] + through


def _reinmax_weights(logits: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    pi0 = logits.softmax(dim=-1)
    with torch.no_grad():
        pi1 = (logits / temperature).softmax(dim=-1)
        pi1.scatter_add_(1, chosen[:, None], torch.ones_like(pi1[:, :1]))
        # shifts the logits to where their softmax is pi1; a weight of zero stays zero through -inf
        shift = (pi1 / 2).log_() - logits
    return 2 * (shift + logits).softmax(dim=-1) - pi0 / 2


def _kl_from_uniform(logits: Tensor) -> Tensor:
    log_q = logits.log_softmax(dim=-1)
    return (log_q.exp() * (log_q + math.log(logits.shape[-1]))).sum()
