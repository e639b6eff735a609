"""Every kernel of gumbel_codebook against the float64 oracle: sizes, dtypes, modes, temperatures, noise, strides."""

from dataclasses import replace

import pytest
import torch
from gumbel_codebook_cases import (
    MODES,
    NAMES,
    SEED,
    Case,
    check_case,
    check_problems,
    make_inputs,
    named,
    results,
    same,
)
from tolerance import assert_argmax_within_budget

from dalle_fast.functional import codebook_indices, gumbel_codebook
from dalle_fast.reference.gumbel_codebook import code_logits

OP = "gumbel_codebook"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ST, RM = "straight_through", "reinmax"
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])

# Each pair of values of two columns meets in some row, or nearly so; few codes take many problems, many take few.
CASES = [
    Case(2, 8, 1, "soft", FP32, 0.9, problems=64),
    Case(2, 24, 16, ST, BF16, 4.0, seeded=True, problems=16),
    Case(2, 64, 3, RM, FP16, 0.5, with_kl=False, problems=16),
    Case(5, 8, 3, ST, FP32, 1 / 16, seeded=True, bias=False, problems=16),
    Case(5, 130, 64, "soft", FP16, 0.9, grid=(1, 37), problems=8),
    Case(5, 24, 70, RM, BF16, 1.0, batch=3, problems=8),
    Case(63, 24, 16, "soft", BF16, 1 / 16, with_kl=False, bias=False),
    Case(63, 64, 1, RM, FP32, 0.9, seeded=True, grid=(29, 1), problems=32),
    Case(63, 130, 70, ST, FP32, 4.0, batch=3),
    Case(130, 8, 64, RM, BF16, 4.0, batch=1, seeded=True),
    Case(130, 64, 16, ST, FP16, 0.5, bias=False),
    Case(130, 130, 3, "soft", FP32, 4.0, seeded=True, grid=(7, 5)),
    Case(130, 24, 1, "soft", FP32, 1 / 16, problems=32),
    Case(1000, 64, 70, "soft", FP32, 0.9, batch=1, grid=(9, 11)),
    Case(1000, 24, 64, RM, FP32, 1 / 16, seeded=True, with_kl=False),
    Case(1000, 8, 16, "soft", FP16, 4.0, seeded=True, batch=3),
    Case(1000, 130, 3, ST, BF16, 0.9, grid=(3, 11)),
    Case(63, 1024, 24, ST, FP32, 0.5, seeded=True),
    Case(63, 1024, 24, "soft", FP32, 0.5, seeded=True),
    Case(63, 1024, 24, "soft", BF16, 0.5),
    Case(8192, 24, 64, "soft", FP32, 0.9, seeded=True, batch=1, problems=2),
    Case(8192, 24, 64, RM, BF16, 0.9, batch=1, grid=(3, 5)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_of_sizes_dtypes_and_arguments(case, kernel):
    check_case(kernel, case)


@every_mode
@every_dtype
@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seed"])
def test_every_mode_at_every_dtype(mode, dtype, seeded, kernel):
    check_case(kernel, Case(40, 24, 16, mode, dtype, 0.7, seeded=seeded, batch=8))


@every_mode
@pytest.mark.parametrize("temperature", [1 / 16, 1.0, 4.0])
def test_logits_of_ten_thousand(mode, temperature, kernel):
    """Exact in float32, so that the oracle's own error, and with it the budget, is that of ordinary logits."""
    case = Case(130, 24, 16, mode, FP32, temperature)
    generator = torch.Generator().manual_seed(0)
    made = zip(*(make_inputs(4, 16, (5, 7), 130, 24, seed=i) for i in range(4)), strict=True)
    stacked = [torch.stack(tensors) for tensors in made]
    for index, factor in ((0, 1.0), (1, 128.0), (2, 0.25)):  # features, weight, bias
        whole = torch.randint(-8, 9, stacked[index].shape, generator=generator)
        stacked[index] = whole * factor
    # every code twice: ties that only the noise decides
    stacked[1][:, 1::2], stacked[2][:, 1::2] = stacked[1][:, ::2], stacked[2][:, ::2]
    logits = code_logits(stacked[0][0], stacked[1][0], stacked[2][0])
    assert logits.abs().max() > 1e4 and torch.equal(logits.double(), _exact_logits(stacked))
    check_problems(kernel, case, stacked)


def _exact_logits(stacked):
    return code_logits(*(t[0].double() for t in stacked[:3]))


# -- exact things


def _in_memory(t, layout):
    """`t` with its values in memory that lies as `layout` says, NaN around them."""
    if layout == "channels last":
        order = (*range(2, t.dim()), 1) if t.dim() == 4 else (1,)
        order = (0, *order) if t.dim() > 1 else (0,)
        memory = torch.full(tuple(t.shape[i] for i in order), torch.nan, dtype=t.dtype)
        view = memory.permute(*(order.index(i) for i in range(t.dim())))
    elif layout == "transposed":
        memory = torch.full((*t.shape[:-2], *reversed(t.shape[-2:])), torch.nan, dtype=t.dtype)
        view = memory.transpose(-1, -2) if t.dim() > 1 else memory
    else:  # every second number of wider rows
        memory = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, dtype=t.dtype)
        view = memory[..., : 2 * t.shape[-1] : 2]
    view.copy_(t)
    return view, memory


@every_mode
@pytest.mark.parametrize("layout", ["channels last", "transposed", "every second"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_any_strides_give_the_same_bits_and_inputs_stay(mode, layout, dtype, kernel):
    inputs, noise = named(make_inputs(3, 16, (3, 5), 63, 24, dtype=dtype))
    dembeds = torch.randn(3, 24, 3, 5).to(dtype)
    views, memories = zip(*(_in_memory(t, layout) for t in (*inputs.values(), noise, dembeds)), strict=True)
    before = [memory.clone() for memory in memories]
    expected = results(kernel, inputs, mode=mode, gumbel_noise=noise, dembeds=dembeds)
    strided = dict(zip(NAMES, views, strict=False))
    assert same(results(kernel, strided, mode=mode, gumbel_noise=views[4], dembeds=views[5]), expected)
    assert all(torch.equal(m.nan_to_num(7.5), b.nan_to_num(7.5)) for m, b in zip(memories, before, strict=True))


def test_a_broadcast_gradient_is_read_as_written_out(kernel):
    inputs, noise = named(make_inputs(2, 3, (3, 5), 63, 24))
    for dembeds in (torch.ones(()).expand(2, 24, 3, 5), torch.randn(2, 1, 1, 5).expand(2, 24, 3, 5)):
        one, other = (results(kernel, inputs, gumbel_noise=noise, dembeds=d) for d in (dembeds, dembeds.contiguous()))
        assert same(one, other)


@every_mode
@every_dtype
def test_equal_bits_for_any_number_of_threads_and_in_a_second_run(mode, dtype, kernel, restored_threads):
    tensors = make_inputs(3, 16, (7, 11), 300, 24, dtype=dtype)[:4]
    leaves = [t.requires_grad_() for t in tensors]

    def run():
        embeds, codes, noisy_codes, kl = gumbel_codebook(
            *leaves, temperature=0.7, seed=3, with_kl=True, impl=kernel, **MODES[mode]
        )
        loss = embeds.float().square().sum() + kl
        once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        assert same(once, again), "two backward passes differ"
        return embeds, codes, noisy_codes, kl, *once, codebook_indices(*leaves[:3], impl=kernel)

    torch.set_num_threads(1)
    expected = run()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert same(run(), expected), f"{threads} threads"


@every_mode
@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seed"])
def test_one_sample_alone_is_the_same_as_in_its_batch(mode, seeded, kernel):
    batch, grid, first = 3, (3, 5), 2**32 - 1000
    inputs, noise = named(make_inputs(batch, 16, grid, 130, 24))
    n_rows = grid[0] * grid[1]

    def run(samples):
        part = {**inputs, "features": inputs["features"][samples]}
        start = first + samples.start * n_rows
        given = {"seed": SEED, "first_row": start} if seeded else {"gumbel_noise": noise[samples]}
        return results(kernel, part, mode=mode, with_kl=False, needed=("features",), **given)

    embeds, codes, noisy_codes, _, dfeatures = run(slice(0, batch))
    for b in range(batch):
        alone = run(slice(b, b + 1))
        together = [t[b : b + 1] for t in (embeds, codes, noisy_codes, dfeatures)]
        assert same([alone[i] for i in (0, 1, 2, 4)], together), f"sample {b}"


@every_mode
def test_rows_of_a_global_batch_draw_its_noise(mode, kernel):
    check_case(kernel, Case(40, 24, 16, mode, seeded=True, first_row=2**31 - 7))
    check_case(kernel, Case(40, 24, 16, mode, seeded=True, first_row=2**32 - 140))


@every_mode
@pytest.mark.parametrize("n_codes", [1, 5, 64, 130])
@pytest.mark.parametrize("sizes", [(1, 1, (1, 1), 1), (2, 3, (3, 5), 24), (1, 70, (1, 67), 130)])
def test_all_of_the_results_is_written(mode, n_codes, sizes, kernel, poisoned_memory):
    assert torch.empty(3).isnan().all()
    batch, n_features, grid, dim = sizes
    inputs, noise = named(make_inputs(batch, n_features, grid, n_codes, dim))
    for given in ({"gumbel_noise": noise}, {"seed": 1}):
        found = results(kernel, inputs, mode=mode, **given)
        assert all(t.isfinite().all() for t in found)
        assert all(0 <= codes.min() <= codes.max() < n_codes for codes in found[1:3])


@every_mode
def test_ties_go_to_the_lowest_code(mode, kernel):
    """Rows of the same code over and over, more of them than any block holds."""
    inputs, noise = named(make_inputs(2, 3, (3, 5), 300, 24))
    inputs["weight"] = inputs["weight"][:1].expand(300, -1).clone()
    inputs["bias"] = torch.zeros(300)
    _, codes, noisy_codes, *_ = results(kernel, inputs, mode=mode, gumbel_noise=torch.zeros_like(noise))
    assert not codes.any() and not noisy_codes.any()
    assert not codebook_indices(inputs["features"], inputs["weight"], None, impl=kernel).any()
    inputs["bias"][[7, 99, 170, 299]] = 1.0
    _, codes, noisy_codes, *_ = results(kernel, inputs, mode=mode, gumbel_noise=torch.zeros_like(noise))
    assert (codes == 7).all() and (noisy_codes == 7).all()


@every_mode
@pytest.mark.parametrize("n_codes", [1, 40])
def test_hard_embeddings_are_rows_of_the_codebook(mode, n_codes, kernel):
    inputs, noise = named(make_inputs(2, 3, (3, 5), n_codes, 24))
    embeds, _, noisy_codes, *_ = results(kernel, inputs, mode=mode, gumbel_noise=noise)
    rows = inputs["codebook"][noisy_codes].permute(0, 3, 1, 2)
    assert torch.equal(embeds, rows) == (mode != "soft" or n_codes == 1)


def test_an_impossible_code_keeps_everything_finite(kernel):
    inputs, noise = named(make_inputs(2, 3, (3, 5), 40, 24))
    inputs["bias"][2] = -1e4
    for mode in MODES:
        assert all(t.isfinite().all() for t in results(kernel, inputs, mode=mode, gumbel_noise=noise))


# -- codebook_indices


@every_dtype
@pytest.mark.parametrize(("n_codes", "n_features"), [(2, 1), (5, 70), (63, 16), (130, 3), (1000, 64), (8192, 64)])
def test_indices_are_the_argmax_and_those_of_the_training_path(n_codes, n_features, dtype, kernel):
    features, weight, bias, codebook, _ = make_inputs(3, n_features, (3, 11), n_codes, 8, dtype=dtype)
    for given in (bias, None):
        codes = codebook_indices(features, weight, given, impl=kernel)
        own = code_logits(features, weight, given)
        exact = code_logits(*(None if t is None else t.double() for t in (features, weight, given)))
        assert_argmax_within_budget(codes.flatten(), exact, own)
        trained = gumbel_codebook(features, weight, given, codebook, temperature=1.0, seed=0, impl=kernel)[1]
        assert torch.equal(codes, trained)
        strided = [None if t is None else _in_memory(t, "every second")[0] for t in (features, weight, given)]
        assert torch.equal(codebook_indices(*strided, impl=kernel), codes)


def test_another_noise_would_be_seen(kernel):
    case = Case(40, 24, 16)
    made = zip(*(make_inputs(2, 16, (3, 5), 40, 24, seed=i) for i in range(4)), strict=True)
    with pytest.raises(AssertionError):
        check_problems(kernel, replace(case, seeded=True), [torch.stack(tensors) for tensors in made])
