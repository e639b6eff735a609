"""choose_token: filters against sorting, tokens against the oracle with the same noise, draws against softmax."""

import math

import pytest
import torch
from implementations import skip_without

from dalle_fast import dispatch, rng
from dalle_fast.functional import choose_token, gumbel_noise
from dalle_fast.ops.choose_token import facts
from dalle_fast.reference import choose_token as oracle

OP = "choose_token"
STREAM = rng.Stream.IMAGE_SAMPLING
EVERYTHING = {"top_k": None, "temperature": 1.0, "top_p": None}
SETTINGS = [
    EVERYTHING,
    {"top_k": 5, "temperature": 0.7, "top_p": None},
    {"top_k": None, "temperature": 1.3, "top_p": 0.8},
    {"top_k": 20, "temperature": 0.9, "top_p": 0.6},
]


def expected(logits, seeds, positions, stream=STREAM, **filters):
    noise = gumbel_noise(rng.seeds_to_tensor(seeds), positions, stream, logits.shape[1])
    return oracle.choose_token(logits, noise, **filters)


def check(logits, n=None, *, seeds=77, first=0, **filters):
    """Tokens of the compiled op equal the oracle's in every row; `n`: that many rows of the same logits."""
    filters = {**EVERYTHING, **filters}
    logits = logits if n is None else logits.expand(n, -1)
    positions = torch.arange(first, first + len(logits))
    before = logits.clone()
    tokens = choose_token(logits, seeds=seeds, positions=positions, stream=STREAM, **filters, impl="cpu")
    assert torch.equal(tokens, expected(logits, seeds, positions, **filters)), filters
    assert torch.equal(logits, before) or before.isnan().any()
    return tokens


def random_logits(rows, n_codes, *, levels=None, seed=0):
    """Normal with deviation 2, or one of few values each: many ties."""
    generator = torch.Generator().manual_seed(seed + n_codes)
    if levels is not None:
        return torch.randint(levels, (rows, n_codes), generator=generator) * (6.0 / levels)
    return torch.randn(rows, n_codes, generator=generator) * 2


# -- the oracle's filters


def kept_by_sorting(logits, top_k, temperature, top_p):
    """Which tokens stay, one row, by sorting and walking down."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k is not None and top_k < len(order):
        last = logits[order[top_k - 1]]
        order = [i for i in order if logits[i] >= last]
    if top_p is not None and top_p < 1:
        weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
        total, reached, kept = sum(weights), 0.0, []
        for i, weight in zip(order, weights, strict=True):
            if reached / total >= top_p and logits[i] < logits[kept[-1]]:
                break
            kept.append(i)
            reached += weight
        order = kept
    return set(order)


@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("levels", [3, 1000])
def test_oracle_keeps_what_sorting_keeps(top_k, top_p, temperature, levels):
    logits = random_logits(4, 23, levels=levels).double()
    filtered = oracle.filtered(logits, top_k=top_k, temperature=temperature, top_p=top_p)
    for row, out in zip(logits, filtered, strict=True):
        kept = kept_by_sorting(row.tolist(), top_k, temperature, top_p)
        assert set(out.isfinite().nonzero().flatten().tolist()) == kept
        assert torch.equal(out[sorted(kept)], row[sorted(kept)] / temperature)


# -- the compiled op against the oracle


@pytest.mark.parametrize("n_codes", [1, 2, 3, 15, 16, 17, 30, 33, 511, 513])
@pytest.mark.parametrize("levels", [None, 2, 5])
def test_tokens_are_the_oracles_at_every_size(isa, n_codes, levels):
    logits = random_logits(60, n_codes, levels=levels)
    for filters in SETTINGS:
        check(logits, **filters)


def test_every_threshold_is_exact(isa):
    """Every top_k and a ladder of top_p, few levels and many: one row drawn so often that a wrong border shows."""
    for levels in (None, 4):
        logits = random_logits(1, 30, levels=levels)
        for top_k in range(1, 32):
            check(logits, 300, top_k=top_k, temperature=3.0)
        for percent in range(2, 100, 5):
            check(logits, 300, top_p=percent / 100, temperature=3.0)
            check(logits, 300, top_p=percent / 100, top_k=9)


def test_large_vocabularies(isa):
    """Thousands of rows of 8192 codes; ties among thousands; distances that take every level of the selection."""
    for filters in SETTINGS:
        check(random_logits(80, 8192), seeds=rng.SEEDS - 1, first=2**31 - 5, **filters)
        check(random_logits(20, 8192, levels=7), **filters)
    check(random_logits(300, 8191, seed=1))
    near = 1 + torch.rand(16, 8192, generator=torch.Generator().manual_seed(2)) * 1e-4
    far = torch.randn(16, 8192, generator=torch.Generator().manual_seed(3)).sign() * near * 1e30
    for logits, temperature in ((near, 1.0), (far, 1e30), (near * 1e-38, 1e-38), (near, 3e38)):
        for top_k, top_p in ((None, None), (100, None), (None, 0.3), (4000, 0.9)):
            check(logits, temperature=temperature, top_k=top_k, top_p=top_p)


def test_many_rows_without_filters(isa):
    """The shortcut by random words never loses the largest: 20,000 rows of every spread."""
    for deviation in (0.0, 0.1, 1.0, 5.0, 1e4, 1e9):
        for shift in (0.0, -300.0, 1e5):
            logits = random_logits(1100, 97, seed=int(deviation)) * deviation + shift
            check(logits, first=int(shift))


@pytest.mark.parametrize("filters", SETTINGS)
def test_equal_logits_all_stay(isa, filters):
    tokens = check(torch.full((1, 64), -3.0), 2000, **filters)
    assert len(tokens.unique()) == 64


def test_the_lowest_of_equals_wins():
    skip_without("cpu", OP)
    logits = torch.full((1, 100), 2.0**40)  # noise is lost in their rounding
    assert check(logits, 50).eq(0).all()
    signed = torch.tensor([[-5.0, -0.0, 0.0, -0.0, -1.0]])
    for logits in (signed, signed.neg() - 5, torch.where(signed == 0, -signed, signed)):
        for filters in ({"top_k": 2}, {"top_k": 4}, {"top_p": 0.4}, {"top_p": 0.9}):
            check(logits, 400, **filters)
    assert set(check(signed, 400, top_k=2).tolist()) == {1, 2, 3}  # zeros are equal
    assert check(signed, top_k=1).tolist() == [1]
    assert check(signed, temperature=0.0).tolist() == [1]
    assert check(signed.flip(1), temperature=1e-50).tolist() == [1]  # 0 in float32


@pytest.mark.parametrize("filters", SETTINGS)
def test_forbidden_tokens_are_never_chosen(isa, filters):
    logits = random_logits(200, 70)
    logits[:, torch.randperm(70, generator=torch.Generator().manual_seed(0))[:50]] = -torch.inf
    tokens = check(logits, **filters)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    check(torch.full((3, 70), -torch.inf), **filters)
    one = torch.full((1, 70), -torch.inf).index_fill(1, torch.tensor(69), -1e30)
    assert check(one, 20, **filters).eq(69).all()


@pytest.mark.parametrize("filters", [*SETTINGS, {"temperature": 0.0}])
@pytest.mark.parametrize("n_codes", [4, 40])
def test_what_has_no_softmax_gets_the_largest_logit(isa, filters, n_codes):
    inf, nan = torch.inf, torch.nan
    rows = [[inf, 1, inf, 2], [-inf, inf, 0, 0], [0, nan, inf, nan], [nan, -inf, 0, 1], [-inf, -inf, -inf, nan]]
    logits = torch.zeros(len(rows), n_codes)
    logits[:, -4:] = torch.tensor(rows)
    assert torch.equal(check(logits, **filters), logits.argmax(dim=1))


def test_division_that_overflows_gives_the_largest_logit(isa):
    logits = torch.tensor([[-torch.inf, -5.0, -2.0, -3.0], [1.0, 5.0, 2.0, 5.0], [0.0, -1.0, -2.0, -3.0]])
    assert check(logits, temperature=1e-39).tolist() == [2, 1, 0]
    assert check(logits, temperature=1e-39, top_k=3, top_p=0.5).tolist() == [2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_strides_and_threads(dtype):
    skip_without("cpu", OP)
    logits = random_logits(64, 50).to(dtype)
    check(logits, top_k=10)
    check(random_logits(128, 50)[::2])
    check(random_logits(50, 64).T, top_p=0.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(logits)
    finally:
        torch.set_num_threads(threads)


# -- meaning


def chi_square(drawn, probability):
    """(statistic, its quantile at 1 - 1e-6): of draws against probabilities [K]; rare tokens are taken together."""
    expected = probability * len(drawn)
    seen = drawn.bincount(minlength=len(expected)).double()
    assert not seen[probability == 0].any()
    rare = expected < 5
    expected, seen = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (expected, seen))
    expected, seen = expected[expected > 0], seen[expected > 0]
    degrees = len(expected) - 1
    quantile = 4.753  # of the normal distribution, at 1 - 1e-6; the rest is Wilson and Hilferty's
    limit = degrees * (1 - 2 / (9 * degrees) + quantile * math.sqrt(2 / (9 * degrees))) ** 3
    return float(((seen - expected) ** 2 / expected).sum()), limit


@pytest.mark.parametrize("filters", SETTINGS)
def test_draws_follow_the_filtered_softmax(impl, filters):
    """20,000 draws at a fixed seed; a right sampler fails with probability 1e-6, a wrong one always."""
    logits = random_logits(1, 256) * 0.75
    positions = torch.arange(20_000)
    rows = logits.expand(len(positions), -1)
    drawn = choose_token(rows, seeds=1234, positions=positions, stream=STREAM, **filters, impl=impl)
    kept = kept_by_sorting(logits[0].tolist(), **filters)
    probability = torch.full((256,), -torch.inf, dtype=torch.float64)
    probability[sorted(kept)] = logits[0, sorted(kept)].double() / filters["temperature"]
    probability = probability.softmax(dim=0)
    statistic, limit = chi_square(drawn, probability)
    assert statistic < limit
    cooler = probability**1.25
    statistic, limit = chi_square(drawn, cooler / cooler.sum())
    assert statistic > limit


def test_a_row_depends_on_nothing_beside_it(impl):
    logits, seeds, positions = random_logits(9, 77), list(range(100, 109)), torch.arange(9) * 5

    def tokens(rows):
        return choose_token(
            logits[rows],
            seeds=[seeds[i] for i in rows],
            positions=positions[rows],
            stream=STREAM,
            top_p=0.9,
            impl=impl,
        ).tolist()

    together = tokens(list(range(9)))
    assert [tokens([i])[0] for i in range(9)] == together
    assert tokens(list(range(8, -1, -1))) == together[::-1]


def test_seeds_positions_and_streams_draw_apart(impl):
    logits = torch.zeros(500, 4096)

    def tokens(seeds, positions, stream=STREAM):
        return choose_token(logits, seeds=seeds, positions=positions, stream=stream, impl=impl)

    assert torch.equal(tokens(1, 5), tokens([1] * 500, torch.full((500,), 5, dtype=torch.int32)))
    assert len(tokens(1, 5).unique()) == 1
    draws = [tokens(1, torch.arange(500)), tokens(2, torch.arange(500))]
    draws += [tokens(1, torch.arange(500, 1000)), tokens(1, torch.arange(500), rng.Stream.TEXT_SAMPLING)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert (one == other).sum() < 10


def test_float64_stays_float64():
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert choose_token(logits, seeds=0, positions=0, stream=STREAM, temperature=0).tolist() == [1]
    assert choose_token(logits, seeds=0, positions=0, stream=STREAM, temperature=1e-14).tolist() == [1]


# -- the contract


def test_nothing_gives_nothing(impl):
    tokens = choose_token(torch.zeros(0, 7), seeds=0, positions=3, stream=STREAM, impl=impl)
    assert (tokens.shape, tokens.dtype) == ((0,), torch.int64)


def test_opcheck():
    arguments = (torch.randn(3, 20), torch.arange(3), torch.arange(3), int(STREAM), 5, 0.9, 0.8, "auto")
    torch.library.opcheck(torch.ops.dalle_fast.choose_token, arguments)


def test_explain_says_which_runs():
    skip_without("cpu", OP)
    assert dispatch.explain(OP, **facts(torch.zeros(1, 2))).startswith("choose_token: runs on 'cpu'.")
    with pytest.raises(NotImplementedError, match="computes in float32, which float64 exceeds"):
        choose_token(torch.zeros(1, 2).double(), seeds=0, positions=0, stream=STREAM, impl="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "logits must be floating, got int64"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[B, K\] with K at least 1, got \[3\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"with K at least 1, got \[2, 0\]"),
        ({"temperature": -0.1}, ValueError, r"temperature must be in 0\.\.3\.4e\+38, got -0\.1\."),
        ({"temperature": math.nan}, ValueError, "got nan"),
        ({"temperature": 1e39}, ValueError, r"got 1e\+39"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, r"top_k must be an int, got 2\.5"),
        ({"top_k": True}, TypeError, "top_k must be an int, got True"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, ValueError, r"got 1\.1"),
        ({"positions": torch.arange(3)}, ValueError, r"positions must be one number or \[B=2\], got \[3\]"),
        ({"positions": torch.zeros(2)}, TypeError, r"positions must be int64 \[n\], got float32"),
        ({"positions": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "on one device, got cpu, meta"),
        ({"seeds": [1, 2, 3]}, ValueError, "one for each of the 2 positions, got 3"),
        ({"seeds": -1}, ValueError, "choose_token: seed must be in"),
        ({"seeds": 0.5}, TypeError, "float"),
        ({"stream": 9}, ValueError, "9 is not a valid Stream"),
        ({"impl": "triton"}, NotImplementedError, "has no 'triton' implementation"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
    ],
)
def test_bad_arguments_are_refused_in_words(changes, error, message):
    arguments = {"logits": torch.zeros(2, 3), "seeds": 0, "positions": 0, "stream": STREAM} | changes
    with pytest.raises(error, match=message):
        choose_token(arguments.pop("logits"), **arguments)
