"""Output head and loss of DALLE in one: the contract of its arguments and the choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast import dispatch
from dalle_fast.layout import TokenLayout
from dalle_fast.ops.checks import check_one_device, check_one_dtype, check_shape, dtype_name
from dalle_fast.reference import vocab_cross_entropy as reference

OP = "vocab_cross_entropy"
IGNORED = reference.IGNORED

dispatch.register(OP, "reference", reference.vocab_cross_entropy)


def vocab_cross_entropy(
    hidden: Tensor,
    norm: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    layout: TokenLayout,
    num_text_tokens: int,
    *,
    divide_max: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm, the vocabulary's logits and their cross entropy, text and image apart.

    Positions 0..T-2 predict text and T-1.. image codes, so each needs its own half of the vocabulary only: the loss is
    exactly that of the original, which computes all logits and masks the other half.

    Args:
        hidden: [B, N, C], the transformer's output, N <= layout.max_inputs.
        norm: weight and bias [C] of the LayerNorm.   weight: [V, C] and bias: [V] or None, the head: text rows first.
        labels: int64 [B, N], what each position predicts: text ids 0..num_text_tokens-1 at positions 0..T-2, from there
            image codes 0..V-num_text_tokens-1 (without offset); -100 = not counted.
        layout: where text ends.   num_text_tokens: rows of the text half, padding ids included.
        divide_max: first divide each row by its signed maximum, the original's `stable`; no gradient through it.
        eps: of the LayerNorm.   impl: "auto", or the name of one implementation.
    Returns: (loss_text, loss_image), means over the labels that count, 0 where none does; scalars of at least float32.
    Raises: TypeError (dtype), ValueError (shape, range; ids are checked on the CPU, where looking costs no wait, but
        not under torch.compile), NotImplementedError (impl lacks it), RuntimeError (no GPU, no extension).
    Numerics: LayerNorm, logits and sums in float32, or in float64 for float64 inputs; under autocast the operands of
        the products are rounded to its dtype.
    Source: DALLE-pytorch DALLE.forward.
    """
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if not autocast:
        check_one_dtype(OP, hidden=hidden, norm_weight=norm[0], norm_bias=norm[1], weight=weight, bias=bias)
    check_one_device(OP, hidden=hidden, norm_weight=norm[0], norm_bias=norm[1], weight=weight, bias=bias, labels=labels)
    n_text = layout.text_len - 1
    _check_shapes(hidden, norm, weight, bias, labels, layout, num_text_tokens)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids("text", labels[:, :n_text], num_text_tokens)
        _check_ids("image", labels[:, n_text:], len(weight) - num_text_tokens)
    chosen = dispatch.choose(OP, impl, **facts(hidden, weight))
    return chosen.function(
        hidden,
        norm,
        weight,
        bias,
        labels,
        n_text=n_text,
        num_text_tokens=num_text_tokens,
        divide_max=divide_max,
        eps=eps,
        product_dtype=torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype,
    )


def facts(hidden: Tensor, weight: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("vocab_cross_entropy", **facts(hidden, weight))`."""
    return {"device": hidden.device.type, "dtype": hidden.dtype, "dim": hidden.shape[-1], "n_vocabulary": len(weight)}


def _check_shapes(
    hidden: Tensor,
    norm: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    layout: TokenLayout,
    num_text_tokens: int,
) -> None:
    if hidden.dim() != 3 or hidden.shape[1] > layout.max_inputs:
        raise ValueError(
            f"{OP}: hidden must be [B, N, C] with N at most {layout.max_inputs}, the layout's inputs, got"
            f" {list(hidden.shape)}. The last image token is never an input."
        )
    batch, n, width = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{OP}: weight must be [V, C={width}], got {list(weight.shape)}. Give the head's own weight.")
    if not 0 <= num_text_tokens <= len(weight):
        raise ValueError(
            f"{OP}: num_text_tokens must be in 0..V={len(weight)}, got {num_text_tokens}."
            " It counts the text rows of weight, padding ids included."
        )
    for name, parameter in zip(("norm's weight", "norm's bias"), norm, strict=True):
        check_shape(OP, name, parameter, {"C": width}, "It belongs to the LayerNorm before the head.")
    if bias is not None:
        check_shape(OP, "bias", bias, {"V": len(weight)}, "There is one bias a row of weight.")
    if labels.dtype != torch.int64:
        raise TypeError(f"{OP}: labels must be int64, got {dtype_name(labels)}. Convert them with .long().")
    check_shape(OP, "labels", labels, {"B": batch, "N": n}, "Position i predicts token i + 1.")


def _check_ids(half: str, labels: Tensor, n_ids: int) -> None:
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= n_ids))]
    if len(wrong):
        raise ValueError(
            f"{OP}: labels of {half} positions must be in 0..{n_ids - 1}, or {IGNORED} for not counted, got"
            f" {int(wrong[0])}. Image codes come without the offset of the text vocabulary."
        )
