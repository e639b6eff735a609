"""`dalle-fast convert`, and drawing and training with files of weights: the same numbers, whole or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from crafted_files import saved, write
from golden_cases import FOLDER
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_fast import DALLE, DiscreteVAE
from dalle_fast.cli.__main__ import main
from dalle_fast.cli.train_run import read_vae
from dalle_fast.compat import load
from dalle_fast.compat.checkpoints import write_upstream
from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.job import hash_model

VAE = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4, "num_resnet_blocks": 1}
SIZES = {"dim": 24, "num_text_tokens": 9, "text_seq_len": 4, "depth": 2, "heads": 2, "dim_head": 12}


def run(*arguments, code=0) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(scope="module")
def dalle():
    torch.manual_seed(2)
    return DALLE(vae=DiscreteVAE(**VAE), **SIZES).eval()


@pytest.fixture
def file(dalle, tmp_path):
    write_upstream(dalle, tmp_path / "dalle.pt")
    return tmp_path / "dalle.pt"


def write_tokenizer(path, words=("a", "red", "apple", "blue", "flag")):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<pad>", *words))}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def tokens():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 9, (2, 4), generator=generator), torch.randint(0, 12, (2, 16), generator=generator)


def test_a_dalle_becomes_a_directory_with_equal_numbers(dalle, file, tmp_path):
    told = run("convert", file, tmp_path / "out", "--tokenizer", write_tokenizer(tmp_path / "words.json"))
    assert "a DALLE of" in told and "Next: dalle-fast sample" in told
    again = DALLE.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(*tokens()), dalle(*tokens()))
        assert torch.equal(again.vae.decode(tokens()[1]), dalle.vae.decode(tokens()[1]))
    assert DrawingModel.read(tmp_path / "out").tokenizer.encode("red apple") == [2, 3]
    assert "dalle.pt" in (tmp_path / "out" / "README.md").read_text()
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_what_is_stored_follows_dtype(file, tmp_path):
    run("convert", file, tmp_path / "out", "--dtype", "float16")
    facts = json.loads(run("info", tmp_path / "out", "--json"))
    assert facts["dtypes"]["float16"] > 0
    assert facts["runs"] is True


def test_a_missing_tokenizer_is_named_with_where_people_get_it(file, tmp_path):
    told = run("convert", file, tmp_path / "out")
    assert "It has no tokenizer yet" in told and "--bpe_path" in told
    told = run("draw", "red", "--model", file, "--out", tmp_path / "x.png", code=1)
    assert "a model of 9 text tokens needs the tokenizer" in told


def test_a_tokenizer_of_another_vocabulary_is_refused(file, tmp_path):
    words = write_tokenizer(tmp_path / "words.json", tuple("abcdefghijk"))
    told = run("convert", file, tmp_path / "out", "--tokenizer", words, code=1)
    assert "must have at most the model's 9 tokens, got 12" in told
    assert not (tmp_path / "out").exists()


def test_the_original_s_vocabulary_needs_no_file(monkeypatch, tmp_path):
    pytest.importorskip("tokenizers")
    from dalle_fast.tokenizers import find_clip_merges

    try:
        find_clip_merges()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    torch.manual_seed(2)
    model = DALLE(vae=DiscreteVAE(**VAE), **{**SIZES, "num_text_tokens": 49408, "dim": 8, "depth": 1}).eval()
    write_upstream(model, tmp_path / "dalle.pt")
    loaded = load(tmp_path / "dalle.pt")
    assert loaded.tokenizer.vocab_size == 49408 and not loaded.problem
    run("convert", tmp_path / "dalle.pt", tmp_path / "out")
    again = DrawingModel.read(tmp_path / "out").tokenizer
    for text in ("a red apple", "armchair in the shape of an avocado!", "it's 3.5", "two   spaces"):
        assert again.encode(text) == loaded.tokenizer.encode(text)


def test_other_things_are_not_overwritten(file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert "holds other things" in run("convert", file, tmp_path / "mine", code=1)
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    run("convert", file, tmp_path / "out")
    run("convert", file, tmp_path / "out")
    assert "must be another than IN" in run("convert", tmp_path / "out", tmp_path / "out", code=1)
    run("convert", file, file, code=2)


def test_what_fails_leaves_nothing(tmp_path, file):
    cut = write(tmp_path / "cut.pt", file.read_bytes()[:-100])
    stored = torch.load(file, weights_only=True)
    del stored["weights"]["text_emb.weight"]
    lacking = write(tmp_path / "lacking.pt", saved(stored))
    for path in (cut, lacking, tmp_path / "missing.pt"):
        told = run("convert", path, tmp_path / "out", code=1)
        assert len([line for line in told.splitlines() if line]) == 1
    assert not (tmp_path / "out").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cut.pt", "dalle.pt", "lacking.pt"]
    run("convert", file, tmp_path / "out", "--vae", tmp_path / "missing", code=2)


def test_a_file_draws_what_its_directory_draws(file, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    run("convert", file, tmp_path / "out")  # the tokenizer beside the file
    arguments = ["red apple", "--images-per-prompt", "2", "--seed", "5", "--quiet"]
    for model, folder in ((file, "of_file"), (tmp_path / "out", "of_directory")):
        run("sample", *arguments, "--model", model, "--out", tmp_path / folder)
    pictures = [sorted((tmp_path / folder).rglob("*-0000?.png")) for folder in ("of_file", "of_directory")]
    assert len(pictures[0]) == len(pictures[1]) == 2
    for ours, theirs in zip(*pictures, strict=True):
        assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()
    # The same command goes on, and knows the model by its bytes.
    shutil.copy(file, tmp_path / "moved.pt")
    told = run("sample", *arguments, "--model", tmp_path / "moved.pt", "--out", tmp_path / "of_file", "--json")
    assert json.loads(told.splitlines()[-1])["resumed"] == 2
    run("draw", "red apple", "--model", file, "--images-per-prompt", "1", "--out", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


def test_a_vae_does_not_draw_and_a_dalle_is_no_vae(dalle, file, tmp_path):
    write_upstream(dalle.vae, tmp_path / "vae.pt")
    told = run("draw", "red", "--model", tmp_path / "vae.pt", "--out", tmp_path / "x.png", code=1)
    assert "must hold a DALLE, got a DiscreteVAE" in told
    vae = read_vae(str(tmp_path / "vae.pt"))
    codes = tokens()[1]
    with torch.no_grad():
        assert torch.equal(vae.decode(codes), dalle.vae.decode(codes)) and not vae.training
    with pytest.raises((ValueError, TypeError), match="vae must have"):
        read_vae(str(file))


def test_a_file_encodes_what_its_directory_encodes(dalle, tmp_path):
    write_upstream(dalle.vae, tmp_path / "vae.pt")
    dalle.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        colours = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(colours.numpy()).save(tmp_path / "pictures" / f"{i}.png")
    for vae, out in (("vae.pt", "a"), ("vae", "b")):
        run("encode", tmp_path / "pictures", "--vae", tmp_path / vae, "--out", tmp_path / out, "--workers", 0)
    codes = [sorted(path for path in (tmp_path / out).iterdir() if path.suffix != ".json") for out in "ab"]
    assert len(codes[0]) == len(codes[1]) > 0
    assert [path.read_bytes() for path in codes[0]] == [path.read_bytes() for path in codes[1]]
    write_tokenizer(tmp_path / "tokenizer.json")  # beside the file: no part of a VAE
    made = [json.loads((tmp_path / out / "codes.json").read_text())["vae_hash"] for out in "ab"]
    assert made[0] == hash_model(tmp_path / "vae.pt", draws=False) != hash_model(tmp_path / "vae.pt") != made[1]


def test_the_originals_own_files_load():
    for name, kind in (("checkpoint_dalle.pt", DALLE), ("checkpoint_vae.pt", DiscreteVAE)):
        assert isinstance(load(FOLDER / name).model, kind)
