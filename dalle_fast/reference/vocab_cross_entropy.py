"""Oracle of the output head and its two losses, in plain torch.

    y = LayerNorm(h)                       or LayerNorm(h / m), m the signed row maximum of h, a constant to autograd
    positions 0..T-2:   logits = y . W_text^T + b_text     rows 0..num_text_tokens-1 of weight and bias
    positions T-1..:    logits = y . W_image^T + b_image   the other rows
    loss_text, loss_image = means of -log softmax(logits)[label] over the labels of each

The original computes all V logits everywhere and sets the other half to -finfo.max, whose exponential is exactly 0: the
same sums, at 0.40-0.47 of the FLOPs here. Precision: LayerNorm and logits in at least float32; for 16-bit products the
operands (y, weight) are rounded to 16 bits, their products summed in float32. Logits are stored: kernels stream them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # torch's own ignore_index


def vocab_cross_entropy(
    hidden: Tensor,
    norm: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    eps: float,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(loss_text, loss_image); arguments were checked by the op.

    Args:
        hidden: [B, N, C].   norm: weight and bias [C].   weight: [V, C].   bias: [V] or None.   labels: int64 [B, N].
        n_text: positions before it predict text, the others image codes.   eps: of the LayerNorm.
        product_dtype: of the operands of the products with weight.
    Returns: two scalars of at least float32.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.to(dtype)
        if divide_max:
            x = x / x.detach().amax(dim=-1, keepdim=True)
        normed = F.layer_norm(x, x.shape[-1:], norm[0].to(dtype), norm[1].to(dtype), eps)
        normed, weight = (operand.to(product_dtype).to(dtype) for operand in (normed, weight))
        bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
        n, v = n_text, num_text_tokens
        loss_text = _mean_loss(normed[:, :n], weight[:v], bias[:v], labels[:, :n])
        loss_image = _mean_loss(normed[:, n:], weight[v:], bias[v:], labels[:, n:])
    return loss_text, loss_image


def _mean_loss(normed: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count; 0 where none does."""
    logits = F.linear(normed, weight, bias)  # [B, n, V of this half]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    return total / (labels != IGNORED).sum().clamp(min=1)
