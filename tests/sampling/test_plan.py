"""The plan of a drawing: its bytes are those the engine takes, its micro-batches fit, it says what does not."""

import pytest
import torch
from small_models import prompts, small_dalle

from dalle_fast import _extension
from dalle_fast.sampling import plan as planning
from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.cpu_caches import Texts
from dalle_fast.sampling.packed import packed
from dalle_fast.sampling.plan import plan_drawing

pytestmark = pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("primed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_bytes_are_those_the_engine_takes(dtype, primed, cond_scale):
    model = small_dalle(torch.float32)
    text = model.padded_text(prompts(3).repeat_interleave(2, dim=0))
    plan = plan_drawing(model, 6, prompts=3, cond_scale=cond_scale, weight_dtype=dtype, primed=primed)
    engine = CpuEngine(model, cond_scale=cond_scale, weight_dtype=dtype)
    engine.prefill(text, torch.zeros(6, 9, dtype=torch.long) if primed else None)
    # tensors of all samples are rounded up to cache lines together, those of one sample alone
    assert 0 <= plan.text_bytes + 6 * plan.sample_bytes - engine.nbytes < 6 * 2 * 64 * 4 * 4
    assert plan.weight_bytes == packed(model, dtype).nbytes
    assert plan.micro_batches == (6,)


def test_micro_batches_cover_the_batch_evenly_within_the_memory():
    model = small_dalle(torch.float32)
    assert plan_drawing(model, 64).micro_batches == (64,)
    assert plan_drawing(model, 130).micro_batches == (44, 43, 43)
    one = plan_drawing(model, 1).total_bytes
    for spare in (0, 1, 5, 40):
        budget = one + spare * 100_000
        plan = plan_drawing(model, 50, prompts=50, max_memory=budget)
        assert sum(plan.micro_batches) == 50
        assert plan.total_bytes <= budget == plan.max_memory
        assert max(plan.micro_batches) - min(plan.micro_batches) <= 1
    assert plan_drawing(model, 3, max_memory=one).micro_batches == (1, 1, 1)


def test_a_plan_prints_as_a_table():
    model = small_dalle(torch.float32)
    plan = plan_drawing(model, 100, max_memory=1 << 30)
    head, *rows = str(plan).splitlines()
    assert head == "100 samples in 2 micro-batches of at most 50"
    assert [row.split("  ")[1] for row in rows] == [
        "weights", "texts", "50 samples", "workspace", "together", "there is",
    ]  # fmt: skip
    assert rows[-1].endswith(" 1024.0 MiB")


def test_too_little_memory_is_refused_in_words(monkeypatch):
    model = small_dalle(torch.float32)
    with pytest.raises(ValueError, match="max_memory, 0 MiB, must hold weights, a text and one sample, 1 MiB together"):
        model.generate_images(prompts(1), max_memory=1000)
    monkeypatch.setattr(planning, "_available_memory", lambda: 2000)
    with pytest.raises(MemoryError, match="the memory available now, 0 MiB, must hold weights"):
        model.generate_images(prompts(1))
    monkeypatch.setattr(planning, "_available_memory", lambda: None)
    assert plan_drawing(model, 512).micro_batches == (64,) * 8
    assert "there is" not in str(plan_drawing(model))


def test_available_memory_is_less_than_the_machine_has():
    available = planning._available_memory()
    assert available is None or 1 << 20 < available < 1 << 50


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be an int of at least 1"),
        ({"prompts": 1.5}, ValueError, "prompts must be an int"),
        ({"weight_dtype": torch.float16}, ValueError, "weight_dtype must be None or one of torch.float32"),
        ({"max_memory": 0}, ValueError, "max_memory must be a number of bytes"),
    ],
)
def test_bad_plans_are_refused_in_words(settings, error, message):
    with pytest.raises(error, match=message):
        plan_drawing(small_dalle(torch.float32), **settings)


def test_a_model_the_engine_cannot_run_has_no_plan():
    with pytest.raises(NotImplementedError, match="is float64"):
        plan_drawing(small_dalle())


def test_every_micro_batch_reports_its_rows():
    """With -1 for the samples of the others; together they are the codes."""
    model, text = small_dalle(torch.float32), prompts(3).repeat(2, 1)
    reports = []
    settings = {"seed": 5, "return_tokens": True}
    budget = plan_drawing(model, 2, prompts=2, max_memory=1 << 30).total_bytes
    codes = model.generate_images(
        text, max_memory=budget, on_tokens=lambda start, some: reports.append((start, some)), **settings
    )[1]
    assert torch.equal(codes, model.generate_images(text, **settings)[1])
    assert [start for start, _ in reports] == 3 * list(range(0, 64, 8))
    told = torch.full((6, 64), -1)
    for start, some in reports:
        assert bool((told[:, start : start + 8][some[:, 0] >= 0] == -1).all())
        told[:, start : start + 8] = torch.maximum(told[:, start : start + 8], some)
    assert torch.equal(told, codes)


def test_a_prompt_that_spans_micro_batches_is_read_once(monkeypatch):
    model = small_dalle(torch.float32)
    read = []
    original = Texts.read

    def count(self, first, tokens, start, **options):
        read.append(len(tokens))
        return original(self, first, tokens, start, **options)

    monkeypatch.setattr(Texts, "read", count)
    text = prompts(3)[[0, 0, 0, 0, 1, 1, 2, 2, 2]]
    for cond_scale, guided in ((1.0, 0), (2.0, 1), (2.0, 0)):  # the empty prompt: once a model
        read.clear()
        budget = plan_drawing(model, 2, prompts=2, cond_scale=cond_scale, max_memory=1 << 30).total_bytes
        model.generate_images(text, seed=0, cond_scale=cond_scale, max_memory=budget)
        assert sum(read) == 3 + guided
