"""One token from its logits in plain torch: the specification of the op, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_token(
    logits: Tensor, noise: Tensor | None, *, top_k: int | None, temperature: float, top_p: float | None
) -> Tensor:
    """int64 [B]: argmax(filtered(logits) + noise), the lowest id among equals.

    argmax(logits) without noise and where temperature is 0 or top_k 1; also in rows whose largest logit / temperature
    is not finite: their softmax is that of ever smaller temperatures, or none.

    Args: logits, noise: [B, K], computed with in float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    most_likely = logits.argmax(dim=-1)
    if noise is None or temperature == 0 or top_k == 1:
        return most_likely
    chosen = (filtered(logits, top_k=top_k, temperature=temperature, top_p=top_p) + noise).argmax(dim=-1)
    return torch.where(divided(logits, temperature).amax(dim=-1).isfinite(), chosen, most_likely)


def filtered(logits: Tensor, *, top_k: int | None, temperature: float, top_p: float | None) -> Tensor:
    """logits / temperature [B, K], -inf where a filter drops the token.

    top_k keeps all that equal the last of the k largest; top_p, after it, those above which less than top_p of the
    probability lies, whatever their order among equals.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    scaled = divided(logits, temperature)
    if top_p is None or top_p >= 1:
        return scaled
    ordered = scaled.sort(dim=-1, descending=True).values
    probability = ordered.double().softmax(dim=-1)
    above = probability.cumsum(dim=-1) - probability
    n_kept = (above < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return scaled.masked_fill(scaled < ordered.gather(-1, n_kept - 1), -torch.inf)


def divided(logits: Tensor, temperature: float) -> Tensor:
    # by a tensor: torch multiplies with the reciprocal of a number
    return logits / logits.new_full((1,), temperature)
