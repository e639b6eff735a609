"""Options of `dalle-fast sample`: from a file, by the original's names, and those that are wrong."""

import dataclasses

import click
import pytest
import yaml
from job_folders import RANK, contents, manifest, picture, stored
from small_models import saved_model

from dalle_fast import _extension
from dalle_fast.cli.sample_options import DTYPES, ENGINES, ORIGINAL_FLAGS, PARAMETERS, SampleOptions
from dalle_fast.jobs import job
from dalle_fast.jobs.stream import Drawer
from dalle_fast.sampling import engine


class TestOptionsInAFile:
    def test_they_are_defaults_of_the_command(self, draw, tmp_path, model):
        said = {"prompts": ["red", "green"], "images_per_prompt": 2, "seed": 3, "truncate": True, "top_p": 0.5}
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(said | {"model": str(model), "keep": None}))
        draw("--config", tmp_path / "options.yaml", "--seed", 4, model=None)
        got = stored(tmp_path / "out")
        assert {name: got[name] for name in said} == said | {"seed": 4}

    def test_a_file_of_prompts_may_be_named(self, draw, tmp_path):
        (tmp_path / "prompts.txt").write_text("red\n")
        (tmp_path / "options.yaml").write_text(f"prompts: {tmp_path / 'prompts.txt'}\nbatch_size: auto\n")
        draw("--config", tmp_path / "options.yaml")
        assert stored(tmp_path / "out")["prompts"] == ["red"]

    def test_the_configuration_of_a_job_draws_it_again(self, draw, tmp_path):
        first = tmp_path / "first"
        draw("red", "green", "--seed", 3, "--top_k", 0.3, "--rank", RANK, "--keep", 1, "--batch-size", 3, out=first)
        draw("--config", first / "config.yaml", model=None)
        assert contents(tmp_path / "out") == contents(first)
        other = saved_model(tmp_path / "other", depth=2)
        draw("--config", first / "config.yaml", model=other, out=tmp_path / "no", fails="must be the model that the")

    def test_the_configuration_of_a_primed_job_needs_its_picture(self, draw, tmp_path):
        first, image = tmp_path / "first", picture(tmp_path / "image.png")
        draw("red", "--prime", image, out=first)
        draw("--config", first / "config.yaml", fails="--prime or --inpaint must give them, got none")
        draw("--config", first / "config.yaml", "--prime", image)
        assert contents(tmp_path / "out") == contents(first)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("imges_per_prompt: 3", "got 'imges_per_prompt'. Did you mean images_per_prompt?"),
            ("top-k: 3", "Did you mean top_k?"),
            ("- red", "must hold keys and values"),
            ("seed: [", "must be YAML"),
            ("seed: x", "'x' is not a valid integer"),
            ("seed: true", "seed must be one value, got True"),
            ("truncate: 1", "truncate must be true or false, got 1"),
            ("out: [a, b]", "out must be one value"),
            ("prompts: [1, 2]", "prompts must be a list of texts or a file's name"),
        ],
    )
    def test_what_is_wrong_is_named(self, draw, tmp_path, text, message):
        (tmp_path / "options.yaml").write_text(text)
        draw("red", "--config", tmp_path / "options.yaml", fails=message)
        assert not (tmp_path / "out").exists()


class TestFlagsOfTheOriginal:
    def test_they_mean_what_the_table_says(self, draw, tmp_path, model):
        flags = ["--dalle_path", model, "--text", "red apple|a flag", "--num_images", 2, "--batch_size", 3]
        draw(*flags, "--top_k", 0.5, "--outputs_dir", tmp_path / "out", model=None, out=None)
        got = stored(tmp_path / "out")
        names = ("prompts", "images_per_prompt", "batch_size", "filter_thres", "top_k", "model")
        assert [got[name] for name in names] == [["red apple", "a flag"], 2, 3, 0.5, None, str(model)]

    @pytest.mark.parametrize("flag", ["--hug", "--chinese", "--taming"])
    def test_what_files_say_themselves_is_refused(self, draw, flag):
        draw("red", flag, fails=f"{flag} must be left out: what a tokenizer or a VAE is, its file says")

    @pytest.mark.parametrize(
        ("flag", "option"),
        [("--bpe_path", "tokenizer"), ("--vqgan_model_path", "vae"), ("--vqgan_config_path", "yaml")],
    )
    def test_files_are_companions(self, draw, tmp_path, flag, option):
        draw("red", flag, tmp_path / "none", fails="'" + str(tmp_path / "none") + "' does not exist")
        (tmp_path / "file").write_text("")
        draw("red", flag, tmp_path / "file", fails=f"--{option} must be left out, got {tmp_path / 'file'}")

    def test_thresholds_are_no_numbers_of_codes(self, draw):
        draw("red", "--top_k", 64, fails="A number of codes to keep is --top-k, with a hyphen.")
        draw("red", "--top_k", 0.5, "--top-k", 64, fails="--top-k and --top_k do not go together")


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "prompts must be given, got none"),
            ([" "], "got an empty one as number 1"),
            (["red", "--prompts", "empty.txt"], "empty.txt must hold a prompt a line, got none"),
            (["--prompts", "latin.txt"], "latin.txt must be text in UTF-8"),
            (["--prompts", "missing.txt"], "missing.txt: No such file or directory"),
            (["red " * 9], "prompt 1 must have at most 5 tokens"),
            (["red", "--prime", "no-image.png"], "must be an image file that can be read, got no-image.png"),
            (["red", "--prime", "missing.png"], "must be an image file that can be read, got missing.png"),
            (["red", "--inpaint", "image.png", "--mask", "no-image.png"], "the mask must be an image file"),
            (["red", "--inpaint", "image.png"], "--inpaint needs --mask"),
            (["red", "--mask", "image.png"], "--mask needs --inpaint"),
            (["red", "--prime-rows", 3], "--prime-rows needs --prime"),
            (["red", "--prime", "image.png", "--prime-rows", 8], "prime_rows must be in 1..7"),
            (["red", "--prime", "image.png", "--inpaint", "image.png", "--mask", "image.png"], "do not go together"),
            (["red", "--rank", "no.such:function"], "rank must name a module that Python can import"),
            (["red", "--rank", "nothing"], "rank must be a CLIP's directory or file, or module:function"),
            (["red", "--max-memory", "1MiB"], "max_memory must be at least"),
            (["red", "--max-memory", "4 elephants"], "Write it like 4GiB, 512MB"),
            (["red", "--shard", "2/2"], "Write I/N with I in 0 .. N - 1"),
            (["red", "--device", "nowhere"], "device must be one that torch finds here"),
            (["red", "--temperature", -1], "temperature"),
            (["red", "--engine", "eager", "--dtype", "int8"], "eager"),
        ],
    )
    def test_it_ends_with_a_sentence_and_leaves_no_folder(self, draw, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        picture(tmp_path / "image.png")
        (tmp_path / "no-image.png").write_bytes(b"GIF89a")
        (tmp_path / "empty.txt").write_text("\n \n")
        (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
        if message.startswith("max_memory") and _extension.missing() is not None:
            message = "max_memory"
        draw(*arguments, fails=message)
        assert not (tmp_path / "out").exists()

    def test_truncate_cuts_long_prompts(self, draw, tmp_path):
        draw("red " * 9, "--truncate")
        assert len(manifest(tmp_path / "out")) == 4

    def test_models_and_folders_that_are_none(self, draw, tmp_path):
        draw(
            "red",
            model=tmp_path / "missing",
            fails="the model must be a saved model's directory or a file of weights, found none",
        )
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("")
        draw("red", fails="must be new, empty or the folder of a job, got one that holds 'thesis.tex'")
        draw("red", out=tmp_path / "out" / "thesis.tex" / "drawn", fails="thesis.tex")

    def test_an_error_while_drawing_is_a_sentence(self, draw, monkeypatch):
        def no_memory(self, chunk, on_rows=None):
            raise MemoryError

        monkeypatch.setattr(Drawer, "draw", no_memory)
        draw("red", fails="there is not enough memory")


def test_options_are_named_once():
    """The table of options, the class that holds them, and what other modules allow."""
    names = [param.name for param in PARAMETERS if param.expose_value]
    fields = [field.name for field in dataclasses.fields(SampleOptions)]
    assert sorted(names) == sorted(fields)
    assert {field.name for field in dataclasses.fields(job.JobConfig)} <= set(fields)
    assert job.DTYPES == DTYPES and set(ENGINES) == {"auto", *engine.ENGINES}
    taken = {flag for param in PARAMETERS if isinstance(param, click.Option) for flag in param.opts}
    assert set(ORIGINAL_FLAGS) <= taken
