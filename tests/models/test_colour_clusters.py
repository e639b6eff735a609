"""Colours as tokens: nearest ones, a grid of them, k-means, what is refused; encode and train take them."""

from __future__ import annotations

import pytest
import torch
from data_folders import write_folder
from safetensors.torch import load_file

from dalle_fast import DALLE, ColourClusterVAE
from dalle_fast.models.saving import Pretrained
from dalle_fast.training.encode import encode


def pictures(batch=3, size=6, seed=1, channels=3):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_code_is_the_nearest_colour():
    vae = ColourClusterVAE(image_size=6, colours=torch.rand(7, 3, generator=torch.Generator().manual_seed(0)))
    images = pictures()
    codes = vae.get_codebook_indices(images)
    assert codes.shape == (3, 36) and (vae.num_tokens, vae.num_layers, vae.channels) == (7, 0, 3)
    for b in range(3):
        for p in range(36):
            pixel = images[b].flatten(1)[:, p].double()
            assert codes[b, p] == (vae.colours.double() - pixel).square().sum(1).argmin()
    decoded = vae.decode(codes)
    assert torch.equal(decoded[1, :, 2, 5], vae.colours[codes[1, 2 * 6 + 5]])
    assert torch.equal(vae.get_codebook_indices(decoded), codes), "a colour is its own nearest"
    assert torch.equal(vae.get_codebook_indices(images[1:2]), codes[1:2])


def test_without_colours_they_are_a_grid():
    vae = ColourClusterVAE(image_size=4)
    assert vae.colours.shape == (512, 3) and len(vae.colours.unique(dim=0)) == 512
    for channel in vae.colours.T:
        assert torch.equal(channel.unique(), torch.linspace(0, 1, 8))
    error = (vae.decode(vae.get_codebook_indices(pictures(size=4))) - pictures(size=4)).abs()
    assert error.max() <= 0.5 / 7 + 1e-6
    levels = [len(channel.unique()) for channel in ColourClusterVAE(num_tokens=12).colours.T]
    assert levels == [3, 2, 2]
    assert ColourClusterVAE(num_tokens=1).colours.tolist() == [[0.5, 0.5, 0.5]]
    assert ColourClusterVAE(num_tokens=5, channels=1).colours.flatten().tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_k_means_finds_the_colours_of_pictures():
    palette = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.2, 0.9], [1.0, 1.0, 1.0]])
    drawn = torch.randint(4, (5, 8, 8), generator=torch.Generator().manual_seed(0))
    vae = ColourClusterVAE.fit(palette[drawn].permute(0, 3, 1, 2), n=4, seed=0)
    order = vae.get_codebook_indices(palette.view(4, 3, 1, 1).expand(-1, -1, 8, 8))[:, 0]
    assert sorted(order.tolist()) == [0, 1, 2, 3] and vae.image_size == 8
    assert (vae.colours[order] - palette).abs().max() < 1e-6


def test_k_means_is_better_than_the_grid_repeats_with_its_seed_and_ends_at_means():
    images = pictures(8, 16) ** 3  # dark
    fitted, again = (ColourClusterVAE.fit(images, n=27, seed=5) for _ in range(2))
    assert torch.equal(fitted.colours, again.colours)
    assert not torch.equal(fitted.colours, ColourClusterVAE.fit(images, n=27, seed=6).colours)
    grid = ColourClusterVAE(image_size=16, num_tokens=27)
    errors = [(vae.decode(vae.get_codebook_indices(images)) - images).square().mean() for vae in (fitted, grid)]
    assert errors[0] < 0.5 * errors[1]
    long = ColourClusterVAE.fit(images, n=27, seed=5, iterations=1000)
    codes = long.get_codebook_indices(images).flatten()
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)
    means = torch.stack([pixels[codes == k].mean(0) for k in range(27)])
    assert (means - long.colours).abs().max() < 1e-5, "Lloyd's fixed point"


def test_pictures_of_any_shape_and_few_colours_are_taken():
    vae = ColourClusterVAE.fit(torch.ones(1, 1, 3, 5), n=4, image_size=2)
    assert (vae.image_size, vae.channels, vae.colours.unique().tolist()) == (2, 1, [1.0])


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ColourClusterVAE(image_size=0), ValueError, "image_size must be at least 1, got 0"),
        (lambda: ColourClusterVAE(num_tokens=3, colours=[[0.0] * 3]), ValueError, r"colours must be \[num_tokens=3"),
        (lambda: ColourClusterVAE(colours=[[0.0, 0.0, 255.0]]), ValueError, r"must be in 0..1, got others. Divide"),
        (lambda: ColourClusterVAE.fit(pictures(1, 2), n=5), ValueError, r"n must be in 1..4, the number of pixels"),
        (lambda: ColourClusterVAE.fit(pictures()[0], n=2), ValueError, r"must be \[N, c, S, S\]"),
        (lambda: ColourClusterVAE.fit(pictures().byte(), n=2), TypeError, "Divide bytes by 255"),
        (lambda: ColourClusterVAE.fit(pictures() * 255, n=2), ValueError, "images must be in 0..1"),
        (lambda: ColourClusterVAE(4).get_codebook_indices(pictures()), ValueError, r"img must be \[B, 3, 4, 4\]"),
        (lambda: ColourClusterVAE(4).decode(torch.tensor([[512]])), ValueError, r"ids must be in 0..511, got 512"),
    ],
)
def test_what_is_refused(call, error, sentence):
    with pytest.raises(error, match=f"ColourClusterVAE.*{sentence}"):
        call()


def test_a_saved_one_is_the_same(tmp_path):
    vae = ColourClusterVAE.fit(pictures(4, 8), n=20)
    vae.save_pretrained(tmp_path / "vae")
    for cls in (ColourClusterVAE, Pretrained):
        again = cls.from_pretrained(tmp_path / "vae")
        assert torch.equal(again.colours, vae.colours) and again.config == vae.config
        assert not again.colours.requires_grad


def test_encode_takes_it(tmp_path):
    write_folder(tmp_path / "pictures")
    ColourClusterVAE(image_size=4, num_tokens=27).save_pretrained(tmp_path / "vae")
    made = encode(str(tmp_path / "pictures"), tmp_path / "vae", tmp_path / "codes", batch=4)
    assert (made.num_tokens, made.image_seq_len) == (27, 16)
    codes = load_file(tmp_path / "codes" / "000000.safetensors")["codes"]
    assert codes.shape[1] == 16 and codes.max() < 27


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_a_dalle_draws_its_colours(engine):
    torch.manual_seed(0)
    vae = ColourClusterVAE(image_size=4, num_tokens=8)
    sizes = {"dim": 32, "depth": 1, "heads": 1, "dim_head": 16, "num_text_tokens": 20, "text_seq_len": 4}
    dalle = DALLE(vae=vae, **sizes)
    text = torch.randint(1, 20, (2, 4))
    dalle(text, pictures(2, 4), return_loss=True).backward()
    assert vae.colours.grad is None
    drawn = dalle.generate_images(text, seed=0, engine=engine)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0} and drawn.shape == (2, 3, 4, 4)
