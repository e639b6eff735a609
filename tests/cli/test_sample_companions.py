"""`dalle-fast sample` and `draw` with a file of weights whose tokenizer and VAE lie elsewhere."""

import shutil

import pytest
import torch
from click.testing import CliRunner
from job_folders import checked, contents, manifest, stored
from PIL import Image
from safetensors.torch import load_file
from small_models import saved_model, small_dalle, small_tokenizer
from small_vqgans import checkpoint

from dalle_fast.cli import draw as draw_command
from dalle_fast.compat.checkpoints import write_upstream
from dalle_fast.jobs.job import JobConfig
from dalle_fast.jobs.pool import Task
from dalle_fast.jobs.store import JobFolder
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

JOB = ("red apple", "a flag", "--images-per-prompt", 2, "--batch-size", 2)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """old.pt, a DALLE as the original writes it; elsewhere words.json and vae.pt, another VAE of its grid and codes."""
    folder = tmp_path_factory.mktemp("weights")
    write_upstream(small_dalle(torch.float32), folder / "old.pt")
    (folder / "elsewhere").mkdir()
    small_tokenizer().save(str(folder / "elsewhere" / "words.json"))
    torch.manual_seed(8)
    other = DiscreteVAE(image_size=16, num_tokens=30, codebook_dim=4, num_layers=1, hidden_dim=4)
    write_upstream(other, folder / "elsewhere" / "vae.pt")
    return folder


@pytest.fixture
def old(files):
    return files / "old.pt"


@pytest.fixture
def words(files):
    return files / "elsewhere" / "words.json"


@pytest.fixture
def vae(files):
    return files / "elsewhere" / "vae.pt"


def codes(folder):
    return load_file(folder / "tokens-000000.safetensors")["tokens"]


class TestOfAJob:
    def test_a_named_tokenizer_draws_what_the_saved_model_draws(self, draw, tmp_path, old, words, model, monkeypatch):
        draw(*JOB, model=model, out=tmp_path / "saved")
        monkeypatch.chdir(words.parent)
        draw(*JOB, "--tokenizer", "words.json", model=old)
        assert torch.equal(codes(tmp_path / "out"), codes(tmp_path / "saved"))
        said = {"tokenizer": str(words), "vae": None, "yaml": None}
        assert said.items() <= stored(tmp_path / "out").items()
        assert all(said.items() <= line.items() for line in manifest(tmp_path / "out"))
        assert str(words) in (tmp_path / "out" / "galleries" / "000000.html").read_text()

    def test_a_named_vae_decodes_the_same_codes(self, draw, tmp_path, old, words, vae):
        draw(*JOB, "--tokenizer", words, model=old, out=tmp_path / "own")
        draw(*JOB, "--tokenizer", words, "--vae", vae, model=old)
        assert torch.equal(codes(tmp_path / "out"), codes(tmp_path / "own"))
        ours, own = ((tmp_path / name / "images" / "000000-00000.png") for name in ("out", "own"))
        assert Image.open(ours).tobytes() != Image.open(own).tobytes()
        assert stored(tmp_path / "out")["model_hash"] != stored(tmp_path / "own")["model_hash"]

    def test_others_are_refused_and_copies_go_on(self, draw, tmp_path, old, words, vae):
        draw(*JOB, "--tokenizer", words, model=old)
        before = contents(tmp_path / "out")
        small_tokenizer("purple").save(str(tmp_path / "other.json"))
        draw("--tokenizer", tmp_path / "other.json", model=old, fails="differs in model_hash, tokenizer.")
        draw("--vae", vae, model=old, fails="differs in model_hash, vae.")
        draw("--yaml", words, model=old, fails="differs in model_hash, yaml.")
        shutil.copy(words, tmp_path / "copy.json")
        for arguments in (["--tokenizer", tmp_path / "copy.json"], [], ["--tokenizer", words]):
            assert "is complete" in draw(*arguments, model=old).output
        assert contents(tmp_path / "out") == before

    def test_a_companion_that_changed_or_is_gone_is_named(self, draw, tmp_path, old, words):
        mine = shutil.copy(words, tmp_path / "mine.json")
        draw(*JOB, "--tokenizer", mine, model=old)
        small_tokenizer("purple").save(str(mine))
        draw(model=None, fails="differs in model_hash.")
        mine.unlink()
        draw(model=None, fails=f"--tokenizer must be a file or directory, found none at {mine}")

    def test_the_configuration_draws_it_again(self, draw, tmp_path, old, words, vae):
        first = tmp_path / "first"
        draw(*JOB, "--tokenizer", words, "--vae", vae, model=old, out=first)
        draw("--config", first / "config.yaml", model=None)
        assert contents(tmp_path / "out") == contents(first)

    def test_one_picture_is_drawn_again(self, draw, tmp_path, old, words, vae):
        mine = shutil.copy(vae, tmp_path / "mine.pt")
        draw(*JOB, "--tokenizer", words, "--vae", mine, model=old)
        again = ["--from-manifest", tmp_path / "out" / "manifest.jsonl", "--index", 3]
        draw(*again, model=None, out=tmp_path / "again")
        (path,) = (tmp_path / "again").iterdir()
        expected = (tmp_path / "out" / "images" / path.name).read_bytes()
        assert path.read_bytes() == expected
        mine.unlink()
        draw(
            *again, model=None, out=tmp_path / "again", fails=f"--vae must be a file or directory, found none at {mine}"
        )
        draw(*again, "--vae", vae, model=None, out=tmp_path / "moved")
        assert (tmp_path / "moved" / path.name).read_bytes() == expected

    def test_shards_may_have_copies_of_them(self, draw, join, tmp_path, old, words, vae):
        copies = [shutil.copy(path, tmp_path) for path in (words, vae)]
        draw(*JOB, "--tokenizer", words, "--vae", vae, "--shard", "0/2", model=old, out=tmp_path / "0")
        draw(*JOB, "--tokenizer", copies[0], "--vae", copies[1], "--shard", "1/2", model=old, out=tmp_path / "1")
        join(tmp_path / "out", tmp_path / "0", tmp_path / "1")
        draw(*JOB, "--tokenizer", words, "--vae", vae, model=old, out=tmp_path / "whole")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    def test_workers_and_actors_read_them(self, draw, tmp_path, old, words, vae):
        draw(*JOB, "--tokenizer", words, "--vae", vae, model=old)
        config = JobFolder.stored_config(tmp_path / "out")
        assert isinstance(config, JobConfig)
        drawn = Task.of(config, None, None, torch.get_num_threads()).drawer().draw(0)  # what each of them is sent
        assert torch.equal(drawn.tokens, codes(tmp_path / "out").long())
        with Image.open(tmp_path / "out" / "images" / "000000-00000.png") as image:
            assert image.tobytes() == drawn.pixels[0].permute(1, 2, 0).contiguous().numpy().tobytes()

    def test_a_saved_model_takes_the_tokenizer_that_it_lacks(self, draw, tmp_path, words, model):
        bare = saved_model(tmp_path / "bare")
        (bare / "tokenizer.json").unlink()
        draw(*JOB, model=bare, fails="name it with --tokenizer")
        draw(*JOB, "--tokenizer", words, model=bare)
        draw(*JOB, out=tmp_path / "whole")
        assert torch.equal(codes(tmp_path / "out"), codes(tmp_path / "whole"))


def sheet(*arguments, fails=None):
    """`dalle-fast draw`."""
    return checked(CliRunner().invoke(draw_command.draw, [str(a) for a in arguments]), fails)


def test_a_sheet_is_drawn_with_them(tmp_path, old, words, vae):
    places = ["--out", tmp_path / "sheet.png", "--images-per-prompt", 1]
    sheet("red apple", "--model", old, *places, fails="name it with --tokenizer")
    sheet("red apple", "--model", old, "--tokenizer", words, *places)
    own = (tmp_path / "sheet.png").read_bytes()
    sheet("red apple", "--model", old, "--tokenizer", words, "--vae", vae, *places)
    assert (tmp_path / "sheet.png").read_bytes() != own


def test_a_vqgan_comes_with_its_configuration(tmp_path, words):
    vae = DiscreteVAE(image_size=16, num_tokens=40, codebook_dim=4, num_layers=1, hidden_dim=4)
    dalle = DALLE(vae=vae, dim=8, num_text_tokens=20, text_seq_len=5, depth=1, heads=2, dim_head=12)
    write_upstream(dalle.eval(), tmp_path / "old.pt")
    ckpt, config = checkpoint(tmp_path, "gumbel")
    arguments = ["red", "--model", tmp_path / "old.pt", "--tokenizer", words, "--vae", ckpt, "--images-per-prompt", 1]
    arguments += ["--out", tmp_path / "sheet.png", "--scale", 1]
    sheet(*arguments, fails="the size of pictures must be known")
    sheet(*arguments, "--yaml", config)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 64 + 2 * 8


BAD = {
    "yaml alone": (["--yaml", "words.json"], "--yaml must be the configuration of a VQGAN that --vae names"),
    "another grid": (
        ["--vae", "large.pt"],
        "expected 30 codes in a grid of 8 x 8, found 30 codes in a grid of 16 x 16",
    ),
    "a DALLE as VAE": (["--vae", "old.pt"], "vae must have image_size"),
    "no VAE": (["--vae", "words.json"], "words.json"),
    "another vocabulary": (["--tokenizer", "many.json"], "must have at most the model's 20 tokens, got 26"),
    "YouTokenToMe": (["--tokenizer", "bpe.model"], "looks like YouTokenToMe's"),
    "no tokenizer": (["--tokenizer", "old.pt"], "must be a tokenizer.json"),
    "no merges": (["--tokenizer", "no.gz"], "no.gz"),
    "nothing": (["--vae", "missing"], "'missing' does not exist"),
    "a folder": (["--yaml", "."], "is a directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence(case, draw, tmp_path, old, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(words, "words.json")
    shutil.copy(old, "old.pt")
    small_tokenizer(*"bcdefghijklmnopqrstuv"[:20]).save("many.json")
    large = DiscreteVAE(image_size=32, num_tokens=30, codebook_dim=4, num_layers=1, hidden_dim=4)
    write_upstream(large, tmp_path / "large.pt")
    for name in ("bpe.model", "no.gz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9)
    arguments, message = BAD[case]
    more = [] if "--tokenizer" in arguments else ["--tokenizer", "words.json"]
    draw("red", *arguments, *more, model="old.pt", fails=message)
    sheet("red", *arguments, *more, "--model", "old.pt", "--out", "sheet.png", fails=message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "sheet.png").exists()
