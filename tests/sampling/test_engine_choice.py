"""Which engine decodes, and the sentence of the one that does not."""

import copy
import pickle

import pytest
import torch
from small_models import prompts, small_dalle
from torch import nn

import dalle_fast
from dalle_fast import _extension
from dalle_fast.models.dalle import DALLE
from dalle_fast.sampling import packed as packing
from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.eager import EagerEngine
from dalle_fast.sampling.engine import choose_engine, explain

needs_extension = pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))


class Hidden(nn.Linear):
    """A subclass, as adapters put in a layer's place."""


class Subclass(DALLE):
    pass


def replaced(model):
    model.transformer.blocks[1].attn.fn.to_out = Hidden(32, 32)


def wrapped(model):
    model.transformer.blocks[0].ff.fn.w_out = nn.Sequential(model.transformer.blocks[0].ff.fn.w_out)


def own_forward(model):
    model.transformer.blocks[2].ff.fn.forward = lambda x: x


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.to_logits)


def other_eps(model):
    model.transformer.blocks[3].ff.norm.eps = 1e-3


def no_bias(model):
    model.transformer.blocks[0].ff.fn.w_in.bias = None


def other_size(model):
    model.transformer.blocks[1].ff.fn.w_in, model.transformer.blocks[1].ff.fn.w_out = (
        nn.Linear(32, 64),
        nn.Linear(32, 32),
    )


def half_double(model):
    model.logits_norm.double()


CHANGES = {
    "a hook": (lambda m: m.transformer.blocks[0].attn.register_forward_hook(lambda *_: None), "attn has hooks"),
    "a pre-hook": (lambda m: m.to_logits.register_forward_pre_hook(lambda *_: None), "to_logits has hooks"),
    "a subclass": (replaced, "to_out is a Hidden, not the Linear"),
    "a wrapper": (wrapped, "w_out is a Sequential, not the Linear"),
    "a forward": (own_forward, "fn has a forward of its own"),
    "a method": (lambda m: setattr(m, "embed_image", lambda *_: None), "the model has a embed_image of its own"),
    "a parametrization": (parametrized, "to_logits is a ParametrizedLinear"),
    "compiled": (lambda m: m.transformer.compile(), "transformer is compiled"),
    "eps": (other_eps, "ff.norm has no bias or another eps"),
    "bias": (no_bias, "layer 0 has a projection without bias"),
    "size": (other_size, "layer 1 has other sizes"),
    "dtype": (half_double, "logits_norm.weight is float64"),
    "device": (lambda m: m.to("meta"), "is on 'meta'"),
}


@needs_extension
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_runs_eager_and_says_why(name):
    change, reason = CHANGES[name]
    model = small_dalle(torch.float32)
    assert choose_engine(model) == "cpu"
    change(model)
    assert choose_engine(model) == "eager"
    assert reason in dalle_fast.explain("decode", model=model)
    with pytest.raises(NotImplementedError, match=rf"engine='cpu' cannot run here: .*{reason}"):
        model.generate_images(prompts(1), engine="cpu")


@needs_extension
def test_global_hooks_autocast_and_patterns_are_reasons_too():
    model = small_dalle(torch.float32)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "a hook for all modules is registered" in explain(model=model)
    finally:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in explain(model=model)
    assert "layer 0 has heads of 1040 channels" in explain(model=small_dalle(torch.float32, dim_head=1040))
    assert "layer 0 attends by block_sparse" in explain(model=small_dalle(torch.float32, attn_types="sparse"))
    child = small_dalle(torch.float32)
    child.__class__ = Subclass
    assert "the model is a Subclass, not the DALLE" in explain(model=child)
    assert explain(model=model) == "decode: runs on 'cpu'.\n  eager: supported, slower."


@needs_extension
def test_what_nobody_calls_is_no_reason():
    model = small_dalle(torch.float32)
    model.probe = Hidden(3, 3)
    model.vae.register_forward_hook(lambda *_: None)
    assert choose_engine(model) == "cpu"


def test_without_the_extension_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("DALLE_FAST_NO_EXTENSION", "1")
    model = small_dalle(torch.float32)
    assert choose_engine(model) == "eager"
    with pytest.raises(RuntimeError, match="engine='cpu' cannot run here: the compiled extension is switched off"):
        model.generate_images(prompts(1), engine="cpu")
    with pytest.raises(
        NotImplementedError, match=r"no engine can do this[\s\S]*weight_dtype=torch.int8[\s\S]*switched"
    ):
        model.generate_images(prompts(1), weight_dtype=torch.int8)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"engine": "gpu"}, ValueError, "engine must be 'auto' or one of eager, cpu, got 'gpu'"),
        ({"weight_dtype": torch.float64}, ValueError, "weight_dtype must be None or one of torch.float32"),
        ({"max_memory": -1}, ValueError, "max_memory must be a number of bytes, at least 1, got -1"),
        ({"engine": "eager", "weight_dtype": torch.int8}, NotImplementedError, "with the model's own weights"),
        ({"engine": "eager", "max_memory": 1 << 30}, NotImplementedError, "keeps to no max_memory"),
        ({"engine": "eager", "use_cache": False}, ValueError, "engine, weight_dtype and max_memory must be left out"),
    ],
)
def test_bad_choices_are_refused_in_words(settings, error, message):
    with pytest.raises(error, match=message):
        small_dalle(torch.float32).generate_images(prompts(1), **settings)


def test_explain_needs_a_model():
    with pytest.raises(TypeError, match=r'"decode" needs the model'):
        dalle_fast.explain("decode")


@needs_extension
def test_copies_and_pickles_of_a_model_leave_its_packed_weights_behind():
    model = small_dalle(torch.float32)
    before = pickle.dumps(model)
    model.generate_images(prompts(1), engine="cpu")
    assert model in packing._PACKED
    assert pickle.dumps(model) == before
    assert copy.deepcopy(model) not in packing._PACKED
    held = len(packing._PACKED)
    del model
    assert len(packing._PACKED) == held - 1


@needs_extension
def test_texts_are_written_by_either_engine():
    model = small_dalle(torch.float32)
    prompt = model.padded_text(prompts(2))
    for n, steps in ((1, (2, 1, 1, 1)), (3, (1, 1, 1))):
        engines = EagerEngine(model, max_step=2, max_rollback=1), CpuEngine(model, max_step=2, max_rollback=1)
        with torch.no_grad():
            logits = [engine.prefill(prompt[:, :n]) for engine in engines]
            assert torch.equal(*(each.argmax(-1) for each in logits))
            for m in steps:
                for engine in engines:  # tokens that are taken back leave no trace
                    engine.step(torch.ones_like(prompt[:, :1]))
                    engine.rollback(1)
                logits = [engine.step(prompt[:, n : n + m]) for engine in engines]
                n += m
                assert logits[0].shape == logits[1].shape
                assert torch.equal(*(each.argmax(-1) for each in logits))
