"""The head and its cross entropy in C++ (csrc/cpu/vocab_cross_entropy*): launchers for 32- and 16-bit floats, CPU.

The structures repeat those of csrc/cpu/vocab_cross_entropy.h. Tensors may differ in dtype, as under autocast. Rows of
hidden are read where they lie; parameters and labels are made contiguous first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dalle_fast import _extension

_OP = "vocab_cross_entropy"
_STATISTICS = 6
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Elements(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("element", _I32)]

    @classmethod
    def of(cls, tensor: Tensor) -> _Elements:
        return cls(tensor.data_ptr(), _ELEMENTS[tensor.dtype])


class _CodeGradient(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("lower", _POINTER)]  # lower: the extension's own


class _VocabCrossEntropy(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("batch", "n", "width", "n_text", "text_codes", "codes")),
        *(("product", _I32), ("divide_max", _I32), ("eps", ctypes.c_float)),
        *(("hidden", _Elements), ("stride_b", _I64), ("stride_n", _I64)),
        *((name, _Elements) for name in ("norm_weight", "norm_bias", "weight", "bias")),
        *((name, _POINTER) for name in ("labels", "statistics", "losses")),
        ("dlosses", ctypes.c_float * 2),
        *((name, _POINTER) for name in ("dhidden", "dnorm_weight", "dnorm_bias")),
        *(("dweight", _CodeGradient), ("dbias", _CodeGradient), ("threads", _I64)),
    ]


def forward(
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
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
    """Mean losses of both halves, and what the backward pass needs to make the softmax again.

    Args: as `dalle_fast.reference.vocab_cross_entropy`, checked by the op; at least one row.
    Returns: float32 [2], text and image; float32 statistics [_STATISTICS, B N], named in
        csrc/cpu/vocab_cross_entropy.h, 0 where a label does not count.
    """
    losses = torch.empty(2, dtype=torch.float32)
    statistics = torch.empty(_STATISTICS, labels.numel(), dtype=torch.float32)
    tensors = (hidden, norm_weight, norm_bias, weight, bias, labels)
    call = _Call(*tensors, statistics, n_text, num_text_tokens, divide_max, product_dtype)
    call.arguments.eps, call.arguments.losses = eps, losses.data_ptr()
    _extension.check(_extension.library().dalle_fast_vocab_cross_entropy_forward(call.pointer()), _OP)
    return losses, statistics


def backward(
    dlosses: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    *,
    n_text: int,
    num_text_tokens: int,
    divide_max: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden (contiguous), the norm's weight and bias, weight, and bias ([0] where there is none)."""
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype)
    dnorm_weight, dnorm_bias, dweight = (t.new_empty(t.shape) for t in (norm_weight, norm_bias, weight))
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    tensors = (hidden, norm_weight, norm_bias, weight, bias, labels)
    call = _Call(*tensors, statistics, n_text, num_text_tokens, divide_max, product_dtype)
    call.arguments.dlosses[:] = dlosses.tolist()
    for name, tensor in (("dhidden", dhidden), ("dnorm_weight", dnorm_weight), ("dnorm_bias", dnorm_bias)):
        setattr(call.arguments, name, tensor.data_ptr())
    call.arguments.dweight = _CodeGradient(dweight.data_ptr())
    if bias is not None:
        call.arguments.dbias = _CodeGradient(dbias.data_ptr())
    _extension.check(_extension.library().dalle_fast_vocab_cross_entropy_backward(call.pointer()), _OP)
    return dhidden, dnorm_weight, dnorm_bias, dweight, dbias


class _Call:
    """The arguments of one call, and the tensors they point into."""

    def __init__(
        self,
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
    ) -> None:
        if hidden.stride(-1) != 1:
            hidden = hidden.contiguous()
        parameters = [t.contiguous() for t in (norm_weight, norm_bias, weight, bias) if t is not None]
        self.kept = [hidden, *parameters, labels.contiguous(), statistics.contiguous()]
        self.arguments = _VocabCrossEntropy(
            *(*hidden.shape, n_text, num_text_tokens, len(weight), _ELEMENTS[product_dtype], divide_max)
        )
        arguments = self.arguments
        arguments.hidden = _Elements.of(hidden)
        arguments.stride_b, arguments.stride_n, _ = hidden.stride()
        for name, parameter in zip(("norm_weight", "norm_bias", "weight", "bias"), parameters, strict=False):
            setattr(arguments, name, _Elements.of(parameter))
        arguments.labels, arguments.statistics = (tensor.data_ptr() for tensor in self.kept[-2:])
        arguments.threads = torch.get_num_threads()

    def pointer(self) -> int:
        return ctypes.addressof(self.arguments)
