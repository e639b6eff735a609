"""Small files that say they are large models: refused before anything is built or computed for them."""

from __future__ import annotations

import pytest
import torch
from openai_dvae_files import original_state, tiny
from record_releases import recorded
from small_vqgans import weights, yaml_of

from dalle_fast.compat.formats.openai_dvae import openai_dvae_from
from dalle_fast.compat.formats.recognise import recognise
from dalle_fast.compat.formats.taming_vqgan import read_config, vqgan_from
from dalle_fast.compat.reading import Stored


def described(data, tmp_path):
    stored = Stored(tmp_path / "x.pt", "zip", data)
    return recognise(stored).describe(stored)


def in_a_dalle(release, *, without=(), hparams=None, **more):
    checkpoint, _ = recorded(release)
    kept = {name: tensor for name, tensor in checkpoint["weights"].items() if name not in without}
    return {**checkpoint, "weights": kept | more, "hparams": checkpoint["hparams"] | (hparams or {})}


def test_layers_of_one_tensor_are_no_layers(tmp_path):
    scales = {f"transformer.layers.layers.{i}.0.scale": torch.ones(1) for i in range(100, 999)}
    data = in_a_dalle("1.1.2", hparams={"depth": 999}, **scales)
    with pytest.raises(ValueError, match="got depth = 999 and weights of 4"):
        described(data, tmp_path)


def test_shapes_without_values_are_no_weights(tmp_path):
    data = in_a_dalle("1.1.2", **{"transformer.pos_emb": torch.empty(1, 1 << 40, 0)})
    with pytest.raises(ValueError, match=r"with values, by name, got \[1, 1099511627776, 0\] as 'transformer.pos_emb'"):
        described(data, tmp_path)


def test_two_short_vectors_are_no_large_grid(tmp_path):
    axial = {f"image_pos_emb.weights_{axis}": torch.ones(1, 999, 1) for axis in (0, 1)}
    data = in_a_dalle("1.1.2", without=("transformer.pos_emb",), **axial)
    with pytest.raises(ValueError, match=r"at most 65536 positions, got .* and a grid of 999 x 999"):
        described(data, tmp_path)


def test_blocks_of_one_tensor_are_no_vae(tmp_path):
    checkpoint, _ = recorded("1.1.2")
    kept = {n.removeprefix("vae."): t for n, t in checkpoint["weights"].items() if n.startswith("vae.")}
    blocks = {f"encoder.{i}.net.0.weight": torch.ones(1) for i in range(100, 999)}
    with pytest.raises(ValueError, match=r"all tensors of . layers and 900 blocks"):
        described({"hparams": checkpoint["vae_params"], "weights": kept | blocks}, tmp_path)
    with pytest.raises(ValueError, match="must be tensors with values, by name, got int as 'x'"):
        described({"hparams": checkpoint["vae_params"], "weights": kept | {"x": 3}}, tmp_path)
    with pytest.raises(ValueError, match="got num_tokens = 1000000000 and weights of 12"):
        hparams = checkpoint["vae_params"] | {"num_tokens": 10**9, "quantizer": "vq"}
        described({"hparams": hparams, "weights": kept}, tmp_path)


def test_levels_and_blocks_of_a_vqgan_are_counted_together():
    """999 levels, and 999 blocks in the first: 999,000 blocks of 2,000 tensors."""
    stored = weights("vq")
    conv = stored["encoder.down.0.block.0.conv1.weight"]
    stored |= {f"encoder.down.{i}.block.0.conv1.weight": conv for i in range(999)}
    stored |= {f"encoder.down.0.block.{i}.conv1.weight": conv for i in range(999)}
    with pytest.raises(ValueError, match=r"999 levels of 999 blocks, got \d+ in all\. Is the file whole"):
        vqgan_from(stored, yaml_of("vq"))


def test_blocks_of_openais_vae_are_counted():
    tensors = original_state(tiny())
    bias = {f"enc.blocks.group_1.block_{i}.res_path.conv_1.b": torch.ones(1) for i in range(1, 999)}
    with pytest.raises(ValueError, match="tensors for groups of 998 blocks"):
        openai_dvae_from(tensors | bias)
    for name in ("enc.blocks.input.w", "dec.blocks.input.w"):
        with pytest.raises(ValueError, match=r"must be those of encoder\.pkl and decoder\.pkl, got others"):
            openai_dvae_from(tensors | {name: torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nmodel: [*b, *b]", "it has aliases, which no configuration needs"),
        ("model: 2021-99-99", "must be YAML, got something else"),
        ("a" * 300_000, "got more than 262144 bytes"),
    ],
)
def test_a_yaml_is_as_long_as_it_is(text, told, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_config(tmp_path / "x.yaml")
