"""Chunks and streams: the pictures of generate_images, in any chunk; everything is checked first; memory is kept to."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import saved_model

from dalle_fast import _extension
from dalle_fast.jobs import stream
from dalle_fast.jobs.drawing_model import DrawingModel
from dalle_fast.jobs.job import JobConfig, hash_codes, hash_model
from dalle_fast.jobs.stream import Drawer, backend_name, memory_for_engine, stream_images
from dalle_fast.sampling.gallery import to_pil, to_pixels
from dalle_fast.sampling.plan import plan_drawing

ENGINES = ["eager"] if _extension.missing() else ["cpu", "eager"]
needs_cpu = pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))
needs_proc = pytest.mark.skipif(not stream._STATUS.is_file(), reason="the system does not say what a process takes")
MIB = 1 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def model(saved):
    return DrawingModel.read(saved)


def config(**changes) -> JobConfig:
    settings = {
        "prompts": ("red apple", "a flag", "Red apple"),
        "model": "a model",
        "model_hash": "0" * 64,
        "images_per_prompt": 5,
        "seed": 7,
        "batch_size": 4,
        "device": "cpu",
        "dtype": "float32",
        "engine": ENGINES[0],
        "temperature": 1.0,
        "cond_scale": 1.0,
    }
    return JobConfig(**settings | changes)


def drawn(model, job, **options):
    """Tokens, pixels and scores of all samples."""
    drawer = Drawer(job, known=options.pop("known", None), model=model, **options)
    chunks = [drawer.draw(chunk) for chunk in range(job.n_chunks)]
    for number, chunk in enumerate(chunks):
        assert chunk.chunk == number and chunk.backend == backend_name(job.engine, job.device, job.dtype)
        assert torch.equal(drawer.decode(chunk.tokens), chunk.pixels)
        assert chunk.tokens.dtype == torch.int64 and chunk.pixels.dtype == torch.uint8
    scores = None if chunks[0].scores is None else torch.cat([chunk.scores for chunk in chunks])
    return torch.cat([chunk.tokens for chunk in chunks]), torch.cat([chunk.pixels for chunk in chunks]), scores


def redness(prompts, images):
    assert images.dtype == torch.float32 and 0 <= float(images.min()) <= float(images.max()) <= 1
    assert len(prompts) == len(images)
    return images[:, 0].mean(dim=(1, 2))


# --- chunks


SETTINGS = [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.4}, {"filter_thres": 0.9}, {"cond_scale": 2.5}]


@pytest.mark.parametrize(
    ("engine", "settings"),
    [*((engine, {}) for engine in ENGINES), *((ENGINES[0], settings) for settings in SETTINGS)],
    ids=str,
)
def test_a_job_draws_what_generate_images_does(model, engine, settings):
    job = config(engine=engine, batch_size=15, **settings)
    samples = job.samples_of(0)
    images, expected = model.dalle.generate_images(
        model.token_ids([sample.prompt for sample in samples], False),
        seed=[sample.seed for sample in samples],
        engine=engine,
        return_tokens=True,
        **settings,
    )
    tokens, pixels, scores = drawn(model, job)
    assert torch.equal(tokens, expected) and scores is None
    for levels, image in zip(pixels, to_pixels(model.dalle.vae, images), strict=True):
        assert to_pil(levels / 255).tobytes() == to_pil(image).tobytes()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_change_what_is_drawn(model, settings):
    assert not torch.equal(drawn(model, config(**settings))[0], drawn(model, config())[0])


@needs_cpu
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_chunks_change_no_bit_on_the_cpu_engine(model, batch_size):
    whole = drawn(model, config(batch_size=15), ranker=redness)
    for part, expected in zip(drawn(model, config(batch_size=batch_size), ranker=redness), whole, strict=True):
        assert torch.equal(part, expected)


def test_no_picture_is_drawn_twice(model):
    tokens = drawn(model, config(prompts=("a flag", "a flag", "a flag")))[0]
    assert len({tuple(row) for row in tokens.tolist()}) == 15


def test_a_ranker_sees_prompts_and_pictures(model):
    seen = []

    def ranker(prompts, images):
        seen.append(prompts)
        return redness(prompts, images)

    job = config()
    tokens, _, scores = drawn(model, job, ranker=ranker)
    assert scores.dtype == torch.float32
    assert seen[1:] == [
        [sample.prompt for sample in job.samples_of(chunk)] for chunk in range(4)
    ]  # the first is a check
    with torch.no_grad():
        assert torch.equal(scores, redness(tokens, to_pixels(model.dalle.vae, model.dalle.vae.decode(tokens))))
    named = drawn(model, config(rank=f"{__name__}:redness"))
    assert torch.equal(named[2], scores)


def test_known_codes_stay(model):
    known = torch.full((64,), -1)
    known[:20], known[40:44] = 3, 5
    tokens = drawn(model, config(known_hash=hash_codes(known)), known=known)[0]
    assert (tokens[:, known >= 0] == known[known >= 0]).all()
    assert tokens[:, known < 0].unique().numel() > 5


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@needs_cpu
def test_other_dtypes_are_those_of_generate_images(saved, dtype):
    model, job = DrawingModel.read(saved, dtype=dtype), config(dtype=dtype, batch_size=15)
    samples = job.samples_of(0)
    expected = model.dalle.generate_images(
        model.token_ids([sample.prompt for sample in samples], False),
        seed=[sample.seed for sample in samples],
        weight_dtype=torch.int8 if dtype == "int8" else torch.bfloat16,
        return_tokens=True,
    )[1]
    assert torch.equal(drawn(model, job)[0], expected)


def test_rows_are_told_while_they_are_drawn(model):
    rows = []
    Drawer(config(), known=None, model=model).draw(1, lambda first, codes: rows.append((first, list(codes.shape))))
    assert rows == [(first, [4, 8]) for first in range(0, 64, 8)]


def test_the_model_of_a_job_is_read_and_no_other(saved, model):
    job = config(model=str(saved), model_hash=hash_model(saved))
    assert torch.equal(Drawer(job, known=None).draw(0).tokens, Drawer(job, known=None, model=model).draw(0).tokens)
    with pytest.raises(ValueError, match=f"the model in {saved} must be the job's, with hash 000000000000, got"):
        Drawer(config(model=str(saved)), known=None)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"temperature": -1.0}, {}, ValueError, "temperature"),
        ({"top_k": 0}, {}, ValueError, "top_k"),
        ({"top_p": 2.0}, {}, ValueError, "top_p"),
        ({"cond_scale": float("nan")}, {}, ValueError, "cond_scale"),
        ({"engine": "gpu"}, {}, ValueError, "engine must be"),
        ({"engine": "eager"}, {"max_memory": 1 << 40}, NotImplementedError, "keeps to no max_memory"),
        ({}, {"known": torch.zeros(63, dtype=torch.long)}, ValueError, r"known must be integers \[64\]"),
        ({}, {"known": torch.zeros(64)}, ValueError, r"known must be integers \[64\], got torch.float32 \[64\]"),
        ({}, {"known": torch.full((64,), 30)}, ValueError, r"known must be -1 or codes in 0..29, got 30..30"),
        ({}, {"ranker": lambda prompts, images: images}, ValueError, "must give one finite number a picture"),
        ({"rank": "no such"}, {}, ValueError, "rank must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(model, changes, options, error, message):
    with pytest.raises(error, match=message):
        Drawer(config(**changes), **{"known": None, **options}, model=model)


# --- streams


def test_a_stream_has_the_pictures_of_a_job(model):
    tokens, pixels, scores = drawn(model, config(engine=ENGINES[0]), ranker=redness)
    images = stream_images(
        model, ["red apple", "a flag", "Red apple"], images_per_prompt=5, seed=7, batch_size=4, ranker=redness
    )
    images = list(images)
    assert [image.sample for image in images] == [config().sample(i) for i in range(15)]
    for i, image in enumerate(images):
        assert torch.equal(image.tokens, tokens[i]) and torch.equal(image.pixels, pixels[i])
        assert image.score == float(scores[i])
        assert image.pixels.untyped_storage().nbytes() == image.pixels.nbytes
    assert next(stream_images(model, ["a flag"])).score is None


def test_a_stream_draws_no_further_than_it_is_asked_for(model, monkeypatch):
    chunks = []
    draw = Drawer.draw
    monkeypatch.setattr(Drawer, "draw", lambda self, chunk: chunks.append(chunk) or draw(self, chunk))
    images = stream_images(model, ["red apple"], images_per_prompt=9, batch_size=3)
    assert chunks == []
    for _ in range(4):
        next(images)
    assert chunks == [0, 1]


def test_a_stream_keeps_to_the_model_s_settings_unless_told_otherwise(saved, tmp_path):
    other = saved_model(tmp_path / "other")
    (other / "sampling.json").write_text('{"temperature": 0}')
    model = DrawingModel.read(other)
    one, two = (next(stream_images(model, ["red apple"], seed=seed)) for seed in (0, 1))
    assert torch.equal(one.tokens, two.tokens)
    warm = next(stream_images(model, ["red apple"], temperature=1.0))
    assert torch.equal(warm.tokens, next(stream_images(DrawingModel.read(saved), ["red apple"])).tokens)


LONG = "red apple a flag green red"


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("red apple", {}, TypeError, "prompts must be a list of texts, got 'red apple'"),
        (["a flag", 3], {}, TypeError, "prompts must be a list of texts"),
        ([], {}, ValueError, "prompts must be at least one text, got none"),
        (["a flag", " "], {}, ValueError, "got an empty one as number 2"),
        (["a flag", LONG], {}, ValueError, "prompt 2 must have at most 5 tokens, got 6"),
        (["a flag"], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (["a flag"], {"images_per_prompt": 0}, ValueError, "images_per_prompt must be at least 1, got 0"),
        (["a flag"], {"seed": 2**64}, ValueError, "seed must be in"),
        (["a flag"], {"top_p": -1.0}, ValueError, "top_p"),
        (["a flag"], {"engine": "fast"}, ValueError, "engine must be 'auto' or one of"),
        (["a flag"], {"ranker": lambda prompts, images: [1.0, 2.0]}, ValueError, r"finite number a picture, \[1\]"),
        (["a flag"], {"max_memory": 0}, ValueError, "max_memory must be"),
    ],
)
def test_a_stream_refuses_at_the_call(model, prompts, options, error, message):
    with pytest.raises(error, match=message):
        stream_images(model, prompts, **options)


def test_a_long_prompt_is_cut_where_it_may_be(model):
    cut = next(stream_images(model, [LONG], truncate=True))
    assert torch.equal(cut.tokens, next(stream_images(model, ["red apple a flag green"])).tokens)


# --- what bits depend on


@needs_cpu
def test_the_backend_names_instruction_set_dtype_and_versions(isa):
    name = backend_name("cpu", "cpu", "bfloat16")
    assert name.startswith(f"cpu engine, {isa}, bfloat16, dalle_fast ") and name.endswith(f"torch {torch.__version__}")


def test_the_backend_of_eager_names_torch_s_own():
    name = backend_name("eager", "cpu", "float32")
    assert name.startswith("eager engine, cpu ") and f"{torch.get_num_threads()} threads, float32" in name


# --- memory


@needs_cpu
@needs_proc
def test_the_engine_gets_what_is_left(model):
    plenty = 1 << 40
    left = memory_for_engine(plenty, model, 4)
    assert 50 * MIB < plenty - left < 100 * 1024 * MIB
    assert memory_for_engine(plenty, model, 1000) < left - 900 * 4 * 3 * 16 * 16
    job = config()
    assert torch.equal(drawn(model, job, max_memory=plenty)[0], drawn(model, job)[0])


@needs_cpu
@needs_proc
def test_too_little_memory_is_told_with_its_parts(model):
    least = (1 << 40) - memory_for_engine(1 << 40, model, 4) + plan_drawing(model.dalle, 1, primed=True).total_bytes
    parts = r"\d+ the process and its model, \d+ the pictures of a batch of 4, and \d+ the engine with one sample"
    with pytest.raises(ValueError, match=rf"max_memory must be at least \d+ MiB, got 9 MiB: {parts}"):
        Drawer(config(), known=None, model=model, max_memory=9 * MIB)
    Drawer(config(), known=None, model=model, max_memory=least + 8 * MIB).draw(0)


@needs_cpu
def test_a_system_that_does_not_say_what_a_process_takes_is_told_so(model, monkeypatch, tmp_path):
    monkeypatch.setattr(stream, "_STATUS", tmp_path / "status")
    with pytest.raises(RuntimeError, match="max_memory needs a system that says what a process takes"):
        Drawer(config(), known=None, model=model, max_memory=1 << 40)


WITHIN_MEMORY = """if True:
    import dataclasses, sys, torch
    from pathlib import Path
    from dalle_fast import DALLE, DiscreteVAE
    from dalle_fast.jobs import stream
    from dalle_fast.jobs.drawing_model import DrawingModel
    from dalle_fast.sampling.plan import plan_drawing

    # 8 MB a sample, hardly any weights
    vae = DiscreteVAE(image_size=64, num_tokens=30, codebook_dim=8, num_layers=1, hidden_dim=8)
    sizes = dict(dim=16, num_text_tokens=20, text_seq_len=5, depth=2, heads=8, dim_head=64, attn_types="full")
    model = dataclasses.replace(DrawingModel.read(Path(sys.argv[1])), dalle=DALLE(vae=vae, **sizes).eval())
    known = torch.zeros(1024, dtype=torch.long)
    known[-32:] = -1  # one row to draw: caches are as large as for all of them

    def pictures(max_memory):
        return stream.stream_images(
            model, ["red apple"], images_per_prompt=8, batch_size=8, known=known, max_memory=max_memory
        )

    def peak(max_memory):
        list(pictures(max_memory))
        return stream._peak_bytes()

    most = 1 << 40
    pictures(most)  # what it imports and loads counts
    limit = most - stream.memory_for_engine(most, model, 8)
    limit += plan_drawing(model.dalle, 1, primed=True).total_bytes + (4 << 20)
    print(limit, peak(limit), peak(None))
"""


@needs_cpu
@needs_proc
def test_a_process_keeps_to_its_memory(saved):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WITHIN_MEMORY, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    limit, within, without = map(int, done.stdout.split())
    assert within <= limit < without
