"""Jobs on paper: numbers, seeds, chunks, and the configuration as a file."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_models import saved_model

from dalle_fast.compat.formats.base import Companions
from dalle_fast.jobs.job import JobConfig, hash_codes, hash_model, read_mapping


def config(**changes) -> JobConfig:
    settings = {
        "prompts": ("a", "b", "a"),
        "model": "/models/m",
        "model_hash": "0" * 64,
        "images_per_prompt": 5,
        "seed": 7,
        "batch_size": 4,
        "device": "cpu",
        "dtype": "float32",
        "engine": "cpu",
        "temperature": 1.0,
        "cond_scale": 1.0,
    }
    return JobConfig(**settings | changes)


def test_samples_are_numbered_prompt_by_prompt():
    job = config()
    samples = [job.sample(i) for i in range(job.n_samples)]
    assert [s.index for s in samples] == list(range(15))
    assert [(s.prompt_index, s.number) for s in samples] == [(p, n) for p in range(3) for n in range(5)]
    assert [s for p in range(3) for s in job.samples_of_prompt(p)] == samples
    assert len({s.name for s in samples}) == 15 and not any(s.prompt in s.name for s in samples)


@pytest.mark.parametrize("again", ["a", "A"])
def test_a_prompt_that_comes_again_goes_on_counting_its_seeds(again):
    job = config(prompts=("a", "b", again))
    assert [s.seed for s in job.samples_of_prompt(0)] == [7, 8, 9, 10, 11]
    assert [s.seed for s in job.samples_of_prompt(1)] == [7, 8, 9, 10, 11]
    assert [s.seed for s in job.samples_of_prompt(2)] == [12, 13, 14, 15, 16]


def test_seeds_wrap_at_64_bits():
    assert [s.seed for s in config(seed=2**64 - 2).samples_of_prompt(0)] == [2**64 - 2, 2**64 - 1, 0, 1, 2]


def test_seeds_do_not_depend_on_other_prompts():
    alone, among = config(prompts=("b",)), config(prompts=("x", "a", "b"))
    assert [s.seed for s in alone.samples_of_prompt(0)] == [s.seed for s in among.samples_of_prompt(2)]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 7, 15, 64])
def test_chunks_hold_every_sample_once(batch_size):
    job = config(batch_size=batch_size)
    chunks = [job.samples_of(k) for k in range(job.n_chunks)]
    assert [s.index for chunk in chunks for s in chunk] == list(range(15))
    for k, chunk in enumerate(chunks):
        for row, sample in enumerate(chunk):
            assert job.place_of(sample) == (k, row)
            assert k in job.chunks_of_prompt(sample.prompt_index)
    for prompt in range(3):
        held = {k for k, chunk in enumerate(chunks) for s in chunk if s.prompt_index == prompt}
        assert set(job.chunks_of_prompt(prompt)) == held


def test_the_file_gives_the_same_job_back():
    job = config(
        prompts=("- not: yaml?", 'quote " and \\ and\nnewline', "\N{CAT FACE} \u202eabc", "null", "1.0", " é\t"),
        seed=2**64 - 1,
        top_k=64,
        top_p=0.9,
        rank="mod:function",
        keep=3,
        truncate=True,
    )
    assert JobConfig.from_yaml(job.to_yaml(), "config.yaml") == job


def test_a_whole_number_is_a_number():
    assert JobConfig.from_yaml(config().to_yaml().replace("temperature: 1.0", "temperature: 2"), "f").temperature == 2.0


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("seed: 7", "seed: x", TypeError, "config.yaml: seed must be int, got 'x'"),
        ("seed: 7", "seed: true", TypeError, "config.yaml: seed must be int, got True"),
        ("seed: 7", "seed: -1", ValueError, "seed must be at least 0, got -1"),
        ("seed: 7", "sede: 7", ValueError, "got the key 'sede'"),
        ("seed: 7\n", "", ValueError, "must say seed"),
        ("seed: 7", "seed: [", ValueError, "config.yaml must be YAML"),
        ("top_k: null", "top_k: 1.5", TypeError, "top_k must be int or null, got 1.5"),
        ("truncate: false", "truncate: 0", TypeError, "truncate must be bool, got 0"),
        ("dtype: float32", "dtype: float8", ValueError, "dtype must be one of float32"),
        ("prompts:\n- a\n", "prompts:\n- 3\n", TypeError, "prompts must be a list of texts"),
        ("keep: null", "keep: 3", ValueError, "keep needs rank"),
    ],
)
def test_a_wrong_file_is_refused_in_words(old, new, error, message):
    text = config().to_yaml()
    assert old in text
    with pytest.raises(error, match=message.replace("[", r"\[")):
        JobConfig.from_yaml(text.replace(old, new, 1), "config.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "3: 4\n", "!!python/object:os.system {}\n"])
def test_what_holds_no_keys_is_refused(text):
    with pytest.raises(ValueError, match="sample: f must"):
        read_mapping(text, "f")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "at least one text"),
        ({"prompts": ("a", " \n")}, "empty one as number 2"),
        ({"prompts": ("a", "caf\udce9")}, "UTF-8, got 'caf.udce9' as number 2"),
        ({"images_per_prompt": 0}, "images_per_prompt must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": 2**64}, "seed must be in 0"),
        ({"keep": 1}, "keep needs rank"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_differences_are_named():
    assert config().differences(config(seed=8, prompts=("a",))) == ["prompts", "seed"]
    assert config().differences(config()) == []


def test_the_hash_of_a_model_is_that_of_what_draws(tmp_path):
    directory = saved_model(tmp_path / "model")
    before = hash_model(directory)
    (directory / "README.md").write_text("another card")
    (directory / "captions.txt").write_text("other captions")
    assert hash_model(directory) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json", "vae/model.safetensors"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert hash_model(directory) != before, name
        (directory / name).write_bytes(content)
    assert hash_model(directory) == before
    with pytest.raises(FileNotFoundError, match="found none at"):
        hash_model(tmp_path / "missing")


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_the_hash_of_a_file_is_that_of_its_companions_too(tmp_path):
    model, words = written(tmp_path / "old.pt", "model"), written(tmp_path / "words.json", "words")
    vae, yaml = written(tmp_path / "vae" / "vqgan.ckpt", "vae"), written(tmp_path / "vqgan.yaml", "yaml")
    alone, named = hash_model(model), Companions(vae, yaml, words)
    different = {alone, *(hash_model(model, dataclasses.replace(named, **{name: None})) for name in vars(named))}
    assert len(different | {hash_model(model, named)}) == 5
    for path in (words, vae, yaml):
        before, content = hash_model(model, named), path.read_text()
        path.write_text("other")
        assert hash_model(model, named) != before, path
        path.write_text(content)

    # Not their names; and what lies beside is as if it were named.
    copies = Companions(
        *(written(tmp_path / "copies" / f"{i}", p.read_text()) for i, p in enumerate((vae, yaml, words)))
    )
    assert hash_model(model, copies) == hash_model(model, named)
    written(tmp_path / "vae" / "vqgan.yaml", "yaml"), written(tmp_path / "tokenizer.json", "words")
    assert hash_model(model, Companions(vae)) == hash_model(model, named)
    assert hash_model(model, Companions(tokenizer=copies.tokenizer)) == hash_model(model) != alone


def test_the_hash_of_companions_is_of_folders_and_halves_as_well(tmp_path):
    model, vae = written(tmp_path / "old.pt", "model"), written(tmp_path / "vae" / "encoder.pkl", "encoder")
    for path in (written(tmp_path / "vae" / "decoder.pkl", "d"), written(tmp_path / "words" / "vocab.txt", "v")):
        named = Companions(vae=vae, tokenizer=tmp_path / "words")
        before = hash_model(model, named)
        path.write_text("other")
        assert hash_model(model, named) != before, path
    with pytest.raises(FileNotFoundError, match=r"--vae must be a file or directory, found none at .*gone"):
        hash_model(model, Companions(vae=tmp_path / "gone"))


def test_the_companions_of_a_job_are_paths():
    job = config(tokenizer="/words.json", yaml="/vqgan.yaml")
    assert job.companions == Companions(tokenizer=Path("/words.json"), yaml=Path("/vqgan.yaml"))
    assert JobConfig.from_yaml(job.to_yaml(), "config.yaml").companions == job.companions


def test_every_field_is_in_the_file():
    assert set(read_mapping(config().to_yaml(), "f")) == {field.name for field in dataclasses.fields(JobConfig)}


def test_codes_have_a_hash_of_their_values():
    codes = torch.tensor([1, -1, 2])
    assert hash_codes(codes) == hash_codes(codes.int()) != hash_codes(torch.tensor([1, -1, 3]))
