"""`dalle-fast sample` from its options to its folder, on a small model."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from job_folders import RANK, contents, manifest, picture, stored
from PIL import Image
from safetensors.torch import load_file
from small_models import saved_model

from dalle_fast import CLIP, _extension
from dalle_fast.cli import sample_run
from dalle_fast.cli.sample import sample
from dalle_fast.cli.sample_options import ORIGINAL_FLAGS
from dalle_fast.jobs.store import JobFolder
from dalle_fast.jobs.stream import Drawer
from dalle_fast.sampling.plan import plan_drawing

needs_cpu_engine = pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))


class TestWhatItDraws:
    def test_prompts_become_a_folder(self, draw, tmp_path):
        result = draw("red apple", "a flag", "--images-per-prompt", 3, "--seed", 5)
        out = tmp_path / "out"
        assert "6 images of 2 prompts, in " in result.output and f"Look at {out / 'index.html'}" in result.output
        assert {path.name for path in out.iterdir() if not path.name.startswith(".lock")} == {
            *("config.yaml", "tokens-000000.safetensors", "images", "galleries", "manifest.jsonl", "index.html")
        }
        assert len(list((out / "images").iterdir())) == 6 and len(list((out / "galleries").iterdir())) == 2
        lines = manifest(out)
        assert [(line["prompt"], line["seed"]) for line in lines] == [
            (prompt, seed) for prompt in ("red apple", "a flag") for seed in (5, 6, 7)
        ]

    def test_the_codes_are_those_of_generate_images(self, draw, tmp_path, model):
        draw("red apple", "--images-per-prompt", 3, "--seed", 5, "--temperature", 0.7, "--top-k", 9)
        job = JobFolder.stored_config(tmp_path / "out")
        drawer = Drawer(job, known=None)
        text = drawer.model.token_ids(["red apple"], False).expand(3, -1)
        expected = drawer.model.dalle.generate_images(
            text, seed=5, temperature=0.7, top_k=9, engine=job.engine, return_tokens=True
        )[1]
        assert torch.equal(load_file(tmp_path / "out" / "tokens-000000.safetensors")["tokens"].long(), expected)

    def test_prompts_come_from_arguments_text_and_files(self, draw, tmp_path):
        (tmp_path / "prompts.txt").write_text("\ufeffthe first\n\n  the second \r\n", encoding="utf-8")
        draw("red apple", "--text", "a flag | red", "--prompts", tmp_path / "prompts.txt", "--images-per-prompt", 1)
        assert stored(tmp_path / "out")["prompts"] == ["red apple", "a flag", "red", "the first", "the second"]
        draw("--prompts", "-", "--images-per-prompt", 1, stdin="red\n\ngreen\n", out=tmp_path / "other")
        assert stored(tmp_path / "other")["prompts"] == ["red", "green"]

    def test_settings_come_from_the_model_unless_the_call_says_otherwise(self, draw, tmp_path):
        own = saved_model(tmp_path / "model")
        (own / "sampling.json").write_text('{"temperature": 0.5, "top_k": 7, "cond_scale": 2}')
        names = ("temperature", "top_k", "cond_scale", "filter_thres", "top_p")
        draw("red", model=own)
        assert [stored(tmp_path / "out")[name] for name in names] == [0.5, 7, 2.0, None, None]
        draw("red", "--temperature", 0, "--top_k", 0.25, "--top-p", 0.9, model=own, out=tmp_path / "other")
        assert [stored(tmp_path / "other")[name] for name in names] == [0.0, None, 2.0, 0.25, 0.9]

    @needs_cpu_engine
    @pytest.mark.parametrize(
        ("arguments", "batch"),
        [([], 8), (["--images-per-prompt", 50], 64), (["--shard", "1/3"], 3), (["--max-memory", "64GiB"], 8)],
    )
    def test_the_batch_follows_from_the_job(self, draw, tmp_path, arguments, batch):
        draw("red apple", "a flag", *arguments)
        assert stored(tmp_path / "out")["batch_size"] == batch

    @needs_cpu_engine
    def test_the_batch_follows_from_the_memory(self, draw, tmp_path, monkeypatch):
        def left(max_memory, model, batch_size, *, cond_scale):
            if batch_size > 4:
                raise ValueError("too many pictures")
            return plan_drawing(model.dalle, 2, max_memory=2**40).total_bytes

        monkeypatch.setattr("dalle_fast.cli.sample_config.memory_for_engine", left)
        draw("red apple", "--images-per-prompt", 40, "--max-memory", "64GiB")
        assert stored(tmp_path / "out")["batch_size"] == 2

    def test_the_eager_engine_draws_too(self, draw, tmp_path):
        draw("red apple", "--engine", "eager", "--images-per-prompt", 10)
        assert stored(tmp_path / "out")["batch_size"] == 8 and len(manifest(tmp_path / "out")) == 10

    def test_the_best_are_kept(self, draw, tmp_path):
        result = draw("red apple", "a flag", "--images-per-prompt", 5, "--rank", RANK, "--keep", 2)
        assert "the best 2 of each kept" in result.output
        lines = manifest(tmp_path / "out")
        assert sum(line["kept"] for line in lines) == 4 == len(list((tmp_path / "out" / "images").iterdir()))
        for prompt in range(2):
            scores = sorted((line["score"], line["kept"]) for line in lines if line["prompt_index"] == prompt)
            assert [kept for _, kept in scores] == [False] * 3 + [True] * 2

    def test_a_ranker_may_lie_in_the_current_folder(self, draw, tmp_path, monkeypatch):
        (tmp_path / "my_own_ranker.py").write_text(
            "def score(prompts, images):\n    return images.amax(dim=(1, 2, 3))\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
        draw("red apple", "--rank", "my_own_ranker:score")
        assert all(line["score"] is not None for line in manifest(tmp_path / "out"))

    def test_a_model_ranks_with_its_own_clip(self, draw, tmp_path, model):
        draw("red", "--keep", 1, fails="--keep needs --rank")
        own = saved_model(tmp_path / "model")
        CLIP(dim_text=8, dim_image=8, dim_latent=8, num_text_tokens=20, text_enc_depth=1, text_seq_len=5, text_heads=2,
             visual_enc_depth=1, visual_heads=2, visual_image_size=16, visual_patch_size=8,
             ).save_pretrained(own / "clip")  # fmt: skip
        draw("red", "--keep", 1, model=own)
        assert stored(tmp_path / "out")["rank"] == str(own / "clip") and len(manifest(tmp_path / "out")) == 4

    def test_the_model_writes_the_rest_of_prompts(self, draw, tmp_path):
        draw("red", "--gentxt", "--seed", 5)  # a seed for which the model knows words
        (completed,) = stored(tmp_path / "out")["prompts"]
        assert completed == "red a flag"
        assert "is complete" in draw("red", "--gentxt", "--seed", 5).output

    def test_known_codes_stay(self, draw, tmp_path):
        image, mask = picture(tmp_path / "image.png"), tmp_path / "mask.png"
        draw("red", "--prime", image, "--prime-rows", 3, out=tmp_path / "primed")
        known = load_file(tmp_path / "primed" / "known.safetensors")["known"]
        tokens = load_file(tmp_path / "primed" / "tokens-000000.safetensors")["tokens"]
        assert (known >= 0).tolist() == [True] * 24 + [False] * 40
        assert (tokens[:, :24] == known[:24]).all()
        Image.new("L", (16, 16)).save(mask)
        draw("red", "--inpaint", image, "--mask", mask, out=tmp_path / "none", fails="the mask must be white")
        Image.linear_gradient("L").resize((16, 16)).save(mask)
        draw("red", "--inpaint", image, "--mask", mask, out=tmp_path / "painted")
        known = load_file(tmp_path / "painted" / "known.safetensors")["known"]
        tokens = load_file(tmp_path / "painted" / "tokens-000000.safetensors")["tokens"]
        assert (tokens == known)[:, known >= 0].all() and 0 < int((known >= 0).sum()) < 64
        assert "is complete" in draw(out=tmp_path / "painted").output  # they are kept in the folder


class TestGoingOn:
    ARGUMENTS = ("red apple", "a flag", "--images-per-prompt", 5, "--batch-size", 2)

    @pytest.fixture
    def interrupted(self, draw, tmp_path, monkeypatch):
        """A folder whose job was stopped by Ctrl-C in its third chunk."""
        inner = Drawer.draw

        def stopped(self, chunk, on_rows=None):
            if chunk == 2:
                raise KeyboardInterrupt
            return inner(self, chunk, on_rows)

        def run(model, *more):
            monkeypatch.setattr(Drawer, "draw", stopped)
            arguments = [*self.ARGUMENTS, "--model", model, "--out", tmp_path / "out", *more]
            result = CliRunner().invoke(sample, [str(a) for a in arguments])
            monkeypatch.setattr(Drawer, "draw", inner)
            assert result.exit_code == 130
            assert f"What was drawn stays in {tmp_path / 'out'}; the same command goes on." in result.stderr
            assert len(list((tmp_path / "out").glob("tokens-*"))) == 2
            return tmp_path / "out"

        return run

    def test_it_ends_in_the_same_bytes(self, draw, tmp_path, model, interrupted):
        out = interrupted(model)
        assert json.loads(draw(*self.ARGUMENTS, "--json").stdout)["resumed"] == 4
        draw(*self.ARGUMENTS, out=tmp_path / "whole")
        assert contents(out) == contents(tmp_path / "whole")

    def test_the_folder_alone_says_how_to_go_on(self, draw, tmp_path, model, interrupted):
        out = interrupted(model, "--rank", RANK, "--keep", 2, "--temperature", 0.5)
        draw(model=None)
        draw(*self.ARGUMENTS, "--rank", RANK, "--keep", 2, "--temperature", 0.5, out=tmp_path / "whole")
        assert contents(out) == contents(tmp_path / "whole")

    def test_a_complete_job_says_so_and_reads_no_model(self, draw, tmp_path, monkeypatch):
        draw("red apple")
        before = contents(tmp_path / "out")
        monkeypatch.setattr("dalle_fast.cli.sample_config.DrawingModel.read", None)
        for arguments in (["red apple"], [], ["--batch-size", "auto", "--engine", "auto"]):
            result = draw(*arguments)
            assert "is complete: 4 images of 1 prompt; nothing to draw" in result.output
        assert json.loads(draw("--json").stdout)["images_per_second"] == 0
        assert contents(tmp_path / "out") == before

    @pytest.mark.parametrize(
        ("arguments", "fields"),
        [
            (["a flag"], "prompts"),
            (["red apple", "--seed", 1, "--images-per-prompt", 5], "images_per_prompt, seed"),
            (["--batch-size", 2, "--dtype", "bfloat16"], "batch_size, dtype"),
            (["--top-k", 3], "top_k"),
            (["--top_k", 0.5], "filter_thres"),
            (["--rank", RANK], "rank"),
            (["--truncate"], "truncate"),
        ],
    )
    def test_other_settings_are_refused_by_name(self, draw, tmp_path, arguments, fields):
        draw("red apple")
        before = contents(tmp_path / "out")
        draw(*arguments, fails=f"differs in {fields}.")
        assert contents(tmp_path / "out") == before

    def test_another_model_is_refused(self, draw, tmp_path):
        draw("red apple")
        draw("red apple", model=saved_model(tmp_path / "other", depth=2), fails="differs in model, model_hash")

    def test_a_copy_of_the_model_is_the_same_model(self, draw, tmp_path):
        draw("red apple")
        assert "is complete" in draw("red apple", model=saved_model(tmp_path / "copy")).output


class TestWhatItTells:
    def test_json_is_one_object(self, draw, tmp_path):
        result = draw("red", "green", "--json", "--rank", RANK, "--keep", 3)
        figures = json.loads(result.stdout)
        assert list(figures) == ["out", "images", "kept", "resumed", "seconds", "images_per_second", "prompts"]
        counts = {"out": str(tmp_path / "out"), "images": 8, "kept": 6, "resumed": 0, "prompts": 2}
        assert {name: figures[name] for name in counts} == counts
        assert figures["images_per_second"] == pytest.approx(8 / figures["seconds"], rel=0.1)

    def test_quiet_is_quiet(self, draw):
        assert draw("red", "--quiet").output == ""

    def test_previews_appear_while_it_draws_and_go(self, draw, tmp_path, monkeypatch):
        preview, seen = tmp_path / "out" / "preview.png", []
        commit = JobFolder.commit

        def look(self, drawn):
            with Image.open(preview) as image:
                seen.append(image.size)
            commit(self, drawn)

        monkeypatch.setattr(JobFolder, "commit", look)
        draw("red", "--preview", 2, "--batch-size", 2)
        assert len(seen) == 2 and not preview.exists()

    @pytest.mark.parametrize("many", [["--workers", 2], ["--ray", "local"]])
    def test_previews_are_of_one_process(self, draw, many):
        draw("red", "--preview", 2, *many, fails="do not go together. It shows what one process draws")
        draw("red", "--preview", 2, "--workers", 1)

    def test_help_is_grouped_and_imports_no_torch(self):
        code = "import sys; sys.argv = ['dalle-fast', 'sample', '--help']\nfrom dalle_fast.cli.__main__ import main\n"
        code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"
        for group in ("Prompts:", "The job:", "The model:", "Drawing:", "Flags of the original's generate.py:"):
            assert f"\n{group}\n" in done.stdout
        assert all(flag in done.stdout for flag in ORIGINAL_FLAGS) and "\n  --model DIR|FILE  " in done.stdout


class TestOnePictureAgain:
    def test_it_is_the_same_file(self, draw, tmp_path):
        draw("red apple", "a flag", "--rank", RANK, "--keep", 3)
        line = next(line for line in manifest(tmp_path / "out") if line["kept"] and line["prompt_index"] == 1)
        again = ["--from-manifest", tmp_path / "out" / "manifest.jsonl", "--index", line["index"]]
        result = draw(*again, model=None, out=tmp_path / "again")
        (path,) = (tmp_path / "again").iterdir()
        assert path.read_bytes() == (tmp_path / "out" / line["image"]).read_bytes()
        assert f"the codes that are stored. Look at {path}" in result.output and result.stderr == ""
        figures = json.loads(draw(*again, "--json", out=tmp_path / "again").stdout)
        assert figures == {"image": str(path), "index": line["index"], "same": True, "warnings": []}

    def test_another_backend_is_a_warning(self, draw, tmp_path):
        draw("red apple")
        path = tmp_path / "out" / "manifest.jsonl"
        path.write_text(path.read_text().replace(", torch ", ", torch 0.", 4))
        result = draw("--from-manifest", path, "--index", 1, model=None, out=tmp_path / "again")
        assert "which may round otherwise" in result.stderr and (tmp_path / "again" / "000000-00001.png").is_file()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--index", 4], "must hold the sample 4"),
            (["--index", 0, "--seed", 3], "so --seed must be left out"),
            (["red", "--index", 0], "must be left out"),
            ([], "--from-manifest needs --index"),
        ],
    )
    def test_what_cannot_be_drawn_again(self, draw, tmp_path, arguments, message):
        draw("red apple")
        draw("--from-manifest", tmp_path / "out" / "manifest.jsonl", *arguments, model=None, fails=message)

    def test_a_corrupt_manifest_is_named(self, draw, tmp_path):
        (tmp_path / "m.jsonl").write_text("{}\n")
        draw("--from-manifest", tmp_path / "m.jsonl", "--index", 0, fails="m.jsonl, line 1, must be a record")


def test_an_iterator_is_closed_before_an_error_is_told(draw, monkeypatch):
    """What draws in other processes must stop then, or the command waits for it."""
    said, kept = [], []

    def draws(self, progress):
        def drawn(chunks):
            try:
                yield from self._drawn_here(chunks, progress)
            finally:
                said.append("closed")

        return lambda chunks: kept.append(drawn(chunks)) or kept[0]

    def full(self, drawn):
        raise OSError("sample: no room")

    monkeypatch.setattr(sample_run._Here, "draws", draws)
    monkeypatch.setattr(JobFolder, "commit", full)
    draw("red", fails="sample: no room")
    assert said == ["closed"]
