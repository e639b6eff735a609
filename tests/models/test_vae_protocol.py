"""Any object with the six attributes is a VAE; what is missing or wrong is named; the page of VAEs says what is so."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from small_vqgans import small_vqgan

from dalle_fast import DALLE, ColourClusterVAE, DiscreteVAE, OpenAIDiscreteVAE
from dalle_fast import vae as vae_module
from dalle_fast.models.vae_protocol import ATTRIBUTES, ImageTokenizer, check_vae, saved_vae

PAGE = (Path(__file__).parents[2] / "docs" / "vaes.md").read_text(encoding="utf-8")
SIZES = {"dim": 32, "depth": 1, "heads": 1, "dim_head": 16, "num_text_tokens": 20, "text_seq_len": 4}

VAES = [
    pytest.param(lambda: OpenAIDiscreteVAE(from_scratch=True, image_size=16, num_tokens=12, hidden_dim=8), id="openai"),
    pytest.param(lambda: small_vqgan("vq"), id="vq"),
    pytest.param(lambda: small_vqgan("gumbel"), id="gumbel"),
    pytest.param(lambda: ColourClusterVAE(image_size=4, num_tokens=8), id="colours"),
]


class Levels:
    """A toy: no nn.Module, four levels of grey, every second pixel."""

    image_size, num_tokens, num_layers, channels = 8, 4, 1, 1

    def get_codebook_indices(self, images):
        return (images[:, :, ::2, ::2] * 3).round().long().flatten(1)

    def decode(self, codes):
        return codes.unflatten(1, (1, 4, 4)).float().div(3).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture
def dalle():
    torch.manual_seed(0)
    return DALLE(vae=Levels(), **SIZES)


def test_a_toy_trains_on_pixels(dalle):
    text, images = torch.randint(1, 20, (4, 4)), torch.rand(4, 1, 8, 8)
    optimizer = torch.optim.Adam(dalle.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = dalle(text, images, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert dalle.image_seq_len == 16 and dalle.num_image_tokens == 4


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_toy_samples_and_is_primed(dalle, engine):
    text, images = torch.randint(1, 20, (2, 4)), torch.rand(2, 1, 8, 8)
    drawn, codes = dalle.generate_images(text, seed=0, engine=engine, return_tokens=True)
    assert torch.equal(drawn, dalle.vae.decode(codes)) and drawn.shape == (2, 1, 8, 8)
    primed = dalle.generate_images(text, img=images, num_init_img_tokens=8, seed=0, engine=engine)
    assert torch.equal(primed[:, :, :4], dalle.vae.decode(dalle.vae.get_codebook_indices(images))[:, :, :4])


def test_a_toy_cannot_be_saved_in_words(dalle, tmp_path):
    with pytest.raises(TypeError, match=r"vae .*got Levels"):
        dalle.save_pretrained(tmp_path / "dalle")

    class Module(Levels, torch.nn.Module):
        pass

    with pytest.raises(TypeError, match=r"vae must be a model of dalle_fast, got Module"):
        DALLE(vae=Module(), **SIZES).save_pretrained(tmp_path / "dalle")
    assert not (tmp_path / "dalle").exists()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_is_missing_is_named(name):
    without = type("Partial", (), {key: value for key, value in vars(Levels).items() if key != name})()
    with pytest.raises(TypeError, match=rf"DALLE: vae must have .*, got Partial without {name}\.$"):
        DALLE(vae=without, **SIZES)
    assert not isinstance(without, ImageTokenizer) and isinstance(Levels(), ImageTokenizer)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"decode": 3}, TypeError, "vae.decode must be a method, got int in Levels"),
        ({"num_tokens": 4.0}, TypeError, "vae.num_tokens must be a whole number, got 4.0 in Levels"),
        ({"num_layers": True}, TypeError, "vae.num_layers must be a whole number, got True"),
        ({"channels": 0}, ValueError, "vae.channels must be at least 1, got 0"),
        ({"image_size": 9}, ValueError, r"vae.image_size must be a multiple of 2\^num_layers = 2, got 9"),
    ],
)
def test_what_is_something_else_is_named(changes, error, sentence):
    vae = Levels()
    for name, value in changes.items():
        setattr(vae, name, value)
    with pytest.raises(error, match=f"encode: {sentence}"):
        check_vae(vae, "encode")


def test_the_originals_module_has_its_names():
    assert vae_module.OpenAIDiscreteVAE is OpenAIDiscreteVAE and vae_module.DiscreteVAE is DiscreteVAE
    assert all(hasattr(vae_module, name) for name in vae_module.__all__)


def test_classes_and_wrappers_get_advice():
    with pytest.raises(TypeError, match="Pass an instance, not the class"):
        check_vae(DiscreteVAE)
    wrapped = torch.nn.Module()
    wrapped.module = Levels()
    with pytest.raises(TypeError, match="pass the module inside"):
        check_vae(wrapped)


@pytest.mark.parametrize("make", VAES)
def test_a_dalle_on_pixels_compiles_into_one_graph(make):
    torch.manual_seed(0)
    vae = make()
    dalle = DALLE(vae=vae, **SIZES)
    side = vae.image_size
    text, images = torch.randint(1, 20, (2, 4)), torch.rand(2, 3, side, side)
    torch.compiler.reset()
    compiled = torch.compile(dalle, fullgraph=True, backend="aot_eager")
    codes = vae.get_codebook_indices(images)
    assert torch.equal(compiled(text, images, return_loss=True), compiled(text, codes, return_loss=True))


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_copies_and_pickles_of_a_vae_are_it(make, copied):
    vae = make().eval()
    again = copied(vae)
    images = torch.rand(2, 3, vae.image_size, vae.image_size)
    assert again.config == vae.config and again.state_dict().keys() == vae.state_dict().keys()
    assert torch.equal(again.get_codebook_indices(images), vae.get_codebook_indices(images))


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_pictures_of_another_dtype_than_the_weights_are_read(make, dtypes):
    of_weights, of_pictures = dtypes
    vae = make().to(of_weights)
    images = torch.rand(2, 3, vae.image_size, vae.image_size)
    codes = vae.get_codebook_indices(images.to(of_weights))
    assert torch.equal(vae.get_codebook_indices(images.to(of_pictures)), codes)


def test_a_saved_model_that_is_no_vae_is_refused(tmp_path):
    vae = ColourClusterVAE(image_size=4, num_tokens=8)
    DALLE(vae=vae, **SIZES).save_pretrained(tmp_path)
    assert torch.equal(saved_vae(tmp_path / "vae", op="encode").colours, vae.colours)
    with pytest.raises(TypeError, match=r"encode: vae must have .*, got DALLE without image_size"):
        saved_vae(tmp_path, op="encode")


def test_the_page_runs_and_names_what_there_is():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    assert names["pictures"].shape == (2, 1, 8, 8) and names["loss"].isfinite()
    assert names["codes"].shape == (4, 256) and names["again"].shape == (4, 3, 16, 16)
    for name in ATTRIBUTES:
        assert re.search(rf"^\| `{name}[`(]", PAGE, re.M), name
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in OpenAIDiscreteVAE(from_scratch=True).parameters())
    assert f"{n_parameters / 1e6:.1f} million parameters" in PAGE
