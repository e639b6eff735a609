"""Attention of others, as they are best used: torch's SDPA, compiled flex_attention, the original's layers.

* `sdpa_causal` computes every key up to the query, more than the pattern allows: the same shape at the speed of a
  kernel that knows no pattern. It is judged by what it computes.
* `sdpa_mask` is given the dense mask, `flex` a block mask; both compute what the pattern allows. On the CPU flex runs
  forward only, fastest (of what was tried) on contiguous inputs and blocks of 32 with the mask looked up. Copies,
  masks and compilation are not in its time.
* `original_layer` is the original's attention class with its two projections: it has no attention to time alone. Its
  backward runs only with rotary embeddings, its default, so it is given angles there (of zero).

A peer owes the same numbers, not our precision: it may err `PEER_SLACK` times what ours may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.attention import BOTH, FORWARD, Attend, Inputs, Oracle, attend_in, causal_pattern, judge, pattern_of
from benchmarks.harness import Case, Job, Provider
from dalle_fast.ops.sparse_attention import sparse_attention
from tests.tolerance import budget

CPU_BLOCK, CUDA_BLOCK = 32, 128
PEER_SLACK = 8.0
HEAVY = 200_000_000  # scores a call, three times as many with a backward: a second on two cores


def speed_peers() -> tuple[Provider, ...]:
    """The peers, in the order of the tables."""
    return (
        Provider("sdpa_causal", _prepare_sdpa_causal, check=_check_causal),
        Provider("sdpa_mask", _prepare_sdpa_mask, _sdpa_mask_missing, check=_check_pattern),
        Provider("flex", _prepare_flex, _flex_missing, check=_check_pattern),
        Provider("original_layer", _prepare_original, _original_missing, check=_check_layer, packages=peers.PACKAGES),
    )


def _job(case: Case, attend: Attend, inputs: Inputs) -> Job:
    whole = functools.partial(attend_in, case.mode or FORWARD, attend, inputs)
    return Job(result=whole, pieces={"whole": whole})


def _check_pattern(case: Case, got: tuple[Tensor, ...], oracle: Oracle) -> str | None:
    return oracle.complaint(got, pattern_of(case), PEER_SLACK)


def missing_beyond_sweep(case: Case, device: torch.device) -> str | None:
    """None, or in words why only ours and sdpa_causal run this case."""
    return "left out of the sweep over grids: see the other cases." if "sweep" in case.sizes else None


def heavy(case: Case, device: torch.device, limit: int) -> str | None:
    """None, or in words why what computes (or stores) all N x N scores is left out of this case on a CPU."""
    sizes = case.sizes
    scores = sizes["batch"] * sizes["heads"] * sizes["n"] ** 2 * (3 if case.mode == BOTH else 1)
    return None if device.type != "cpu" or scores <= limit else "left out: seconds a call at this size."


# ------------------------------------------------------------------------------------------------ SDPA


def _prepare_sdpa_causal(case: Case, inputs: Inputs, device: torch.device) -> Job:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _job(case, attend, inputs)


def _check_causal(case: Case, got: tuple[Tensor, ...], oracle: Oracle) -> str | None:
    return oracle.complaint(got, causal_pattern(case), PEER_SLACK)


def _sdpa_mask_missing(case: Case, device: torch.device) -> str | None:
    return missing_beyond_sweep(case, device) or heavy(case, device, HEAVY)


def _prepare_sdpa_mask(case: Case, inputs: Inputs, device: torch.device) -> Job:
    mask = pattern_of(case).dense(case.sizes["n"]).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _job(case, attend, inputs)


# ------------------------------------------------------------------------------------------------ flex_attention


def _flex_missing(case: Case, device: torch.device) -> str | None:
    if device.type == "cpu" and case.mode == BOTH:
        return "flex_attention has no backward on the CPU."
    if case.toy:
        return "compiles for ten seconds: left out at toy sizes."
    if device.type == "cuda" and case.dtype != torch.bfloat16:
        return "compiles for long: on a GPU it is measured in bfloat16."
    return missing_beyond_sweep(case, device)


def _prepare_flex(case: Case, inputs: Inputs, device: torch.device) -> Job:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports the compiler: seconds

    torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
    pattern, n = pattern_of(case), case.sizes["n"]
    if device.type == "cpu":
        dense = pattern.dense(n)

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return dense[query, key]

    else:

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return pattern.allowed(query, key)

    size = CPU_BLOCK if device.type == "cpu" else CUDA_BLOCK
    mask = create_block_mask(allowed, None, None, n, n, device=str(device), BLOCK_SIZE=size)
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return _job(case, functools.partial(compiled, block_mask=mask), Inputs(*(x.contiguous() for x in inputs)))


# ------------------------------------------------------------------------------------------------ the original


def _original_missing(case: Case, device: torch.device) -> str | None:
    sizes = case.sizes
    if device.type != "cpu":
        return "the original is measured on the CPU."
    if case.dtype != torch.float32:
        return "the original keeps its scores in the dtype of its inputs: 16 bits are too few to be verified."
    if sizes["grid"][0] != sizes["grid"][1]:
        return "the original knows square grids only."
    if sizes["batch"] * sizes["heads"] > 8:
        return "the original is measured at batch 1."
    return missing_beyond_sweep(case, device) or heavy(case, device, HEAVY) or peers.missing()


class _Layer(nn.Module):
    """The original's attention class for a pattern; ours computes what it owes, from the same weights."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.pattern = pattern_of(case)
        self.heads = case.sizes["heads"]
        layout = self.pattern.layout
        width = case.sizes["head_dim"]
        made, options = peers.attention_class(self.pattern.name)
        if self.pattern.name != "full":
            options = options | {"image_size": layout.grid_rows}
        self.layer = made(self.heads * width, layout.max_inputs, heads=self.heads, dim_head=width, **options)
        self.angles = torch.zeros(1, layout.length, 6 * (width // 6)) if case.mode == BOTH else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H * D] -> [B, N, H * D] by the original."""
        return self.layer(x, rotary_pos_emb=self.angles)

    def expected(self, x: Tensor) -> Tensor:
        """[B, N, H * D] -> [B, N, H * D] by our reference between the layer's projections."""
        batch, n, _ = x.shape
        q, k, v = self.layer.to_qkv(x).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = sparse_attention(q, k, v, pattern=self.pattern, impl="reference")
        return self.layer.to_out(out.transpose(1, 2).flatten(2))

    def run(self, mode: str, function: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """The output of `function`, in the mode with a backward with the gradients of x and of the weights."""
        if mode == FORWARD:
            with torch.no_grad():
                return (function(x),)
        x = x.detach().requires_grad_()
        out = function(x)
        return out.detach(), *torch.autograd.grad(out, (x, *self.parameters()), dout)


def _prepare_original(case: Case, inputs: Inputs, device: torch.device) -> Job:
    torch.manual_seed(0)
    layer = _Layer(case).to(device, case.dtype)
    x, dout = (t.transpose(1, 2).flatten(2) for t in (inputs.q, inputs.dout))  # [B, N, H * D]
    mode = case.mode or FORWARD

    def result() -> tuple[_Layer, Tensor, Tensor, tuple[Tensor, ...]]:
        return layer, x, dout, whole()

    def whole() -> tuple[Tensor, ...]:
        return layer.run(mode, layer, x, dout)

    return Job(result=result, pieces={"whole": whole})


def _check_layer(case: Case, got: tuple[_Layer, Tensor, Tensor, tuple[Tensor, ...]], oracle: Oracle) -> str | None:
    layer, x, dout, results = got
    mode = case.mode or FORWARD
    own = layer.run(mode, layer.expected, x, dout)
    layer.double()
    exact = layer.run(mode, layer.expected, x.double(), dout.double())
    layer.to(case.dtype)
    names = ("out", "dx", *(f"gradient of {name}" for name, _ in layer.layer.named_parameters()))
    budgets = tuple(PEER_SLACK * budget(e, o) for e, o in zip(exact, own, strict=True))
    return judge(names, list(results), exact, budgets)
