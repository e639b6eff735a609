"""Batch invariance of the C++ engine: the bits of a prompt and a seed, whatever is computed beside them."""

import pytest
import torch
from cpu_engine_cases import drawn, random_codes, stepped, text_of
from implementations import skip_without
from small_models import prompts, small_dalle

from dalle_fast.sampling.cpu import CpuEngine
from dalle_fast.sampling.plan import plan_drawing

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
GUIDED = [(torch.float32, 2.5), (torch.bfloat16, 1.0), (torch.int8, 2.5)]
SEEDS = [7, 2**64 - 1, 7, 3, 12, 0, 2**63, 5, 99, 7]


@pytest.fixture(autouse=True)
def with_extension():
    skip_without("cpu", "choose_token")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def batch_of_prompts():
    """Ten, of four prompts: samples of one stand apart."""
    return prompts(4)[torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 0, 0])]


@pytest.mark.parametrize(("dtype", "cond_scale"), GUIDED)
def test_tokens_alone_in_batches_shuffled_and_in_micro_batches(isa, threads, dtype, cond_scale):
    sizes = {"dim": 40, "heads": 3, "dim_head": 10, "depth": 2, "attn_types": ("axial_row", "conv_like")}
    model, text = small_dalle(torch.float32, **sizes), batch_of_prompts()
    settings = {"weight_dtype": dtype, "cond_scale": cond_scale, "top_p": 0.97}
    threads(1)
    together = drawn(model, text, seed=SEEDS, **settings)
    assert len(together.unique(dim=0)) > 7  # equal only where prompt and seed are
    for i in (3, 9):
        assert torch.equal(drawn(model, text[i : i + 1], seed=[SEEDS[i]], **settings)[0], together[i])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for n_threads, some in ((2, order), (4, order[:5])):
        threads(n_threads)
        codes = drawn(model, text[some], seed=[SEEDS[i] for i in some], **settings)
        assert torch.equal(codes, together[some])
    sizes = {"prompts": 4, "cond_scale": cond_scale, "weight_dtype": dtype}
    one = plan_drawing(model, 1, **sizes).total_bytes
    step = plan_drawing(model, 1, **sizes).sample_bytes
    room = one + 4 * step
    assert len(plan_drawing(model, 10, **sizes, max_memory=room).micro_batches) > 1
    assert torch.equal(drawn(model, text, seed=SEEDS, max_memory=room, **settings), together)


@pytest.mark.parametrize(("dtype", "cond_scale"), GUIDED)
def test_logits_of_any_batch_threads_and_steps(isa, threads, dtype, cond_scale):
    """Of rows alone, in the batch, among fewer of their prompt, many at a time: one order of sums."""
    model = small_dalle(torch.float32)
    text = model.padded_text(batch_of_prompts())
    codes = random_codes(model, 10)[:, :19]

    def logits(rows, sizes=(1,), first=0):
        engine = CpuEngine(model, cond_scale=cond_scale, weight_dtype=dtype, max_step=max(sizes))
        return stepped(engine, text[rows], codes[rows], sizes, first)

    threads(1)
    everything = torch.arange(10)
    together = logits(everything)
    for i, (n_threads, sizes) in enumerate(((1, (1,)), (2, (3,)), (4, (5, 1)), (2, (19,)))):
        threads(n_threads)
        rows = torch.tensor([i])
        assert torch.equal(logits(rows, sizes), together[rows])
        rows = torch.tensor([9, 0, 4, i])
        assert torch.equal(logits(rows, sizes), together[rows])
        assert torch.equal(logits(everything.flip(0), sizes), together.flip(0))
        assert torch.equal(logits(everything, sizes, first=6 + i), together[:, 6 + i :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_of_any_batch(isa, threads, dtype):
    """Prompts are read together, at most some at a time; texts on their own way one by one."""
    model = small_dalle(torch.float32)
    text = model.padded_text(torch.randint(1, 20, (250, 5), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        together = CpuEngine(model, weight_dtype=dtype).prefill(text)
        for n_threads, rows in ((1, slice(0, 1)), (2, slice(80, 180)), (4, slice(249, 250))):
            threads(n_threads)
            assert torch.equal(CpuEngine(model, weight_dtype=dtype).prefill(text[rows]), together[rows])
            engine = CpuEngine(model, weight_dtype=dtype)
            engine.prefill(text[rows, :2])
            for i in range(2, 6):
                logits = engine.step(text[rows, i : i + 1])[:, 0]
            assert torch.equal(logits, together[rows])


def test_bits_at_sizes_of_many_panels(isa, threads):
    """More than one panel and chunk in every product, more rows than one tile."""
    model = small_dalle(torch.float32, dim=192, heads=3, dim_head=40, depth=2, attn_types=("axial_row", "conv_like"))
    text, codes = model.padded_text(prompts(2))[torch.arange(17) % 2], random_codes(model, 17)[:, :11]
    for dtype in DTYPES:
        threads(1)
        together = stepped(CpuEngine(model, weight_dtype=dtype, max_step=4), text, codes, (4, 1))
        for n_threads, rows in ((2, slice(0, 1)), (4, slice(3, 12)), (1, slice(16, 17))):
            threads(n_threads)
            alone = stepped(CpuEngine(model, weight_dtype=dtype), text[rows], codes[rows])
            assert torch.equal(alone, together[rows])


def test_two_runs_and_a_copy_of_the_model_give_the_same_bits(isa):
    codes, text = random_codes(small_dalle())[:, :9], text_of(small_dalle())
    first = stepped(CpuEngine(small_dalle(torch.float32)), text, codes)
    assert torch.equal(stepped(CpuEngine(small_dalle(torch.float32)), text, codes), first)


def test_a_nan_in_one_sample_stays_there(isa):
    """A sample whose activations are NaN: no other hears of it, then or in the next batch that takes its memory."""
    model = small_dalle(torch.float32)
    model.image_emb.weight.data[29] = torch.nan
    text, codes = text_of(model), random_codes(model)[:, :9].clamp(max=28)
    expected = stepped(CpuEngine(model), text, codes)
    ill = codes.clone()
    ill[1, 4] = 29
    engine = CpuEngine(model)
    got = stepped(engine, text, ill)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert got[1, 5].isnan().all()
    assert torch.equal(stepped(engine, text, codes), expected)
