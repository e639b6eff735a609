"""The manifest: lines that say all, lines that are corrupt, and pictures drawn again from them."""

import dataclasses
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import saved_model
from stored_jobs import BACKEND, HOSTILE, RANKED, job_config

from dalle_fast import _extension
from dalle_fast.jobs.job import hash_codes, hash_model
from dalle_fast.jobs.manifest import Record, best_first, read_manifest, redraw
from dalle_fast.jobs.run import run_job
from dalle_fast.jobs.store import JobFolder
from dalle_fast.jobs.stream import Drawer

KEYS = (
    "index prompt_index number prompt seed score kept image tokens row settings model tokenizer vae yaml model_hash "
    "device dtype engine backend batch"
)


def record(index=3, config=RANKED, **changes) -> Record:
    found = Record.of(config, config.sample(index), score=0.1, image="images/000001-00000.png", backend=BACKEND)
    return dataclasses.replace(found, **changes)


def parsed(line: str) -> Record:
    return Record.from_line(line.encode(), "m.jsonl, line 1,")


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_records_come_back_from_one_line(prompt):
    stored = record(config=job_config(prompts=("a", prompt), temperature=1, top_p=0.9))
    line = stored.to_line()
    assert line.count("\n") == 1 and line.endswith("\n")
    assert parsed(line) == stored
    assert " ".join(json.loads(line)) == KEYS


def test_a_record_says_where_its_sample_is():
    stored = record(5)
    assert (stored.tokens, stored.row, stored.batch) == ("tokens-000002.safetensors", 1, (4, 2))
    assert stored.sample == RANKED.sample(5)
    last = record(6, job_config(prompts=("a",), images_per_prompt=7, batch_size=3))
    assert (last.row, last.batch) == (0, (6, 1))


def test_scores_come_back_with_every_bit():
    for score in torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist():
        assert parsed(record(score=score).to_line()).score == score
    with pytest.raises(ValueError):
        record(score=float("nan")).to_line()


CORRUPT = {
    "": "Expecting value",
    "null": "null",
    "[1]": "[1]",
    "{}": "{}",
    "[" * 100_000: "recursion",
    '{"index": 3': "Expecting",
    "drop score": '\'{"index"',
    "more extra 1": '\'{"index"',
    "set index true": "index True",
    'set index "3"': "index '3'",
    "set index -1": "index -1",
    "set index 4": "index 4 at row 1 of batch [2, 2]",
    "set row 2": "row 2",
    "set batch [2]": "batch [2]",
    "set batch [2, 1]": "batch [2, 1]",
    'set batch "x"': "batch 'x'",
    "set seed -1": "seed -1",
    "set seed 18446744073709551616": "seed 18446744073709551616",
    "set score NaN": "NaN is not JSON",
    "set score true": "score True",
    'set score "good"': "score 'good'",
    "set kept false": "kept False",
    "set prompt 7": "prompt 7",
    'set prompt " "': "empty one",
    'set dtype "float7"': "dtype must be one of",
    "set settings 7": "settings 7",
    "set settings {}": "temperature",
    'set settings {"temperature": 1.0, "cond_scale": 1.0}': "settings {",
    'set settings {"prompts": []}': "prompts",
}


@pytest.mark.parametrize("change", CORRUPT, ids=[change[:40] for change in CORRUPT])
def test_a_corrupt_line_is_named_with_its_file_and_number(change, tmp_path):
    stored = json.loads(record().to_line())
    verb, _, rest = change.partition(" ")
    key, _, value = rest.partition(" ")
    if verb == "drop":
        del stored[key]
    elif verb in ("set", "more"):
        stored[key] = json.loads(value)
    line = json.dumps(stored) if verb in ("drop", "set", "more") else change
    path = tmp_path / "manifest.jsonl"
    path.write_text(record(2).to_line() + line + "\n" + record(4).to_line())
    records = read_manifest(path)
    assert next(records).index == 2
    expected = f"sample: {path}, line 2, must be a record of the job, got "
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        next(records)
    assert CORRUPT[change] in str(error.value) and len(str(error.value)) < 1000


def test_settings_of_another_type_are_corrupt():
    for name, value in (("temperature", "hot"), ("top_k", 1.5), ("truncate", 1), ("known_hash", 7)):
        changed = record(settings=RANKED.settings | {name: value})
        with pytest.raises(ValueError, match=f"settings .*{name}"):
            parsed(changed.to_line())


def test_a_line_that_is_no_text_is_corrupt():
    with pytest.raises(ValueError, match=r"m, line 9, must be a record of the job, got .*utf-8"):
        Record.from_line(b"\xff\xfe\n", "m, line 9,")


def test_best_first_is_by_score_then_by_index():
    scored = [record(i, score=score) for i, score in ((1, 0.5), (2, 0.75), (3, 0.5), (4, -1.0))]
    assert [r.index for r in best_first(reversed(scored))] == [2, 1, 3, 4]
    assert [r.index for r in best_first(record(i, score=None) for i in (3, 1, 2))] == [1, 2, 3]


# --- drawing again


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("redrawn") / "model")


def finished(folder, model, *, known=None, **changes):
    """A job that was run to its end: its config and its manifest."""
    config = job_config(
        model=str(model), model_hash=hash_model(model), prompts=("red apple", "a flag", "green apple"),
        known_hash=None if known is None else hash_codes(known), **changes,
    )  # fmt: skip
    if config.engine == "cpu" and (missing := _extension.missing()):
        pytest.skip(missing.removeprefix("missing: "))
    drawer = Drawer(config, known=known)
    with JobFolder.open(folder, config, known=known) as opened:
        run_job(config, opened, lambda chunks: map(drawer.draw, chunks), drawer.decode)
    return config, folder / "manifest.jsonl"


def png(path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": "eager", "batch_size": 4},
        {"temperature": 0.7, "top_k": None, "top_p": 0.8, "cond_scale": 2.0},
        {"dtype": "int8"},
        {"dtype": "bfloat16"},
        {"filter_thres": 0.9, "top_k": None, "seed": 2**64 - 2},
    ],
    ids=["cpu", "eager", "guided", "int8", "bfloat16", "original filter"],
)
def test_every_picture_is_drawn_again_to_the_bit(changes, model, tmp_path):
    config, path = finished(tmp_path / "job", model, **changes)
    for index in range(0, config.n_samples, 4):
        pixels, found, said = redraw(path, index)
        assert said == [] and found.index == index
        assert torch.equal(pixels, png(path.parent / found.image))


def test_known_codes_are_kept_when_a_picture_is_drawn_again(model, tmp_path):
    known = torch.full((64,), -1)
    known[:20], known[40] = torch.arange(20), 7
    _, path = finished(tmp_path / "job", model, known=known)
    pixels, found, said = redraw(path, 4)
    assert said == [] and torch.equal(pixels, png(path.parent / found.image))
    (path.parent / "known.safetensors").rename(tmp_path / "known.safetensors")
    with pytest.raises(ValueError, match=r"known.safetensors must hold the known codes of sample 4, got none"):
        redraw(path, 4)
    save_file({"known": known.flip(0).int()}, path.parent / "known.safetensors")
    with pytest.raises(ValueError, match="got others"):
        redraw(path, 4)


def test_a_manifest_alone_is_enough(model, tmp_path):
    _, path = finished(tmp_path / "job", model)
    moved_model = tmp_path / "elsewhere"
    moved_model.symlink_to(model)
    lone = tmp_path / "copied.jsonl"
    lone.write_text("".join(path.read_text().splitlines(keepends=True)[2:5]))
    pixels, found, said = redraw(lone, 3, model_dir=moved_model)
    assert torch.equal(pixels, png(path.parent / found.image))
    assert len(said) == 1 and "could not be compared" in said[0] and found.tokens in said[0]


def test_other_codes_than_the_stored_ones_are_told(model, tmp_path):
    _, path = finished(tmp_path / "job", model)
    file = path.parent / "tokens-000001.safetensors"
    tokens = load_file(file)["tokens"]
    tokens[1, 5:8] = (tokens[1, 5:8] + 1) % 30
    save_file({"tokens": tokens}, file, metadata={"backend": "x"})
    assert redraw(path, 3)[2] == [f"3 of 64 codes of sample 3 are other than in {file}."]
    assert redraw(path, 2)[2] == []
    save_file({"tokens": tokens[:, :9].contiguous()}, file, metadata={"backend": "x"})
    assert "is of another job" in redraw(path, 3)[2][0]
    file.write_bytes(b"torn")
    assert "not there or not whole" in redraw(path, 3)[2][0]


def test_another_backend_is_told(model, tmp_path):
    _, path = finished(tmp_path / "job", model)
    text = path.read_text()
    path.write_text(text.replace("cpu engine", "cpu engine of old"))
    (said,) = redraw(path, 1)[2]
    assert said.startswith("sample 1 was drawn by cpu engine of old, ") and "; this is cpu engine, " in said


def test_an_eager_sample_whose_batch_is_not_all_there_is_told(model, tmp_path):
    _, path = finished(tmp_path / "job", model, engine="eager", batch_size=4)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    assert redraw(path, 3)[2] == []
    (said,) = redraw(path, 5)[2]
    assert said.startswith("sample 5 was drawn with 3 others, of which ") and "holds 1" in said


def test_another_model_is_refused(model, tmp_path):
    _, path = finished(tmp_path / "job", model)
    other = saved_model(tmp_path / "other", depth=2)
    with pytest.raises(ValueError, match="must be the job's"):
        redraw(path, 0, model_dir=other)
    with pytest.raises(FileNotFoundError, match=r"found none at .*gone\. Name it with --model"):
        redraw(path, 0, model_dir=tmp_path / "gone")


def test_a_sample_that_no_line_holds_is_refused(model, tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text(record().to_line())
    with pytest.raises(ValueError, match=r"must hold the sample 4, got no line of it"):
        redraw(path, 4)
    with pytest.raises(FileNotFoundError):
        redraw(tmp_path / "none.jsonl", 0)
