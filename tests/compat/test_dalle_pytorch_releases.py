"""Checkpoints of released versions of dalle_pytorch: built with the defaults of their release, they compute the same.

Names, shapes, buffers and logits were recorded by record_releases.py with the releases themselves.
"""

from __future__ import annotations

import pytest
import torch
from record_releases import ALL_TYPES, HPARAMS, inputs, recorded

from dalle_fast import _extension
from dalle_fast.compat.formats.base import Companions
from dalle_fast.compat.formats.dalle_pytorch import describe_dalle, load_dalle
from dalle_fast.compat.formats.recognise import recognise
from dalle_fast.compat.formats.releases import CENTRED_CONV, built
from dalle_fast.compat.reading import read
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

MISSING = _extension.missing()
# shift_tokens, rotary_emb
OPTIONS = {
    "0.9.0": (False, False),
    "0.10.0": (False, False),
    "0.12.1": (False, False),
    "0.14.3": (False, False),
    "1.0.0": (True, False),
    "1.0.1": (False, False),
    "1.0.5": (True, True),
    "1.1.1": (True, True),
    "1.1.2": (True, True),
    "1.1.6": (False, True),
    "1.4.0": (True, True),
    "1.5.0": (True, False),
}
TOLD = {
    "0.9.0": "0.9.0 to 0.9.6",
    "0.10.0": "0.10.0 to 1.1.5",
    "0.12.1": "0.12.1 to 0.12.4",
    "0.14.3": "0.10.0 to 1.1.5",
    "1.0.0": "1.0.0 to 1.1.5",
    "1.0.1": "0.10.0 to 1.1.5",
    "1.0.5": "1.0.5 to 1.1.1",
    "1.1.1": "1.0.5 to 1.1.1",
    "1.1.2": "1.1.2 to 1.1.5",
    "1.1.6": "1.1.6",
    "1.4.0": "1.4.0",
    "1.5.0": "1.5.0",
}


def in_a_file(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "dalle.pt")
    return read(tmp_path / "dalle.pt")


@pytest.mark.parametrize("release", HPARAMS)
def test_the_file_of_a_release_computes_what_the_release_did(release, tmp_path):
    checkpoint, logits = recorded(release)
    stored = in_a_file(checkpoint, tmp_path)
    known = recognise(stored)
    assert known.name == "dalle_pytorch DALLE (.pt)"
    model = known.load(stored, Companions())
    assert not model.training and not any(p.requires_grad for p in model.vae.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), logits)


@pytest.mark.parametrize("release", HPARAMS)
def test_a_file_tells_its_release_and_what_its_defaults_were(release):
    checkpoint, _ = recorded(release)
    made = built(checkpoint["hparams"], checkpoint["weights"], checkpoint.get("version"))
    assert (made.release, made.problem) == (TOLD[release], "")
    assert (made.arguments["shift_tokens"], made.arguments["rotary_emb"]) == OPTIONS[release]
    assert made.arguments["reversible"] == HPARAMS[release].get("reversible", False)
    assert made.arguments["sandwich_norm"] == HPARAMS[release].get("sandwich_norm", False)
    assert (made.grid, made.num_image_tokens) == ((4, 4), 12)
    architecture = describe_dalle(checkpoint, "").architecture
    assert architecture["image_grid"] == "4 x 4" and architecture["vae"] == "DiscreteVAE"


@pytest.mark.parametrize("release", HPARAMS)
def test_load_state_dict_takes_the_weights_of_a_release(release):
    checkpoint, logits = recorded(release)
    shift, rotary = OPTIONS[release]
    options = {**checkpoint["hparams"], "shift_tokens": shift, "rotary_emb": rotary}
    if tuple(map(int, release.split("."))) < (1, 5):  # its window, which names cannot tell
        options["attn_types"] = tuple(CENTRED_CONV if t == "conv_like" else t for t in options["attn_types"])
    model = DALLE(vae=DiscreteVAE(**checkpoint["vae_params"]), **options).eval()
    model.load_state_dict(checkpoint["weights"])
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), logits)


def test_windows_of_convolutions_are_those_of_the_release():
    before, since = (recorded(release)[0] for release in ("1.4.0", "1.5.0"))
    for checkpoint, named in ((before, CENTRED_CONV), (since, "conv_like")):
        made = built(checkpoint["hparams"], checkpoint["weights"], checkpoint["version"])
        assert made.arguments["attn_types"] == (*ALL_TYPES[:3], named)
    # not merely another spelling: the other window computes something else
    checkpoint, logits = recorded("1.4.0")
    model = load_dalle({**checkpoint, "version": "1.5.0"}, Companions(), None)
    with torch.no_grad():
        assert (model(*inputs()) - logits).abs().max() > 0.01


def test_a_saved_one_is_the_same(tmp_path):
    checkpoint, logits = recorded("1.1.2")
    load_dalle(checkpoint, Companions(), tmp_path).save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(DALLE.from_pretrained(tmp_path / "model")(*inputs()), logits)


@pytest.mark.parametrize("release", ["0.12.1", "1.4.0"])
def test_an_old_model_draws_the_same_codes_on_every_engine(release):
    if MISSING:
        pytest.skip(MISSING.removeprefix("missing: "))
    model = load_dalle(recorded(release)[0], Companions(), None)
    text, _ = inputs()
    drawn = [
        model.generate_images(text, temperature=0, engine=engine, return_tokens=True)[1] for engine in ("cpu", "eager")
    ]
    assert torch.equal(*drawn)
    with torch.no_grad():
        logits = model(text, drawn[0])[:, text.shape[1] :]
    assert torch.equal(logits.argmax(-1) - model.num_text_tokens, drawn[0])  # as in one pass over all of them


# ------------------------------------------------------------------------------------------------------------- refused


def _without(weights, ending):
    return {name: tensor for name, tensor in weights.items() if not name.endswith(ending)}


def _changed(**changes):
    checkpoint, _ = recorded("0.10.0")
    return {**checkpoint, **changes}


def _of_0_5():
    weights = recorded("0.10.0")[0]["weights"]
    return {n.replace("norm.weight", "norm.g"): t for n, t in _without(weights, (".scale", "norm.bias")).items()}


def _of_0_8():
    weights = recorded("0.10.0")[0]["weights"]
    weights["text_emb.weight"] = weights["text_emb.weight"][:9]
    return weights


def _turned_otherwise():
    checkpoint, _ = recorded("1.1.2")
    checkpoint["weights"]["transformer.pos_emb"] *= 1.01
    return checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        (lambda: _changed(weights=_of_0_5()), "other norms"),
        (lambda: _changed(weights=_without(recorded("0.10.0")[0]["weights"], ".scale")), "before 0.8.0 have no LayerS"),
        (lambda: _changed(weights=_of_0_8()), r"before 0\.9\.0 have no ids for padding"),
        (lambda: _changed(hparams=recorded("0.10.0")[0]["hparams"] | {"attn_types": ("full", "mlp")}), "gMLP layers"),
        (lambda: _changed(hparams=recorded("0.10.0")[0]["hparams"] | {"window": 3}), "unknown: window"),
        (_turned_otherwise, "rotary positions"),
    ],
    ids=["norms", "scale", "padding", "mlp", "argument", "angles"],
)
def test_what_would_compute_something_else_is_refused_with_the_reason(checkpoint, sentence, tmp_path):
    stored = in_a_file(checkpoint(), tmp_path)
    known = recognise(stored)
    assert known.describe(stored).problem
    with pytest.raises(ValueError, match=rf"dalle\.pt: must be a model that we can run, got one of .*{sentence}"):
        known.load(stored, Companions())


def test_positions_that_were_rounded_stay_so():
    """The original reads a file in 16 bits into float32: its positions are rounded, and trained so, the weights too."""
    checkpoint, _ = recorded("1.1.2")
    weights = checkpoint["weights"]
    assert built(checkpoint["hparams"], weights).arguments["rotary_dtype"] == "float32"
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
        for stored in (rounded, {name: tensor.float() for name, tensor in rounded.items()}):
            made = built(checkpoint["hparams"], stored)
            assert (made.problem, made.arguments["rotary_dtype"]) == ("", str(dtype).removeprefix("torch."))
