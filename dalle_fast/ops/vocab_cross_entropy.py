"""Output head and loss of DALLE in one: the contract of its arguments, the choice of implementation, the registration.

    y = LayerNorm(hidden)      l = y . weight^T + bias, each half by itself      loss = mean of log sum exp l - l_label

"reference" is plain torch and differentiates itself. The others are pairs of launchers, `forward` and `backward`, in
`dalle_fast.native` and `dalle_fast.kernels`, behind one custom op: saved are the inputs and a few numbers a row from
which normed rows and softmax are made again; nothing with an axis of the vocabulary.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dalle_fast import dispatch
from dalle_fast.layout import TokenLayout
from dalle_fast.ops.checks import check_one_device, check_one_dtype, check_shape, dtype_name
from dalle_fast.ops.support import auto_avoids_triton, refuse_second_derivative, supports_cpu, supports_triton
from dalle_fast.reference import vocab_cross_entropy as reference

OP = "vocab_cross_entropy"
IGNORED = reference.IGNORED
_LAUNCHERS = {
    "cpu": "dalle_fast.native.vocab_cross_entropy",
    "triton": "dalle_fast.kernels.vocab_cross_entropy",
}
_STATISTICS = 6  # float32 [this many, B N], for the backward


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
        hidden: [B, N, C], the transformer's output, N <= layout.max_inputs; C at least 1.
        norm: weight and bias [C] of the LayerNorm.   weight: [V, C] and bias: [V] or None, the head: text rows first.
            One floating dtype with hidden, one device; under torch.autocast dtypes may differ.
        labels: int64 [B, N], what each position predicts: text ids 0..num_text_tokens-1 at positions 0..T-2, from there
            image codes 0..V-num_text_tokens-1 (without offset); -100 = not counted.
        layout: where text ends.   num_text_tokens: rows of the text half, padding ids included.
        divide_max: first divide each row by its signed maximum, the original's `stable`; no gradient through it.
        eps: of the LayerNorm.   impl: "auto", or the name of one implementation.
    Returns: (loss_text, loss_image), means over the labels that count, 0 where none does; scalars of at least float32.
    Raises: TypeError (dtype), ValueError (shape, range; ids are checked on the CPU, where looking costs no wait, by
        the reference not under torch.compile), NotImplementedError (impl lacks it), RuntimeError (no GPU, no extension,
        second derivative).
    Numerics: LayerNorm, logits and sums in float32, or in float64 for float64 inputs. The operands of the products
        (normed rows, weight) are rounded to 16 bits where the inputs are of 16 bits, or to autocast's dtype.
    Source: DALLE-pytorch DALLE.forward.
    """
    tensors = {"hidden": hidden, "norm_weight": norm[0], "norm_bias": norm[1], "weight": weight, "bias": bias}
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if autocast:
        _check_floating(tensors)
    else:
        check_one_dtype(OP, **tensors)
    check_one_device(OP, **tensors, labels=labels)
    _check_shapes(hidden, norm, weight, bias, labels, layout, num_text_tokens)
    chosen = dispatch.choose(OP, impl, **facts(hidden, weight, *norm, bias))
    return chosen.function(
        hidden,
        norm,
        weight,
        bias,
        labels,
        n_text=layout.text_len - 1,
        num_text_tokens=num_text_tokens,
        divide_max=divide_max,
        eps=eps,
        product_dtype=torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype,
    )


def facts(hidden: Tensor, weight: Tensor, *others: Tensor | None) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("vocab_cross_entropy", **facts(hidden, weight))`.

    Args: others: the norm's parameters and the bias, whose dtypes matter where they differ: the widest counts.
    """
    dtype = hidden.dtype
    for t in (weight, *others):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return {"device": hidden.device.type, "dtype": dtype, "dim": hidden.shape[-1], "n_vocabulary": len(weight)}


# ------------------------------------------------------------------------------------------------ implementations


def launchers(impl: str) -> ModuleType:
    """The module of `forward` and `backward` of an implementation."""
    return importlib.import_module(_LAUNCHERS[impl])


def _reference(
    hidden: Tensor,
    norm: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    n_text: int,
    num_text_tokens: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        _check_ids(labels, weight, n_text, num_text_tokens)
    return reference.vocab_cross_entropy(
        hidden, norm, weight, bias, labels, n_text=n_text, num_text_tokens=num_text_tokens, **options
    )


def _fused(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    losses, _ = _forward(
        hidden, *norm, weight, bias, labels, n_text, num_text_tokens, divide_max, eps, product_dtype, impl
    )
    loss_text, loss_image = losses.unbind()
    return loss_text, loss_image


dispatch.register(OP, "reference", _reference)
dispatch.register(OP, "cpu", partial(_fused, impl="cpu"), supports=supports_cpu, rank=1)
dispatch.register(
    OP, "triton", partial(_fused, impl="triton"), supports=supports_triton, avoid=auto_avoids_triton, rank=2
)


# ------------------------------------------------------------------------------------------------ registration


@torch.library.custom_op("dalle_fast::vocab_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    eps: float,
    product_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _check_ids(labels, weight, n_text, num_text_tokens)
    if not labels.numel():
        losses, statistics = _results_like(hidden, labels)
        return losses.zero_(), statistics
    return launchers(impl).forward(
        hidden,
        norm_weight,
        norm_bias,
        weight,
        bias,
        labels,
        n_text=n_text,
        num_text_tokens=num_text_tokens,
        divide_max=divide_max,
        eps=eps,
        product_dtype=product_dtype,
    )


@torch.library.custom_op("dalle_fast::vocab_cross_entropy_backward", mutates_args=())
def _backward(
    dlosses: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    product_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not labels.numel():
        dhidden, *parameters = _gradients_like(hidden, norm_weight, norm_bias, weight, bias)
        dnorm_weight, dnorm_bias, dweight, dbias = (t.zero_() for t in parameters)
        return dhidden, dnorm_weight, dnorm_bias, dweight, dbias
    return launchers(impl).backward(
        dlosses,
        hidden,
        norm_weight,
        norm_bias,
        weight,
        bias,
        labels,
        statistics,
        n_text=n_text,
        num_text_tokens=num_text_tokens,
        divide_max=divide_max,
        product_dtype=product_dtype,
    )


@_forward.register_fake
def _(
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return _results_like(hidden, labels)


@_backward.register_fake
def _(
    dlosses: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients_like(hidden, norm_weight, norm_bias, weight, bias)


def _results_like(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """losses, statistics: allocated, not filled."""
    losses = hidden.new_empty(2, dtype=torch.float32)
    return losses, hidden.new_empty(_STATISTICS, labels.numel(), dtype=torch.float32)


def _gradients_like(
    hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dnorm_weight, dnorm_bias, dweight, dbias: allocated, not filled."""
    dhidden, dnorm_weight, dnorm_bias, dweight = (
        t.new_empty(t.shape) for t in (hidden, norm_weight, norm_bias, weight)
    )
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dhidden, dnorm_weight, dnorm_bias, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, n_text, num_text_tokens, divide_max, _, product_dtype, impl = inputs
    ctx.rest = n_text, num_text_tokens, divide_max, product_dtype, impl
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, dlosses: Tensor | None, _: None) -> Any:
    gradients: tuple[Tensor | None, ...] = (None,) * 5
    needed = ctx.needs_input_grad[:5]
    if any(needed) and dlosses is not None:
        given = _backward(dlosses, *ctx.saved_tensors, *ctx.rest)
        gradients = tuple(g if wanted else None for g, wanted in zip(given, needed, strict=True))
    return *gradients, *(None,) * 7


torch.library.register_autograd("dalle_fast::vocab_cross_entropy", _differentiate, setup_context=_save)
torch.library.register_autograd("dalle_fast::vocab_cross_entropy_backward", refuse_second_derivative(OP))


# ------------------------------------------------------------------------------------------------ checks


def _check_floating(tensors: dict[str, Tensor | None]) -> None:
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{OP}: {name} must be floating, got {dtype_name(t)}. Convert it with .to(dtype).")


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
    if width == 0:
        raise ValueError(f"{OP}: hidden must have a width of at least 1, got {list(hidden.shape)}. Give all channels.")
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


def _check_ids(labels: Tensor, weight: Tensor, n_text: int, num_text_tokens: int) -> None:
    if labels.device.type != "cpu":
        return
    sizes = {"text": num_text_tokens, "image": len(weight) - num_text_tokens}
    for (half, n_ids), ids in zip(sizes.items(), (labels[:, :n_text], labels[:, n_text:]), strict=True):
        wrong = ids[(ids != IGNORED) & ((ids < 0) | (ids >= n_ids))]
        if len(wrong):
            raise ValueError(
                f"{OP}: labels of {half} positions must be in 0..{n_ids - 1}, or {IGNORED} for not counted, got"
                f" {int(wrong[0])}. Image codes come without the offset of the text vocabulary."
            )
