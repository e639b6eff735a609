"""A training step of DALLE, forward and backward without an optimiser, beside a plain transformer and the original.

Cases: d512 (four kinds of layers, 1280 tokens, batch 1 and 4) and an odd shape, in float32 and under bfloat16 autocast
with weights in float32, as trainers run it. The original always runs in float32, as it trains. `ours_checkpointing` and
`ours_reversible` keep fewer activations and compute them again.

`plain_compiled` is another model of the same size (benchmarks/plain_transformer.py), judged by its own definition
written a second time; `original` has the weights of ours. Judged are the loss and every gradient, against float64 on
the oracles; a peer may err PEER_SLACK times what ours may. Ours errs under autocast as much as its oracle does there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import decoding, peers, vocabulary
from benchmarks.bench_sampler import ODD, TOY
from benchmarks.decoding import CYCLE, D512, SEED
from benchmarks.decoding_peers import PEER_SLACK, original_model
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider
from benchmarks.machine import has_bfloat16_products
from benchmarks.plain_transformer import PlainTransformer, by_hand
from dalle_fast import patterns
from dalle_fast.compat import upstream_names
from dalle_fast.functional import sparse_attention, vocab_cross_entropy
from dalle_fast.models import attention, dalle
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

OP, ORACLE, MODE = "training_step", "reference", vocabulary.BOTH
F32, BF16 = torch.float32, torch.bfloat16
CASES = (
    *(Case("d512", D512 | {"attn_types": CYCLE}, dtype, mode=MODE) for dtype in (F32, BF16)),
    Case("d512_b4", D512 | {"attn_types": CYCLE, "batch": 4}, mode=MODE),
    Case("odd", ODD | {"attn_types": CYCLE}, mode=MODE),
    *(Case("toy", TOY | {"attn_types": CYCLE}, dtype, toy=True, mode=MODE) for dtype in (F32, BF16)),
)

Results = dict[str, Tensor]
Loss = Callable[[], Tensor]


class Inputs:
    """Our model in float32, the plain one, text ids [B, text_seq_len] and image codes [B, n]."""

    def __init__(self, case: Case, device: torch.device) -> None:
        sizes = case.sizes
        given = decoding.Inputs(replace(case, dtype=F32), device)
        self.given, self.model = given, given.model.train()
        self._case, self._device = case, device
        self.text, self.codes = given.text.expand(sizes["batch"], -1), given.tokens_of_all()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            names = ("dim", "depth", "heads", "dim_head")
            self.plain = PlainTransformer(
                **{name: sizes[name] for name in names},
                n_tokens=self.model.total_tokens,
                length=self.model.total_seq_len,
            ).to(device)

    @functools.cached_property
    def reversible(self) -> DALLE:
        """Our model of the same sizes in reversible blocks: another function of its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            vae = decoding.vae_of(DiscreteVAE, self._case)
            return DALLE(vae=vae, reversible=True, **decoding.arguments(self._case)).to(self._device)

    def sequence(self) -> tuple[Tensor, Tensor]:
        """What the plain model reads and predicts, [B, N] each: text, then codes behind the text's vocabulary."""
        text = self.model.padded_text(self.text)
        whole = torch.cat((text, self.codes + self.model.num_text_tokens), dim=1)
        return whole[:, :-1], whole[:, 1:]


def _autocast(case: Case, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, BF16, enabled=case.dtype == BF16)


def _gradients(loss: Loss, parameters: dict[str, Tensor], context: Any) -> Results:
    with context:
        value = loss()
    found = torch.autograd.grad(value, list(parameters.values()))
    names = (f"gradient of {name}" for name in parameters)
    return {"loss": value.detach()} | dict(zip(names, found, strict=True))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}


# ------------------------------------------------------------------------------------------------ what is right


class Expected:
    """Loss and gradients of the models in float64, and how far off each may be, over the largest of it."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._device = inputs.text.device

    @functools.cached_property
    def of_ours(self) -> tuple[Results, float]:
        """By the oracles of attention and loss."""
        return self._by_oracles(self._inputs.model)

    @functools.cached_property
    def of_reversible(self) -> tuple[Results, float]:
        """By the same oracles."""
        return self._by_oracles(self._inputs.reversible)

    def _by_oracles(self, judged: DALLE) -> tuple[Results, float]:
        inputs = self._inputs

        def run(model: nn.Module, context: Any) -> Results:
            assert isinstance(model, DALLE)
            with (
                mock.patch.object(attention, "sparse_attention", functools.partial(sparse_attention, impl=ORACLE)),
                mock.patch.object(dalle, "vocab_cross_entropy", functools.partial(vocab_cross_entropy, impl=ORACLE)),
            ):
                model.transformer.checkpointing = True  # in float64, all layers at once would be gigabytes a sample
                return _gradients(lambda: model(inputs.text, inputs.codes, return_loss=True), _trained(model), context)

        return self._judged(judged, run)

    @functools.cached_property
    def of_plain(self) -> tuple[Results, float]:
        """By the definition written a second time."""
        tokens, labels = self._inputs.sequence()

        def run(model: nn.Module, context: Any) -> Results:
            assert isinstance(model, PlainTransformer)
            return _gradients(lambda: by_hand(model, tokens, labels), _trained(model), context)

        return self._judged(self._inputs.plain, run)

    def _judged(self, model: nn.Module, run: Callable[[nn.Module, Any], Results]) -> tuple[Results, float]:
        """The exact results; the oracle's own largest relative error in the case's precision, twice, and a rounding."""
        own = run(model, _autocast(self._case, self._device))
        try:
            exact = run(model.double(), torch.autocast(self._device.type, enabled=False))
        finally:
            model.float()
        worst = max(_off(own[name], exact[name]) for name in exact)
        return exact, 2 * worst + torch.finfo(self._case.dtype).eps / 2


def _off(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def _complaint(got: Results, right: tuple[Results, float], slack: float) -> str | None:
    """None where `got` is right, or in words which result is wrong, and by how much."""
    exact, allowed = right
    if set(got) != set(exact):
        return f"must give {len(exact)} results, gave {len(got)}."
    for name, value in got.items():
        error = _off(value, exact[name])
        if not error <= slack * allowed:  # NaN is not
            return f"{name} must be within {slack * allowed:.3g} of its largest value, is off by {error:.3g}."
    return None


def _check(case: Case, got: Results, expected: Expected) -> str | None:
    return _complaint(got, expected.of_ours, 1.0)


def _check_reversible(case: Case, got: Results, expected: Expected) -> str | None:
    return _complaint(got, expected.of_reversible, 1.0)


def _check_original(case: Case, got: Results, expected: Expected) -> str | None:
    return _complaint(got, expected.of_ours, PEER_SLACK)


def _check_plain(case: Case, got: Results, expected: Expected) -> str | None:
    return _complaint(got, expected.of_plain, PEER_SLACK)


# ------------------------------------------------------------------------------------------------ who is measured


def _job(step: Callable[[], Results]) -> Job:
    return Job(result=step, pieces={"step": step})


def _no_products(case: Case, device: torch.device) -> str | None:
    if case.dtype == BF16 and not case.toy and device.type == "cpu" and not has_bfloat16_products():
        return "this processor has no bfloat16 products: autocast is no faster than float32."
    return None


def _job_of(model: DALLE, case: Case, inputs: Inputs, device: torch.device, *, checkpointing: bool = False) -> Job:
    parameters = _trained(model)

    def loss() -> Tensor:
        model.transformer.checkpointing = checkpointing
        found: Tensor = model(inputs.text, inputs.codes, return_loss=True)
        return found

    return _job(lambda: _gradients(loss, parameters, _autocast(case, device)))


def _prepare_ours(case: Case, inputs: Inputs, device: torch.device) -> Job:
    return _job_of(inputs.model, case, inputs, device)


def _prepare_checkpointing(case: Case, inputs: Inputs, device: torch.device) -> Job:
    return _job_of(inputs.model, case, inputs, device, checkpointing=True)


def _prepare_reversible(case: Case, inputs: Inputs, device: torch.device) -> Job:
    return _job_of(inputs.reversible, case, inputs, device)


def _prepare_plain(case: Case, inputs: Inputs, device: torch.device) -> Job:
    torch._dynamo.reset()  # what earlier cases compiled counts towards a limit behind which nothing is compiled
    tokens, labels = inputs.sequence()
    model = torch.compile(inputs.plain, fullgraph=True, dynamic=False)
    return _job(lambda: _gradients(lambda: model(tokens, labels), _trained(inputs.plain), _autocast(case, device)))


def _plain_missing(case: Case, device: torch.device) -> str | None:
    return "compiles for ten seconds: left out at toy sizes." if case.toy else _no_products(case, device)


def _prepare_original(case: Case, inputs: Inputs, device: torch.device) -> Job:
    model = original_model(replace(case, dtype=F32), inputs.given, device).train()
    theirs = dict(model.named_parameters())
    names = upstream_names(inputs.model)
    parameters = {name: theirs[names[name]] for name in _trained(inputs.model)}

    def loss() -> Tensor:
        found: Tensor = model(inputs.text, inputs.codes, return_loss=True)
        return found

    return _job(lambda: _gradients(loss, parameters, torch.autocast(device.type, enabled=False)))


def _original_missing(case: Case, device: torch.device) -> str | None:
    return peers.missing()


# ------------------------------------------------------------------------------------------------ the cost


def cost(case: Case) -> Cost:
    """The least work of our step: the products of layers and of the head that counts, the pairs patterns allow, thrice.

    Thrice: the gradients of both operands cost what the product did. Bytes: the parameters twice, their gradients.
    Activations are not counted. The plain transformer has more to do (all pairs of the past, the whole head), the
    original most.
    """
    sizes, n_image = case.sizes, decoding.n_image(case)
    n_text, dim, inner = sizes["text_seq_len"], sizes["dim"], sizes["heads"] * sizes["dim_head"]
    text_codes = decoding.TEXT_VOCABULARY + n_text
    n = n_text + n_image
    layers = sum(depth * width for depth, width in decoding.matrices_of(case)[:-1])
    pairs = 0
    for layer in range(sizes["depth"]):
        name = sizes["attn_types"][layer % len(sizes["attn_types"])]
        pairs += _pairs(name, n_text + 1, sizes["grid"])
    logits = n_text * text_codes + n_image * sizes["codes"]
    products = n * layers + 2 * inner * pairs + dim * logits
    biases = dim + 9 * dim  # of what follows attention, and of the feed-forward
    parameters = layers + sizes["depth"] * (biases + 2 * 3 * dim)  # and norms and LayerScale of both branches
    parameters += (text_codes + sizes["codes"]) * (2 * dim + 1) + 2 * dim
    return Cost(
        read_bytes=2 * 4 * parameters,
        write_bytes=4 * parameters,
        flops=3 * 2 * sizes["batch"] * products,
        items=sizes["batch"],
        unit="samples",
        result_bytes=4 * parameters,
    )


@functools.cache
def _pairs(name: str, text_len: int, grid: int) -> int:
    pattern = patterns.make(name, text_len=text_len, grid=(grid, grid))
    return int(pattern.dense(pattern.layout.max_inputs).sum())


BENCHMARK = Benchmark(
    op=OP,
    mode=MODE,
    cases=CASES,
    providers=(
        Provider("ours", _prepare_ours, _no_products),
        Provider("ours_checkpointing", _prepare_checkpointing, _no_products),
        Provider("ours_reversible", _prepare_reversible, _no_products, check=_check_reversible),
        Provider("plain_compiled", _prepare_plain, _plain_missing, check=_check_plain),
        Provider("original", _prepare_original, _original_missing, check=_check_original, packages=peers.PACKAGES),
    ),
    inputs=Inputs,
    expected=Expected,
    check=_check,
    cost=cost,
    baseline="plain_compiled",
    cold=False,
    budget_s=60.0,
)
