"""VQGANs that are refused, in words: strange yamls, other weights, missing and strange tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_vqgans import TARGETS, checkpoint, weights, yaml_of

from dalle_fast.compat.formats.taming_vqgan import vqgan_from
from dalle_fast.models.vqgan import VQGanVAE


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model", None, "must have a section model, got none"),
        ("model.params", "x", r"must have a section model.params, got 'x'"),
        ("model.params.ddconfig", [], r"must have a section model.params.ddconfig, got \[\]"),
        ("model.target", "taming.models.vqgan.EMAVQ", "one of .*VQModel, .*GumbelVQ, got 'taming.models.vqgan.EMAVQ'"),
        ("model.target", "os.system", "model.target of the yaml must be one of .* got 'os.system'"),
        ("model.target", ["os.system"], "model.target of the yaml must be one of"),
        ("model.target", TARGETS["gumbel"], "model.target of the yaml must be what the weights have, vq, got gumbel"),
        ("model.params.n_embed", 41, "n_embed of the yaml must be what the weights have, 40, got 41"),
        ("model.params.n_embed", "${size}", r"n_embed of the yaml must be an integer from 1, got '\$\{size\}'"),
        ("model.params.embed_dim", None, "embed_dim of the yaml must be an integer from 1, got none"),
        ("model.params.ddconfig.ch", True, "ch of the yaml must be an integer from 1, got True"),
        ("model.params.ddconfig.ch_mult", [1, 2], r"ddconfig.ch_mult .* have, 1, 1, 2, 2, 4, got 1, 2\. Does this"),
        ("model.params.ddconfig.ch_mult", 3, "ch_mult of the yaml must be a list of integers from 1, got 3"),
        ("model.params.ddconfig.attn_resolutions", [8], r"attn_resolutions, as levels .* have, 4, got 3"),
        ("model.params.ddconfig.attn_resolutions", [], r"attn_resolutions, as levels .* have, 4, got none"),
        ("model.params.ddconfig.z_channels", 16, "ddconfig.z_channels .* 24, got 16"),
        ("model.params.ddconfig.double_z", True, "ddconfig.double_z of the yaml must be false, got True"),
        ("model.params.ddconfig.resamp_with_conv", False, "resamp_with_conv of the yaml must be true, got False"),
        ("model.params.ddconfig.out_ch", 12, "out_ch of the yaml must be in_channels, 3, got 12"),
        ("model.params.ddconfig.resolution", 72, "image_size must be a multiple of 16"),
    ],
)  # fmt: skip
def test_strange_yamls_are_refused(place: str, value: object, message: str) -> None:
    config = copy.deepcopy(yaml_of("vq"))
    if place.endswith("resolution"):  # so that the levels of attention stay
        config["model"]["params"]["ddconfig"]["attn_resolutions"] = [4]
    *path, last = place.split(".")
    section = config
    for key in path:
        section = section[key]
    section[last] = value
    with pytest.raises(ValueError, match=message):
        vqgan_from(weights("vq"), config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "must be YAML, got something else"),
        ("!!python/object/apply:os.system ['true']", "must be YAML, got something else .*could not determine"),
        ("[" * 600, "must be YAML, got something else"),
        ("just words", "must be YAML with a model section, got str"),
        ("", "must be YAML with a model section, got NoneType"),
    ],
)
def test_files_that_are_no_yaml_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path, config = checkpoint(tmp_path, "vq")
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        VQGanVAE(path, config)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path, config = checkpoint(tmp_path, "vq")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match=r"last.ckpt must hold a VQModel or GumbelVQ .*got something else"):
        VQGanVAE(path, config)


@pytest.mark.parametrize("name", ["encoder.mid.attn_1.q.bias", "decoder.up.2.block.1.conv2.weight", "quant_conv.bias"])
def test_a_missing_tensor_is_named(name: str) -> None:
    stored = weights("vq")
    del stored[name]
    with pytest.raises(ValueError, match=f"missing: {name}; unknown: none"):
        vqgan_from(stored, yaml_of("vq"))


def test_strange_tensors_are_named() -> None:
    stored = weights("vq")
    with pytest.raises(ValueError, match=r"missing: none; unknown: encoder.extra, model_ema.decay"):
        vqgan_from(stored | {"encoder.extra": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, yaml_of("vq"))
    with pytest.raises(ValueError, match=r"of one floating dtype, got torch.float16, torch.float32"):
        vqgan_from(stored | {"quant_conv.bias": stored["quant_conv.bias"].half()}, yaml_of("vq"))
    with pytest.raises(ValueError, match=r"to_codebook.bias: expected \[16\], found \[4\]"):
        vqgan_from(stored | {"quant_conv.bias": torch.zeros(4)}, yaml_of("vq"))
    for strange in (torch.zeros(4), torch.zeros(4, 0, 3, 3)):
        with pytest.raises(ValueError, match=r"must hold encoder.conv_in.weight, a tensor with 4 axes, got one \[4"):
            vqgan_from(stored | {"encoder.conv_in.weight": strange}, yaml_of("vq"))
    with pytest.raises(ValueError, match=r"must hold quantize.embedding.weight, a tensor with 2 axes, got none"):
        vqgan_from({}, image_size=64)
    with pytest.raises(ValueError, match=r"widths of encoder.down must be multiples of .*, 48, got 32, 32, 64"):
        vqgan_from(stored | {"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, image_size=64)


@pytest.mark.parametrize("used", [torch.tensor([1, 1]), torch.tensor([40]), torch.tensor([-1]), torch.tensor([0.0])])
def test_impossible_lists_of_codes_are_refused(used: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"quantize.used must be different codes below 40"):
        vqgan_from(weights("vq") | {"quantize.used": used}, yaml_of("vq"))
