"""OpenAI's own package on the same random weights: logits, codes and pictures, from files of either container."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_argmax_within_budget, assert_within_budget

pytest.importorskip("attr", reason="the package attrs is not installed, which OpenAI's dall_e needs")
pytest.importorskip("dall_e", reason="OpenAI's package dall_e is not installed (pip install --no-deps DALL-E==0.1)")

from dall_e.decoder import Decoder
from dall_e.encoder import Encoder
from dall_e.utils import Conv2d, map_pixels, unmap_pixels

from dalle_fast import OpenAIDiscreteVAE

SIDE, CODES = 32, 40


@pytest.fixture(scope="module")
def twins():
    """An encoder and a decoder with biases, logits about 0 on average, so that codes differ."""
    torch.manual_seed(0)
    modules = Encoder(n_hid=8, vocab_size=CODES), Decoder(n_init=12, n_hid=8, vocab_size=CODES)
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.normal_(std=0.1) if parameter.dim() == 1 else parameter.mul_(2)
        logits = modules[0](map_pixels(torch.rand(4, 3, SIDE, SIDE)))
        modules[0].blocks.output.conv.b -= logits.mean((0, 2, 3))
    return modules


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def vae(request, twins, tmp_path):
    for name, module in zip(("encoder.pkl", "decoder.pkl"), twins, strict=True):
        torch.save(module, tmp_path / name, _use_new_zipfile_serialization=request.param)
    return OpenAIDiscreteVAE(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", image_size=SIDE)


def exactly(module):
    """Its blocks in float64; the package itself insists on float32."""
    module = copy.deepcopy(module).double()
    for conv in (m for m in module.modules() if isinstance(m, Conv2d)):
        conv.forward = lambda x, conv=conv: F.conv2d(x, conv.w, conv.b, padding=(conv.kw - 1) // 2)
    return module.blocks


@torch.no_grad()
def test_logits_codes_and_pictures_are_the_packages(twins, vae):
    encoder, decoder = twins
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    own, exact = encoder(map_pixels(images)), exactly(encoder)(0.8 * images.double() + 0.1)
    assert_within_budget(vae(images, return_logits=True), exact, own, "logits")
    codes = vae.get_codebook_indices(images)
    rows = [scores.flatten(2).transpose(1, 2) for scores in (exact, own)]
    assert_argmax_within_budget(codes, *rows)
    assert len(codes.unique()) > CODES // 4

    one_hot = F.one_hot(codes, CODES).transpose(1, 2).unflatten(2, (SIDE // 8,) * 2).float()
    own = unmap_pixels(decoder(one_hot).float()[:, :3].sigmoid())
    exact = ((exactly(decoder)(one_hot.double())[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    assert_within_budget(vae.decode(codes), exact, own, "pictures")
    assert own.std() > 0.05, "not all of one grey"
