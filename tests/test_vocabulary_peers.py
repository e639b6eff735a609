"""Fused heads of others as peers of vocab_cross_entropy: why they are absent, what they are given, who is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import vocabulary, vocabulary_peers
from benchmarks.bench_vocab_cross_entropy import CASES
from benchmarks.vocabulary_peers import fused_heads

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOYS = [case for case in CASES if case.toy]
LIGER, CCE = fused_heads()


def _mean_loss(rows, weight, bias, labels):
    return F.cross_entropy(F.linear(rows.float(), weight.float(), bias.float()), labels)


def _cut_cross_entropy(e, c, targets, bias=None, impl="cce"):
    assert impl == "cce_exact"
    return _mean_loss(e, c, bias, targets)


def _liger_loss(*, accum_dtype):
    assert accum_dtype == torch.float32
    return lambda weight, rows, labels, bias: _mean_loss(rows, weight, bias, labels)


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins that take what the libraries take."""
    monkeypatch.setattr(vocabulary_peers.importlib.util, "find_spec", lambda name: name)
    liger = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=_liger_loss)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    cut = SimpleNamespace(linear_cross_entropy=_cut_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    return cut


def test_they_say_why_they_are_absent(monkeypatch):
    wide, narrow = (next(case for case in TOYS if case.dtype == dtype) for dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(vocabulary_peers.importlib.util, "find_spec", lambda name: None)
    assert LIGER.missing(wide, CPU) == CCE.missing(narrow, CPU) == "its kernels run on GPUs."
    assert LIGER.missing(wide, GPU) == "needs liger-kernel, which is not installed: pip install liger-kernel."
    assert str(CCE.missing(narrow, GPU)).startswith("needs cut-cross-entropy, which is not installed: pip install git+")
    assert CCE.missing(wide, GPU) == "it is for 16-bit cases."


def test_a_release_without_bias_is_absent(installed, monkeypatch):
    narrow = next(case for case in TOYS if case.dtype == torch.bfloat16)
    assert LIGER.missing(narrow, GPU) is CCE.missing(narrow, GPU) is None
    installed.linear_cross_entropy = lambda e, c, targets, impl: None
    assert str(CCE.missing(narrow, GPU)).startswith("the cut-cross-entropy that is installed takes no bias: pip")


@pytest.mark.parametrize("provider", [LIGER, CCE], ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.label.replace(" ", "-"))
def test_they_are_judged_and_a_wrong_one_is_refused(provider, case, installed, monkeypatch):
    inputs = vocabulary.make_inputs(case, CPU)
    oracle = vocabulary.Oracle(case, inputs)
    assert provider.check(case, provider.prepare(case, inputs, CPU).result(), oracle) is None
    norm = F.layer_norm
    monkeypatch.setattr(vocabulary_peers.F, "layer_norm", lambda *given: 2 * norm(*given))
    wrong = provider.prepare(case, inputs, CPU).result()
    monkeypatch.undo()
    assert "must be within" in str(provider.check(case, wrong, oracle))
