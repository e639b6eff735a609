"""A job's folder: nothing committed is lost, whatever fails and when; one process writes; every file is foretold."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil

import pytest
import torch
from failing_disk import FailingDisk, Killed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_jobs import BACKEND, HOSTILE, RANKED, contents, decode, drawn, job_config, run

from dalle_fast.jobs.job import DrawnChunk, JobConfig, hash_codes
from dalle_fast.jobs.manifest import read_manifest
from dalle_fast.jobs.store import JobFolder, OutOfSpace

PLAIN = job_config()
SMALL = job_config(images_per_prompt=2, batch_size=3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Every file of these jobs, run without a failure."""
    found = {}
    for number, config in enumerate((RANKED, PLAIN, SMALL)):
        folder = tmp_path_factory.mktemp("undisturbed") / str(number)
        run(folder, config)
        found[config] = contents(folder)
    return found


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- what is in the folder


def test_a_finished_job_has_these_files_and_no_others(undisturbed):
    common = ["config.yaml", "index.html", "manifest.jsonl", *(f"tokens-{k:06d}.safetensors" for k in range(3))]
    common += ["galleries/000000.html", "galleries/000001.html"]
    images = [f"images/{p:06d}-{s:05d}.png" for p in range(2) for s in range(3)]
    assert set(undisturbed[PLAIN]) == {*common, *images}
    # scores by index: 0, .2, .1; 0, .2, .1
    assert set(undisturbed[RANKED]) == {*common, *(image for image in images if not image.endswith("-00000.png"))}


def test_the_manifest_has_every_sample_once_and_in_order(tmp_path):
    run(tmp_path / "job")
    records = list(read_manifest(tmp_path / "job" / "manifest.jsonl"))
    assert [record.sample for record in records] == [RANKED.sample(i) for i in range(6)]
    assert [record.kept for record in records] == [False, True, True] * 2
    for record in records:
        chunk = drawn(RANKED, RANKED.place_of(record.sample)[0])
        stored = load_file(tmp_path / "job" / record.tokens)
        assert torch.equal(stored["tokens"][record.row].long(), chunk.tokens[record.row])
        assert stored["scores"][record.row] == record.score == chunk.scores[record.row]
        assert record.backend == BACKEND and record.settings == RANKED.settings
        if record.kept:
            picture = torch.frombuffer(
                bytearray(Image.open(tmp_path / "job" / record.image).tobytes()), dtype=torch.uint8
            )
            assert torch.equal(picture.view(4, 4, 3).permute(2, 0, 1), decode(chunk.tokens)[record.row])


def test_pages_show_the_best_first(tmp_path):
    run(tmp_path / "job")
    page = (tmp_path / "job" / "galleries" / "000001.html").read_text()
    assert re.findall(r"<figure id=\"(.*?)\"", page) == ["000001-00001", "000001-00002"]
    index = (tmp_path / "job" / "index.html").read_text()
    assert re.findall(r"src=\"(.*?)\"", index) == [
        f"images/{p:06d}-{s:05d}.png" for p in range(2) for s in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_pictures_say_what_they_are_of(prompt, tmp_path):
    config = job_config(prompts=(prompt,), rank="module:function", keep=1)
    run(tmp_path / "job", config)
    (path,) = (tmp_path / "job" / "images").iterdir()
    assert path.name == "000000-00001.png"
    with Image.open(path) as picture:
        assert picture.text.pop("settings") == json.dumps(config.settings)
        score = float(drawn(config, 0).scores[1])
        assert picture.text == {"prompt": prompt, "seed": "8", "score": repr(score), "model_hash": "0" * 64}
    with JobFolder.open(tmp_path / "job", config) as folder:
        assert folder.finished_prompts() == 1


def test_pictures_of_one_channel(tmp_path):
    with JobFolder.open(tmp_path / "job", PLAIN) as folder:
        folder.write_image(PLAIN.sample(0), torch.arange(16, dtype=torch.uint8).view(1, 4, 4), None)
    with Image.open(tmp_path / "job" / "images" / "000000-00000.png") as picture:
        assert picture.mode == "L" and list(picture.tobytes()) == list(range(16)) and "score" not in picture.text


@pytest.mark.parametrize(("most", "dtype"), [(511, "I16"), (32767, "I16"), (32768, "I32"), (2**31 - 1, "I32")])
def test_codes_are_stored_in_as_few_bits_as_fit(most, dtype, tmp_path):
    tokens = torch.tensor([[0, most, 3], [4, 5, most]])
    with JobFolder.open(tmp_path / "job", PLAIN) as folder:
        folder.commit(DrawnChunk(1, tokens, None, None, BACKEND))
        assert torch.equal(folder.read(1).tokens, tokens) and folder.read(1).tokens.dtype == torch.int64
        assert folder.read(1).scores is None and folder.read(1).backend == BACKEND
        assert folder.chunks_done() == {1}
    with safe_open(tmp_path / "job" / "tokens-000001.safetensors", "pt") as file:
        assert file.get_slice("tokens").get_dtype() == dtype


@pytest.mark.parametrize("config", [RANKED, PLAIN], ids=["ranked", "plain"])
def test_files_do_not_depend_on_the_order_in_which_chunks_come(config, undisturbed, tmp_path):
    run(tmp_path / "backwards", config, order=lambda missing: sorted(missing, reverse=True))
    assert contents(tmp_path / "backwards") == undisturbed[config]


def test_a_finished_job_is_left_as_it_is(undisturbed, tmp_path):
    for _ in range(2):
        run(tmp_path / "job")
    assert contents(tmp_path / "job") == undisturbed[RANKED]


def test_a_picture_that_is_not_kept_goes(undisturbed, tmp_path):
    """Such as one of a chunk that broke, and was drawn again on another machine."""
    with JobFolder.open(tmp_path / "job", RANKED) as folder:
        folder.write_image(RANKED.sample(0), drawn(RANKED, 0).pixels[0], 0.9)
    run(tmp_path / "job")
    assert contents(tmp_path / "job") == undisturbed[RANKED]


# --- who may write, and where


def test_one_process_writes(tmp_path):
    with JobFolder.open(tmp_path / "job", PLAIN):
        for shard in (None, (0, 2)):
            with pytest.raises(RuntimeError, match="must be written by one process at a time"):
                JobFolder.open(tmp_path / "job", PLAIN, shard=shard)
    JobFolder.open(tmp_path / "job", PLAIN).close()


def test_shards_write_side_by_side(undisturbed, tmp_path):
    out = tmp_path / "job"
    with JobFolder.open(out, PLAIN, shard=(0, 2)), JobFolder.open(out, PLAIN, shard=(1, 2)):
        with pytest.raises(RuntimeError, match="another one"):
            JobFolder.open(out, PLAIN, shard=(1, 2))
        with pytest.raises(RuntimeError, match="another one"):
            JobFolder.open(out, PLAIN)
    for i in range(2):
        run(out, PLAIN, shard=(i, 2))
        assert sorted(contents(out)) == [
            "config.yaml",
            *(f"tokens-{k:06d}.safetensors" for k in ((0, 2), (0, 1, 2))[i]),
        ]
    run(out, PLAIN, order=lambda missing: pytest.fail("nothing is left to draw") if missing else [])
    assert contents(out) == undisturbed[PLAIN]


def test_a_shard_leaves_the_temporary_files_of_others_alone(tmp_path):
    out = tmp_path / "job"
    with JobFolder.open(out, PLAIN, shard=(0, 2)):
        for name in (".tmp-0-of-2-a", ".tmp-0-of-20-a", ".tmp-1-of-2-a", ".tmp-a"):
            (out / name).touch()
        JobFolder.open(out, PLAIN, shard=(1, 2)).close()
        assert {p.name for p in out.glob(".tmp-*")} == {".tmp-0-of-2-a", ".tmp-0-of-20-a", ".tmp-a"}
    (out / "images").mkdir()
    (out / "images" / ".tmp-b").touch()
    JobFolder.open(out, PLAIN).close()
    assert not list(out.rglob(".tmp-*"))


def test_another_job_is_refused_by_what_differs(undisturbed, tmp_path):
    run(tmp_path / "job")
    other = job_config(rank="module:function", keep=2, seed=8, temperature=1.0)
    with pytest.raises(ValueError, match=r"must hold this job, got one that differs in seed, temperature\."):
        JobFolder.open(tmp_path / "job", other)
    assert contents(tmp_path / "job") == undisturbed[RANKED]
    JobFolder.open(tmp_path / "job", RANKED).close()  # the refused one holds no lock


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"must be new, empty or the folder of a job, got one that holds 'letter.txt'"):
        JobFolder.open(tmp_path, PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError) as error:
            JobFolder.open(path, PLAIN)
        assert error.value.filename is not None and "file" in str(error.value.filename)


@pytest.mark.parametrize("text", ["", "a: [", "a: 1", "\xff", "prompts: 7"])
def test_a_config_that_is_none_is_told(text, tmp_path):
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, TypeError), match=r"sample: .*config\.yaml must"):
        JobFolder.open(tmp_path, PLAIN)
    assert JobFolder.stored_config(tmp_path / "none") is None


def test_the_config_comes_back(tmp_path):
    config = job_config(prompts=HOSTILE, top_p=0.5, truncate=True)
    run(tmp_path / "job", config)
    assert JobFolder.stored_config(tmp_path / "job") == config


def test_known_codes_are_kept(tmp_path):
    known = torch.tensor([3, -1, 40000, -1])
    config = job_config(known_hash=hash_codes(known))
    JobFolder.open(tmp_path / "job", config, known=known).close()
    assert JobFolder.stored_known(tmp_path / "job").tolist() == known.tolist()
    assert JobFolder.stored_known(tmp_path) is None
    (tmp_path / "job" / "known.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"known\.safetensors must be whole"):
        JobFolder.stored_known(tmp_path / "job")
    JobFolder.open(tmp_path / "job", config, known=known).close()
    assert JobFolder.stored_known(tmp_path / "job").tolist() == known.tolist()


# --- files that are not whole


def test_a_manifest_cut_anywhere_goes_on_to_the_same_bytes(undisturbed, tmp_path):
    run(tmp_path / "job", SMALL)
    path = tmp_path / "job" / "manifest.jsonl"
    whole = path.read_bytes()
    ends = [0, whole.index(b'{"index": 2'), len(whole)]  # of whole prompts
    with JobFolder.open(tmp_path / "job", SMALL) as folder:
        for cut in range(len(whole) + 1):
            path.write_bytes(whole[:cut])
            finished = folder.finished_prompts()
            assert ends[finished] <= cut and (finished == 2 or cut < ends[finished + 1])
            assert path.read_bytes() == whole[: ends[finished]]
    for end in ends:  # all that is left of any cut
        path.write_bytes(whole[:end])
        run(tmp_path / "job", SMALL)
        assert contents(tmp_path / "job") == undisturbed[SMALL]


def test_what_a_power_loss_leaves_behind_the_last_line_is_cut_off(undisturbed, tmp_path):
    for torn in (b"\0" * 4096, b'{"index": 6}\n', b"\n", b"\xff"):
        out = tmp_path / str(torn[0])
        run(out)
        with open(out / "manifest.jsonl", "ab") as file:
            file.write(torn)
        run(out)
        assert contents(out) == undisturbed[RANKED]


def test_a_manifest_of_another_job_or_corrupt_is_refused_with_its_line(undisturbed, tmp_path):
    run(tmp_path / "job")
    path = tmp_path / "job" / "manifest.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    corrupt = {
        "corrupt": ("line 2, must be a record", [lines[0], lines[1][:40] + "\n", *lines[2:]]),
        "twice": ("line 4, must be sample 3 of the job, got index 2", [*lines[:3], lines[2], *lines[4:]]),
        "too many": ("line 7, must be sample 6", lines + lines[:3]),
        "prompt": ("line 1, must be sample 0", [line.replace("red apple", "red pear") for line in lines]),
        "seed": ("line 1, must be sample 0", [lines[0].replace('"seed": 7', '"seed": 70'), *lines[1:]]),
    }
    for expected, changed in corrupt.values():
        path.write_text("".join(changed))
        with pytest.raises(ValueError, match=re.escape(f"sample: {path}, {expected}")):
            run(tmp_path / "job")
        assert path.read_text() == "".join(changed), "it is for the user to say that it may go"
    path.unlink()
    run(tmp_path / "job")
    assert contents(tmp_path / "job") == undisturbed[RANKED]


def test_a_chunk_cut_anywhere_is_put_aside_and_drawn_again(undisturbed, tmp_path, caplog):
    run(tmp_path / "job")
    path = tmp_path / "job" / "tokens-000001.safetensors"
    whole = path.read_bytes()
    with JobFolder.open(tmp_path / "job", RANKED) as folder, caplog.at_level(logging.WARNING):
        for cut in range(len(whole)):
            path.write_bytes(whole[:cut])
            assert folder.chunks_done() == {0, 2}
            assert not path.exists()
        assert path.with_name("tokens-000001.safetensors.broken").read_bytes() == whole[:-1]
        assert len(caplog.records) == len(whole)
        said = caplog.records[-1].getMessage()
        assert said.startswith(f"sample: {path} must be whole") and "drawn again" in said
    run(tmp_path / "job")
    path.with_name("tokens-000001.safetensors.broken").unlink()
    assert contents(tmp_path / "job") == undisturbed[RANKED]


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"tokens": torch.zeros(3, 16), "scores": torch.zeros(3)}, {"backend": "x"}),
        ({"tokens": torch.zeros(2), "scores": torch.zeros(2)}, {"backend": "x"}),
        ({"tokens": torch.zeros(2, 16)}, {"backend": "x"}),
        ({"scores": torch.zeros(2)}, {"backend": "x"}),
        ({"tokens": torch.zeros(2, 16), "scores": torch.zeros(3)}, {"backend": "x"}),
        ({"tokens": torch.zeros(2, 16), "scores": torch.zeros(2)}, None),
    ],
)
def test_a_chunk_of_something_else_is_put_aside(tensors, metadata, tmp_path, caplog):
    with JobFolder.open(tmp_path / "job", RANKED) as folder:
        save_file(tensors, tmp_path / "job" / "tokens-000001.safetensors", metadata=metadata)
        assert folder.chunks_done() == set() and len(caplog.records) == 1
        assert (tmp_path / "job" / "tokens-000001.safetensors.broken").exists()


def test_files_of_other_names_are_no_chunks(tmp_path):
    with JobFolder.open(tmp_path / "job", PLAIN) as folder:
        for name in ("tokens-1.safetensors", "tokens-000009.safetensors", "tokens-000001.safetensors.broken"):
            (tmp_path / "job" / name).write_bytes(b"x")
        assert folder.chunks_done() == set()
        assert len(list((tmp_path / "job").glob("tokens-*"))) == 3


def test_a_picture_that_is_not_whole_counts_as_none(tmp_path):
    sample = PLAIN.sample(0)
    with JobFolder.open(tmp_path / "job", PLAIN) as folder:
        assert not folder.has_image(sample)
        folder.write_image(sample, drawn(PLAIN, 0).pixels[0], None)
        assert folder.has_image(sample)
        path = tmp_path / "job" / "images" / "000000-00000.png"
        whole = path.read_bytes()
        for cut in range(len(whole)):
            path.write_bytes(whole[:cut])
            assert not folder.has_image(sample)


def test_prompts_are_finished_in_order_and_with_their_pictures(tmp_path):
    pairs = [(sample, None) for sample in PLAIN.samples_of_prompt(1)]
    with JobFolder.open(tmp_path / "job", PLAIN) as folder:
        with pytest.raises(ValueError, match="prompt_index must be 0, got 1"):
            folder.finish_prompt(1, pairs, pairs, lambda sample: BACKEND)
        with pytest.raises(ValueError, match="got none of 000001-00000"):
            folder.finish_prompt(0, pairs, pairs, lambda sample: BACKEND)
        folder.write_index()  # of nothing
        assert not (tmp_path / "job" / "index.html").exists()


# --- failures at every step


def steps_of(folder, config, monkeypatch) -> int:
    """How many steps an undisturbed run takes."""
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, folder.parent)
        run(folder, config)
    return disk.steps


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_step_says_what_is_safe_and_goes_on(code, undisturbed, tmp_path, monkeypatch):
    steps = steps_of(tmp_path / "counted", RANKED, monkeypatch)
    assert steps > 60
    for at in range(1, steps + 1, 1 if code == errno.ENOSPC else 7):
        out, safe = tmp_path / str(at), []
        with monkeypatch.context() as patch:
            FailingDisk(patch, tmp_path, at, OSError(code, os.strerror(code)))
            with pytest.raises(OutOfSpace) as error:
                run(out, on_chunk=lambda chunk, safe=safe: safe.append(len(chunk.tokens)))
        said = str(error.value)
        assert said.startswith(f"sample: {out} must have room for what is drawn, got {os.strerror(code)!r}. ")
        found = int(re.search(r"(\d) of 6 samples are safe there; make room", said)[1])
        assert sum(safe) <= found <= sum(safe) + 2
        assert not list(out.rglob(".tmp-*")), "what cannot be used takes no room"
        run(out)
        assert contents(out) == undisturbed[RANKED]
        shutil.rmtree(out)


def test_other_errors_of_the_disk_are_what_they_are(tmp_path, monkeypatch):
    FailingDisk(monkeypatch, tmp_path, 12, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken") as error:
        run(tmp_path / "job")
    assert not isinstance(error.value, OutOfSpace)


def test_a_kill_or_power_loss_at_any_step_loses_nothing(undisturbed, tmp_path, monkeypatch):
    steps = steps_of(tmp_path / "counted" / "job", SMALL, monkeypatch)
    for at in range(1, steps + 2):
        work, committed = tmp_path / str(at), set()
        before = work / "before" / "job"
        before.parent.mkdir(parents=True)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, before.parent, at, Killed())
            with contextlib.suppress(Killed):
                run(before, SMALL, on_chunk=lambda chunk, committed=committed: committed.add(chunk.chunk))
        disk.after_kill(work / "killed")
        disk.after_power_loss(work / "contents lost", names=True)
        disk.after_power_loss(work / "names lost", names=False)
        for after in ("killed", "contents lost", "names lost"):
            if committed:
                with JobFolder.open(work / after / "job", SMALL) as folder:
                    assert committed <= folder.chunks_done()
            run(work / after / "job", SMALL)
            assert contents(work / after / "job") == undisturbed[SMALL]
        shutil.rmtree(work)


def test_a_prompt_that_is_finished_stays_so_without_power(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, tmp_path)
        with JobFolder.open(folder, PLAIN) as opened:
            pairs = [(sample, None) for sample in PLAIN.samples_of_prompt(0)]
            for row, (sample, _) in enumerate(pairs):
                opened.write_image(sample, decode(torch.arange(48).view(3, 16) % 30)[row], None)
            opened.finish_prompt(0, pairs, pairs, lambda sample: BACKEND)
        expected = contents(folder)
        disk.after_power_loss(tmp_path / "after", names=False)
    assert contents(tmp_path / "after" / "job") == expected
    assert isinstance(JobFolder.stored_config(tmp_path / "after" / "job"), JobConfig)
