"""Which engine decodes: what all of them do, and in words why one cannot.

`eager` runs the model's own modules in torch, anywhere and whatever was done to them; `cpu` is written in C++ and knows
the modules as this package makes them. Its reason is the line in `explain`, and the error where it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle_fast import _extension
from dalle_fast.models.attention import Attention, FeedForward
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.transformer import Block, Branch, DivideMax, Transformer
from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.eager import EagerEngine
from dalle_fast.sampling.filters import Filters
from dalle_fast.sampling.packed import WEIGHT_DTYPES

ENGINES = ("eager", "cpu")


class Engine(Protocol):
    """Reads a prefix, then tokens, and gives the logits of what comes next; or draws it."""

    def prefill(self, text: Tensor, codes: Tensor | None = None) -> Tensor:
        """Starts with text ids [B, n], `<bos>` first, and codes [B, m] behind a complete text. Returns: [B, V]."""

    def step(self, tokens: Tensor) -> Tensor:
        """Reads tokens [B, M] behind the prefix. Returns: [B, M, V]."""

    def rollback(self, n: int) -> None:
        """Takes the last n tokens back."""

    def draw(self, codes: Tensor, first: int, count: int, filters: Filters, seeds: Tensor) -> None:
        """Fills codes [B, R * C] in place, `count` of them from `first` on, which is how many have been read.

        Args:
            codes: int64; what is not -1 is kept, and read in its turn.
            filters: how a code is chosen.   seeds: int64 [B], 64 bits each.
        The engine is then behind all of them but the last of the image, which nobody reads.
        """


def choose_engine(
    model: DALLE,
    engine: str = "auto",
    *,
    weight_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    op: str = "generate_images",
) -> str:
    """The engine that decodes this model: `cpu` where it can, unless another is asked for by name.

    Args:
        weight_dtype: what the engine is to hold weights as; `eager` holds none.
        max_memory: bytes it may take; `eager` takes what it needs.
        op: who speaks where something is refused.
    Raises: ValueError (unknown name or dtype), NotImplementedError (the engine cannot run this model), RuntimeError
        (what it needs is missing from this machine).
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"{op}: engine must be 'auto' or one of {', '.join(ENGINES)}, got {engine!r}.")
    if weight_dtype is not None and weight_dtype not in WEIGHT_DTYPES:
        known = ", ".join(str(dtype) for dtype in WEIGHT_DTYPES)
        raise ValueError(f"{op}: weight_dtype must be None or one of {known}, got {weight_dtype}.")
    if max_memory is not None and (isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1):
        raise ValueError(f"{op}: max_memory must be a number of bytes, at least 1, got {max_memory!r}.")
    reasons = _reasons(model, weight_dtype, max_memory)
    if engine == "auto":
        engine = "cpu" if reasons["cpu"] is None else "eager"
        if reasons[engine] is not None:
            said = "\n".join(f"  {name}: {_said(reason)}" for name, reason in reasons.items())
            raise NotImplementedError(f"{op}: no engine can do this.\n{said}")
        return engine
    reason = reasons[engine]
    if reason is not None:
        error = RuntimeError if reason.startswith("missing: ") else NotImplementedError
        raise error(f"{op}: engine={engine!r} cannot run here: {_said(reason)} Use engine='auto' for another one.")
    return engine


def explain(
    *, model: DALLE | None = None, weight_dtype: torch.dtype | None = None, max_memory: int | None = None
) -> str:
    """In words: which engine decodes this model, and why the other does not."""
    if model is None:
        raise TypeError('explain: "decode" needs the model, got none. Write explain("decode", model=model).')
    chosen = choose_engine(model, weight_dtype=weight_dtype, max_memory=max_memory, op="explain")
    reasons = _reasons(model, weight_dtype, max_memory)
    others = (f"  {name}: {_said(reasons[name])}" for name in ENGINES if name != chosen)
    return "\n".join((f"decode: runs on {chosen!r}.", *others))


def make_engine(
    name: str,
    model: DALLE,
    *,
    cond_scale: float = 1.0,
    max_step: int = 1,
    max_rollback: int = 0,
    weight_dtype: torch.dtype | None = None,
) -> Engine:
    """The engine of this name, as `choose_engine` gives it."""
    if name == "eager":
        return EagerEngine(model, cond_scale=cond_scale, max_step=max_step, max_rollback=max_rollback)
    return CpuEngine(
        model, cond_scale=cond_scale, max_step=max_step, max_rollback=max_rollback, weight_dtype=weight_dtype
    )


def _reasons(model: DALLE, weight_dtype: torch.dtype | None, max_memory: int | None) -> Mapping[str, str | None]:
    return {"eager": _why_not_eager(weight_dtype, max_memory), "cpu": why_not_cpu(model)}


def _said(reason: str | None) -> str:
    return "supported, slower." if reason is None else reason.removeprefix("missing: ")


def _why_not_eager(weight_dtype: torch.dtype | None, max_memory: int | None) -> str | None:
    if weight_dtype is not None:
        return f"it computes with the model's own weights, not with weight_dtype={weight_dtype}."
    return None if max_memory is None else "it draws a whole batch at once, and keeps to no max_memory."


# ------------------------------------------------------------------------------------------------ the C++ engine


def why_not_cpu(model: DALLE) -> str | None:
    """None where the C++ engine computes what this model's modules would; else one sentence."""
    return (
        _why_not_tensors(model)
        or _extension.missing()
        or _why_not_modules(model)
        or _why_not_layers(list(model.transformer.blocks))
    )


def _why_not_tensors(model: DALLE) -> str | None:
    for name, parameter in _own(model.named_parameters()):
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, whose values it cannot read."
        if parameter.device.type != "cpu":
            return f"it runs on the CPU, {name} is on {parameter.device.type!r}."
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it computes in float32, {name} is {str(parameter.dtype).removeprefix('torch.')}."
    return "autocast is on, which it does not follow." if torch.is_autocast_enabled("cpu") else None


def _why_not_modules(model: DALLE) -> str | None:
    """Whether somebody hooked, replaced, wrapped or compiled a module: it would run past what they did."""
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "a hook for all modules is registered, which it would not call."
    for name, module in _own(model.named_modules()):
        what, known = name or "the model", _classes_at(name)
        if not known:  # an addition, which none of the others calls
            continue
        if type(module) not in known:
            expected = " or ".join(cls.__name__ for cls in known)
            return f"{what} is a {type(module).__name__}, not the {expected} that it computes."
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{what} has hooks, which it would not call."
        if module._compiled_call_impl is not None:
            return f"{what} is compiled by torch, which it would not use."
        for attribute in vars(module):
            if callable(getattr(type(module), attribute, None)):
                return f"{what} has a {attribute} of its own, which it would not call."
        if isinstance(module, nn.LayerNorm) and (module.eps != model.logits_norm.eps or module.bias is None):
            return f"{what} has no bias or another eps than logits_norm, which it takes for all."
    return None


_MOST_HEAD_WIDTH = 1024  # kMostHeadWidth of csrc/cpu/decode_kernels.h

_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    "": (DALLE,),
    "transformer": (Transformer,),
    "blocks": (nn.ModuleList,),
    **dict.fromkeys(("attn", "ff"), (Branch,)),
    **dict.fromkeys(("to_qkv", "to_out", "w_in", "w_out", "to_logits"), (nn.Linear,)),
    **dict.fromkeys(("norm", "logits_norm"), (nn.LayerNorm,)),
    **dict.fromkeys(("text_emb", "image_emb", "text_pos_emb"), (nn.Embedding,)),
    "norm_out": (nn.LayerNorm, nn.Identity),
    "divide_max": (DivideMax, nn.Identity),
    "dropout": (nn.Dropout,),
}


def _classes_at(name: str) -> tuple[type[nn.Module], ...]:
    """The classes that this package puts at a place; none where it puts nothing."""
    *above, last = name.split(".")
    if last == "fn":
        return (Attention,) if above[-1] == "attn" else (FeedForward,)
    return (Block,) if last.isdigit() else _CLASSES.get(last, ())


def _why_not_layers(blocks: list[Any]) -> str | None:
    """Whether layers differ in what it takes to be the same for all, or attend as it does not."""
    first = blocks[0]
    for i, block in enumerate(blocks):
        attention, feed_forward, pattern = block.attn.fn, block.ff.fn, block.attn.fn.pattern
        if pattern.name in ("block_sparse", "bidirectional"):
            return f"layer {i} attends by {pattern.name}: it knows patterns whose image tokens see all text."
        if attention.dim_head > _MOST_HEAD_WIDTH:
            return f"layer {i} has heads of {attention.dim_head} channels: it holds {_MOST_HEAD_WIDTH} at most."
        if _sizes(block) != _sizes(first):
            return f"layer {i} has other sizes than layer 0: it takes them to be alike."
        if (attention.to_out.bias is None) or (feed_forward.w_in.bias is None) or (feed_forward.w_out.bias is None):
            return f"layer {i} has a projection without bias, which it would read."
    return None


def _sizes(block: Any) -> tuple[object, ...]:
    attention, feed_forward = block.attn.fn, block.ff.fn
    linears = attention.to_qkv, attention.to_out, feed_forward.w_in, feed_forward.w_out
    norms = [norm for branch in (block.attn, block.ff) for norm in (branch.norm, branch.norm_out)]
    return (
        *(attention.heads, attention.dim_head, attention.to_qkv.bias is None, block.attn.layout, block.ff.layout),
        *(tuple(linear.weight.shape) for linear in linears),
        *(None if isinstance(norm, nn.Identity) else norm.normalized_shape for norm in norms),
    )


def _own(named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Without those of the VAE, which decodes pixels and nothing else."""
    return ((name, part) for name, part in named if name != "vae" and not name.startswith("vae."))
