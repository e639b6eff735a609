"""One token from its logits: the contract of its arguments, the choice of implementation, the registration."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_fast import dispatch, rng
from dalle_fast.ops.checks import check_one_device, dtype_name
from dalle_fast.ops.gumbel_noise import check_positions, check_seeds, gumbel_noise
from dalle_fast.ops.support import supports_cpu
from dalle_fast.reference import choose_token as reference

OP = "choose_token"

Filters = dict[str, Any]  # top_k, temperature, top_p


def _reference(logits: Tensor, seeds: Tensor, positions: Tensor, stream: int, filters: Filters) -> Tensor:
    """The oracle, with the noise written out first by the fastest implementation of `gumbel_noise`."""
    greedy = filters["temperature"] == 0 or filters["top_k"] == 1
    noise = None if greedy else gumbel_noise(seeds, positions, rng.Stream(stream), logits.shape[1])
    return reference.choose_token(logits, noise, **filters)


def _cpu(logits: Tensor, seeds: Tensor, positions: Tensor, stream: int, filters: Filters) -> Tensor:
    native = importlib.import_module("dalle_fast.native.choose_token")
    return native.choose_token(logits, seeds, positions, stream, **filters)


dispatch.register(OP, "reference", _reference)
dispatch.register(OP, "cpu", _cpu, supports=supports_cpu, rank=1)


def choose_token(
    logits: Tensor,
    *,
    seeds: int | Sequence[int] | Tensor,
    positions: int | Tensor,
    stream: rng.Stream,
    top_k: int | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """A token for each row: a sample of softmax(logits / temperature) over what the filters keep.

    It is argmax(logits / temperature + noise) with the Gumbel noise of (seed, position, stream), the lowest id among
    equals. Filters apply in the order of top_k, temperature, top_p.

    Args:
        logits: [B, K], K at least 1. -inf is never chosen unless all are.
        seeds: as `gumbel_noise` takes them, one for all rows or one each.
        positions: of the tokens that are chosen: one for all rows, or integers [B].   stream: who draws.
        top_k: how many of the largest logits stay, with all that equal the last of them; None keeps all.
        temperature: 0 takes the largest logit.
        top_p: a token stays where those with larger logits hold less than top_p of the probability; None keeps all.
        impl: "auto", or the name of one implementation.
    Returns: int64 [B]. Rows whose largest logit / temperature is infinite or NaN get the argmax of their logits.
    Raises: TypeError (dtypes, top_k not an int), ValueError (shape, range, device), RuntimeError (no extension),
        NotImplementedError (impl lacks the dtype or device).
    Numerics: logits / temperature and the sum with the noise in float32, float64 for float64 logits; equal tokens on
        every implementation and instruction set where the noise has equal bits (`gumbel_noise`) and no probability is
        within 2**-25 of top_p.
    Source: top-k as DALLE-pytorch's `filter_thres`, but ties are kept; nucleus sampling, arXiv 1904.09751; the
        Gumbel-max trick.
    """
    if not logits.is_floating_point():
        raise TypeError(f"{OP}: logits must be floating, got {dtype_name(logits)}. Give scores, not ids.")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(
            f"{OP}: logits must be [B, K] with K at least 1, got {list(logits.shape)}. Give the logits of one position."
        )
    check_filters(OP, top_k=top_k, temperature=temperature, top_p=top_p)
    batch = logits.shape[0]
    if not isinstance(positions, Tensor):
        positions = torch.full((batch,), positions, dtype=torch.int64, device=logits.device)
    positions = check_positions(OP, positions)
    check_one_device(OP, logits=logits, positions=positions)
    if len(positions) != batch:
        raise ValueError(
            f"{OP}: positions must be one number or [B={batch}], got [{len(positions)}]. Give one for each row."
        )
    seed_of_row = check_seeds(OP, seeds, positions).expand(batch)
    return _choose_token(
        logits, seed_of_row, positions, int(rng.Stream(stream)), top_k, float(temperature), top_p, impl
    )


def facts(logits: Tensor) -> dict[str, object]:
    """What decides which implementation runs: `dalle_fast.explain("choose_token", **facts(logits))`."""
    return {"device": logits.device.type, "dtype": logits.dtype}


def check_filters(op: str, *, top_k: int | None, temperature: float, top_p: float | None) -> None:
    """Raises ValueError (out of range) or TypeError (top_k not an int) where the filters cannot be meant."""
    largest = torch.finfo(torch.float32).max
    if not 0 <= temperature <= largest:
        raise ValueError(
            f"{op}: temperature must be in 0..{largest:.2g}, got {temperature}. 0 takes the most likely token."
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise TypeError(f"{op}: top_k must be an int, got {top_k!r}. Give a number of tokens, or None for all.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, got {top_k}. None keeps all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}. None keeps all tokens.")


@torch.library.custom_op("dalle_fast::choose_token", mutates_args=())
def _choose_token(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    top_k: int | None,
    temperature: float,
    top_p: float | None,
    impl: str,
) -> Tensor:
    # float32, as the extension divides by it: what rounds to 0 is 0
    temperature = torch.tensor(temperature, dtype=torch.float32).item()
    chosen = dispatch.choose(OP, impl, **facts(logits))
    filters = {"top_k": top_k, "temperature": temperature, "top_p": top_p}
    return chosen.function(logits, seeds, positions, stream, filters)


@_choose_token.register_fake
def _(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    top_k: int | None,
    temperature: float,
    top_p: float | None,
    impl: str,
) -> Tensor:
    return positions.new_empty(logits.shape[0])
