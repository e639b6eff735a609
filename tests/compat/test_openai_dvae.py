"""OpenAI's discrete VAE: its files read as data, its names, its codes, what is refused; in a DALLE."""

from __future__ import annotations

import pytest
import torch
from openai_dvae_files import SIZES, original_state, tiny, write
from tolerance import assert_same_in_float64
from torch import nn

from dalle_fast import DALLE, OpenAIDiscreteVAE
from dalle_fast.compat.checkpoints import upstream_weights
from dalle_fast.compat.formats import openai_dvae
from dalle_fast.compat.formats.base import Companions
from dalle_fast.compat.loading import load
from dalle_fast.compat.reading import read
from dalle_fast.models.saving import Pretrained

DALLE_SIZES = {"dim": 32, "depth": 1, "heads": 1, "dim_head": 16, "num_text_tokens": 20, "text_seq_len": 4}


@pytest.fixture(params=["zip", "legacy"])
def files(request, tmp_path, monkeypatch):
    """A folder with both files, and the model whose weights they hold."""
    model = tiny()
    write(tmp_path, model, monkeypatch, zipped=request.param == "zip")
    return tmp_path, model


def pictures(batch=3, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items())


# -- files


def test_both_files_are_read_without_their_package(files):
    folder, model = files
    vae = OpenAIDiscreteVAE(folder / "encoder.pkl", folder / "decoder.pkl", image_size=16)
    assert same(vae, model) and not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert (vae.image_size, vae.num_tokens, vae.num_layers, vae.channels) == (16, 24, 3, 3)
    codes = vae.get_codebook_indices(pictures())
    assert torch.equal(codes, model.get_codebook_indices(pictures()))
    assert torch.equal(vae.decode(codes), model.decode(codes))


def test_what_is_trained_on_from_files_leaves_them_as_they_are(files):
    folder, _ = files
    paths = [folder / name for name in ("encoder.pkl", "decoder.pkl")]
    before = [path.read_bytes() for path in paths]
    vae = OpenAIDiscreteVAE(*paths, image_size=16).requires_grad_(True)
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
    vae(pictures(), return_loss=True, seed=0).backward()
    optimizer.step()
    assert [path.read_bytes() for path in paths] == before
    assert not same(vae, OpenAIDiscreteVAE(*paths, image_size=16))


def test_the_originals_cache_is_where_they_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "dalle"
    with pytest.raises(
        FileNotFoundError, match=r"encoder_path must be an existing file, got .*\.cache/dalle/encoder.pkl"
    ):
        OpenAIDiscreteVAE()
    folder.mkdir(parents=True)
    write(folder, tiny(), monkeypatch)
    vae = OpenAIDiscreteVAE()
    assert same(vae, tiny()) and vae.image_size == 256
    (folder / "decoder.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"https://\S+/decoder.pkl"):
        OpenAIDiscreteVAE()


def test_what_is_no_such_file_is_refused(files):
    folder, _ = files
    encoder, decoder = folder / "encoder.pkl", folder / "decoder.pkl"
    with pytest.raises(ValueError, match=r"decoder.pkl must hold the encoder of OpenAI's dVAE, got the decoder"):
        OpenAIDiscreteVAE(decoder, encoder)
    torch.save({"weights": torch.zeros(2)}, folder / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt must hold the decoder of OpenAI's dVAE, got something else"):
        OpenAIDiscreteVAE(encoder, folder / "other.pt")
    with pytest.raises(ValueError, match=r"hidden_dim must be as in the files, 8, got 16"):
        OpenAIDiscreteVAE(encoder, decoder, hidden_dim=16)
    with pytest.raises(ValueError, match=r"encoder_path must be left out with from_scratch=True"):
        OpenAIDiscreteVAE(encoder, from_scratch=True)


def test_halves_of_two_models_are_refused(files, monkeypatch):
    folder, _ = files
    other = folder / "other"
    other.mkdir()
    write(other, tiny(num_tokens=25, hidden_dim=12), monkeypatch)
    with pytest.raises(ValueError, match=r"num_tokens|expected \["):
        OpenAIDiscreteVAE(folder / "encoder.pkl", other / "decoder.pkl")


# -- formats


def recognised(path):
    stored = read(path)
    (found,) = [entry for entry in openai_dvae.FORMATS if entry.matches(stored)]
    return stored, found


@pytest.mark.parametrize("name", ["encoder.pkl", "decoder.pkl", "."])
def test_a_file_or_their_folder_is_recognised_described_and_loaded(files, name):
    folder, model = files
    stored, found = recognised(folder / name)
    described = found.describe(stored)
    assert (described.kind, described.problem) == ("OpenAIDiscreteVAE", "")
    assert {"num_tokens": 24, "hidden_dim": 8, "channels": 3}.items() <= described.architecture.items()
    assert same(found.load(stored, Companions()), model)


def test_half_a_model_says_what_is_missing_and_takes_it_as_a_companion(files):
    folder, model = files
    elsewhere = folder / "elsewhere.pkl"
    (folder / "decoder.pkl").rename(elsewhere)
    stored, found = recognised(folder / "encoder.pkl")
    assert "decoder.pkl must lie beside it; people get it from https://" in found.describe(stored).problem
    with pytest.raises(FileNotFoundError, match=r"decoder_path must be an existing file"):
        found.load(stored, Companions())
    assert same(found.load(stored, Companions(vae=elsewhere)), model)


def test_a_state_dict_of_the_originals_class_is_recognised(tmp_path):
    model = tiny()
    torch.save(original_state(model), tmp_path / "vae.pt")
    stored, found = recognised(tmp_path / "vae.pt")
    assert found.describe(stored).architecture == {
        "image_size": 256, "num_layers": 3, "channels": 3, **SIZES,
    }  # fmt: skip
    assert same(found.load(stored, Companions()), model)


def test_keys_are_those_of_the_files():
    (part, _, whole) = openai_dvae.FORMATS
    state = original_state(tiny())
    numbered = {openai_dvae.re.sub(r"\d+", "N", name) for name in state}
    assert numbered == whole.keys
    assert {name.partition(".")[2] for name in numbered} == part.keys


# -- names and sizes


def test_the_originals_names_load_here_and_inside_a_dalle():
    model, state = tiny(), original_state(tiny())
    other = OpenAIDiscreteVAE(from_scratch=True, image_size=16, **SIZES)
    other.load_state_dict(state)
    assert same(other, model) and all(name.startswith(("enc.", "dec.")) for name in state)
    dalle = DALLE(vae=OpenAIDiscreteVAE(from_scratch=True, image_size=16, **SIZES), **DALLE_SIZES)
    weights = {name: tensor for name, tensor in dalle.state_dict().items() if not name.startswith("vae.")}
    dalle.load_state_dict(weights | {f"vae.{name}": tensor for name, tensor in state.items()})
    assert same(dalle.vae, model)
    with pytest.raises(RuntimeError, match=r"encoder.group_1.block_9"):
        other.load_state_dict(state | {"enc.blocks.group_1.block_9.id_path.w": torch.zeros(1)})


def test_tensors_that_do_not_fit_are_named():
    state = original_state(tiny())
    with pytest.raises(ValueError, match=r"missing: decoder.output.bias; unknown: more"):
        openai_dvae.openai_dvae_from(
            {n: t for n, t in state.items() if n != "dec.blocks.output.conv.b"} | {"more": state["enc.blocks.input.b"]}
        )
    with pytest.raises(ValueError, match=r"must be those of encoder.pkl and decoder.pkl, got others"):
        openai_dvae.openai_dvae_from({"weight": torch.zeros(1)})


def test_sizes_are_the_papers():
    with torch.device("meta"):
        model = OpenAIDiscreteVAE(from_scratch=True)
    counts = [
        sum(p.numel() for n, p in model.named_parameters() if n.startswith("encoder.") is part)
        for part in (True, False)
    ]
    assert counts == [53_786_240, 43_829_766]
    assert (model.image_size, model.num_tokens, model.num_layers, model.channels) == (256, 8192, 3, 3)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert shapes["encoder.group_4.block_1.convs.0.weight"] == [512, 1024, 3, 3]
    assert shapes["decoder.group_1.block_1.shortcut.weight"] == [2048, 128, 1, 1]
    assert shapes["codebook.weight"] == [8192, 128] and shapes["decoder.output.weight"] == [6, 256, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": 20}, "image_size must be a multiple of 8, got 20"),
        ({"hidden_dim": 6}, "hidden_dim must be a multiple of 4, got 6"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
    ],
)
def test_sizes_that_make_no_model_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=f"OpenAIDiscreteVAE: {sentence}"):
        OpenAIDiscreteVAE(from_scratch=True, **arguments)


# -- codes and pictures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_pictures_are_the_same_alone_in_any_batch_and_on_any_number_of_threads(dtype, restored_threads):
    model, images = tiny(image_size=32).to(dtype), pictures(5, 32).to(dtype)
    torch.set_num_threads(1)
    codes = model.get_codebook_indices(images)
    decoded = model.decode(codes)
    assert decoded.dtype == dtype and len(codes.unique()) > 5
    order = torch.tensor([3, 0, 4, 4, 1])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(model.get_codebook_indices(images[order]), codes[order])
        assert torch.equal(model.get_codebook_indices(images.to(memory_format=torch.channels_last)), codes)
        assert torch.equal(model.get_codebook_indices(images[2:3]), codes[2:3])
        assert torch.equal(model.decode(codes[order]), decoded[order])
        assert torch.equal(model.decode(codes[2:3]), decoded[2:3])


def test_codes_that_are_none_and_pictures_of_another_size_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"OpenAIDiscreteVAE.decode: ids must be in 0..23, got 0..24"):
        model.decode(torch.tensor([[0, 1, 2, 24]]))
    with pytest.raises(ValueError, match=r"n must be a square number, got 3"):
        model.decode(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"img_seq must be int64"):
        model.decode(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"OpenAIDiscreteVAE: img must be \[B, 3, 16, 16\]"):
        model.get_codebook_indices(pictures(size=8))
    with pytest.raises(TypeError, match=r"Divide bytes by 255"):
        model.get_codebook_indices(pictures().byte())
    assert model.get_codebook_indices(pictures(0)).shape == (0, 4)
    assert model.decode(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 3, 16, 16)
    assert model.decode(torch.zeros(2, 9, dtype=torch.int32)).shape == (2, 3, 24, 24)


def test_a_saved_one_is_the_same(files, tmp_path):
    folder, model = files
    OpenAIDiscreteVAE(folder / "encoder.pkl", folder / "decoder.pkl", image_size=16).save_pretrained(tmp_path / "saved")
    for cls in (OpenAIDiscreteVAE, Pretrained):
        again = cls.from_pretrained(tmp_path / "saved")
        assert isinstance(again, OpenAIDiscreteVAE) and same(again, model) and again.image_size == 16


def test_a_dalle_trains_with_it_samples_and_is_saved(tmp_path):
    vae = tiny()
    dalle = DALLE(vae=vae, **DALLE_SIZES)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    text, images = torch.randint(1, 20, (3, 4)), pictures()
    optimizer = torch.optim.Adam([p for p in dalle.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = dalle(text, images, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items()), "it is frozen"
    drawn, codes = dalle.generate_images(text, seed=0, return_tokens=True)
    assert drawn.shape == images.shape and 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, vae.decode(codes))
    dalle.save_pretrained(tmp_path / "dalle")
    again = DALLE.from_pretrained(tmp_path / "dalle")
    assert isinstance(again.vae, OpenAIDiscreteVAE)
    assert torch.equal(again.generate_images(text, seed=0), drawn)


def test_a_dalle_file_of_the_original_brings_it_along(tmp_path):
    dalle = DALLE(vae=tiny(), **DALLE_SIZES).eval()
    ours = {name: tensor for name, tensor in upstream_weights(dalle).items() if not name.startswith("vae.")}
    hparams = DALLE_SIZES | {"attn_types": ("full",), "rotary_emb": True, "shift_tokens": True}
    checkpoint = {
        "hparams": hparams, "vae_params": None, "epoch": 0, "version": "1.6.6", "vae_class_name": "OpenAIDiscreteVAE",
        "weights": ours | {f"vae.{name}": tensor.half() for name, tensor in original_state(dalle.vae).items()},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "dalle.pt")
    loaded = load(tmp_path / "dalle.pt").model
    assert isinstance(loaded.vae, OpenAIDiscreteVAE) and loaded.vae.image_size == 16
    assert loaded.vae.codebook.weight.dtype == torch.float32
    loaded.vae.load_state_dict(dalle.vae.state_dict())  # without the rounding to 16 bits
    text = torch.randint(1, 20, (2, 4))
    assert torch.equal(loaded.generate_images(text, seed=1), dalle.generate_images(text, seed=1))


@pytest.mark.gpu
def test_a_gpu_sees_and_draws_what_the_cpu_does():
    model, images = tiny().double().requires_grad_(False), pictures().double()
    codes = model.get_codebook_indices(images)
    drawn = model.decode(codes)
    model.cuda()
    assert torch.equal(model.get_codebook_indices(images.cuda()).cpu(), codes)
    # 36 convolutions, the longest of 64 * 9 terms
    assert_same_in_float64(model.decode(codes.cuda()).cpu(), drawn, n_terms=36 * 64 * 9)


@pytest.mark.gpu
def test_a_gpu_trains_it_in_mixed_precision():
    model, images = tiny().cuda().train(), pictures(4).cuda()
    with torch.autocast("cuda", dtype=torch.float16):
        loss = model(images, return_loss=True, seed=1)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
