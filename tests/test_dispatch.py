"""Choosing an implementation: the best that can, the one asked for, or a sentence."""

import pytest

import dalle_fast
from dalle_fast import dispatch, functional


@pytest.fixture
def op(monkeypatch):
    """An op with an implementation that always runs, a better one for big calls, and one whose extension is absent."""
    monkeypatch.setattr(dispatch, "_OPS", {})
    dispatch.register("op", "reference", lambda: "reference")
    dispatch.register(
        "op", "cpu", lambda: "cpu", supports=lambda size: None if size > 9 else "size must be above 9.", rank=1
    )
    dispatch.register(
        "op", "triton", lambda: "triton", supports=lambda size: "missing: triton is not installed.", rank=2
    )
    return "op"


def test_auto_takes_the_best_that_supports_the_call(op):
    assert dispatch.choose(op, size=10).name == "cpu"
    assert dispatch.choose(op, size=1).name == "reference"


def test_auto_passes_over_what_asks_to_be_avoided(op):
    dispatch.register(op, "cuda", lambda: "cuda", avoid=lambda size: "only for tests." if size < 9 else None, rank=3)
    assert dispatch.choose(op, size=10).name == "cuda"
    assert dispatch.choose(op, size=1).name == "reference"
    assert dispatch.choose(op, "cuda", size=1).name == "cuda"
    assert "cuda: only for tests." in dispatch.explain(op, size=1)


def test_a_name_gets_that_one_or_an_error(op):
    assert dispatch.choose(op, "reference", size=10).name == "reference"
    with pytest.raises(NotImplementedError, match=r"impl='cpu' cannot run here: size must be above 9\."):
        dispatch.choose(op, "cpu", size=1)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: triton is not installed\."):
        dispatch.choose(op, "triton", size=1)
    with pytest.raises(NotImplementedError, match="has no 'cuda' implementation"):
        dispatch.choose(op, "cuda", size=1)
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        dispatch.choose(op, "gpu", size=1)


def test_explain_says_why_each_other_does_not_run(op):
    assert dispatch.explain(op, size=1).splitlines() == [
        "op: runs on 'reference'.",
        "  cpu: size must be above 9.",
        "  triton: triton is not installed.",
        "  cuda: not written for this op.",
    ]


def test_an_op_nothing_supports_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "_OPS", {})
    dispatch.register("op", "cpu", lambda: None, supports=lambda: "not today.")
    with pytest.raises(NotImplementedError, match=r"no implementation supports this call[\s\S]*not today\."):
        dispatch.choose("op")


def test_unknown_names_are_refused(op):
    with pytest.raises(ValueError, match=r"op must be one of op, got 'po'\."):
        dispatch.explain("po")
    with pytest.raises(ValueError, match="implementation must be one of"):
        dispatch.register("op", "gpu", lambda: None)


def test_every_public_op_explains_itself_without_facts():
    assert set(functional.__all__) == dispatch.registered().keys()
    for name in functional.__all__:
        assert dalle_fast.explain(name).startswith(f"{name}: runs on ")
