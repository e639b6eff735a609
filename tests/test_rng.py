"""Random numbers: known answers, every value of u, every instruction set and thread count, and the seeds."""

from __future__ import annotations

import decimal
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dalle_fast import _extension, dispatch, explain, rng
from dalle_fast.ops.gumbel_noise import facts, gumbel_noise
from dalle_fast.reference import gumbel_noise as reference

WORD = 0xFFFFFFFF
# Random123's published vectors for philox4x32 of 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
EVERY_U = torch.arange(2**23) << 9  # a word for each value of u
SIZES = [(1, 1), (1, 3), (2, 4), (3, 5), (2, 31), (2, 32), (2, 33), (3, 2049), (2, 8192)]  # rows, codes

missing = _extension.missing()
needs_extension = pytest.mark.skipif(missing is not None, reason=str(missing))


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, from the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & WORD, (left >> 32) ^ c[3] ^ k[1], left & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return tuple(c)


def ulp(x: Tensor) -> Tensor:
    """The spacing of float32 at x, in float64."""
    return torch.nextafter(x.abs(), torch.tensor(math.inf)).double() - x.abs().double()


def words_from_extension(seeds: Tensor, positions: Tensor, stream: int, n_codes: int) -> Tensor:
    out = torch.empty(len(positions), n_codes, dtype=torch.int32)
    status = _extension.library().dalle_fast_philox_words(
        seeds.data_ptr(), len(seeds), positions.data_ptr(), len(positions), stream, n_codes, out.data_ptr()
    )
    assert status == 0
    return out.long() & WORD


def gumbel_from_extension(words: Tensor) -> Tensor:
    as_int32 = torch.where(words > 2**31 - 1, words - 2**32, words).to(torch.int32)
    out = torch.empty(len(words))
    assert _extension.library().dalle_fast_gumbel_of_words(as_int32.data_ptr(), len(words), out.data_ptr()) == 0
    return out


# -- the definition


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert tuple(rng.philox4x32(torch.tensor(counter), key).tolist()) == answer
    assert philox_by_hand(counter, key) == answer


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("stream", list(rng.Stream))
def test_words_sit_at_their_counters(seed, stream):
    positions = [0, 1, 7, 1023, 2**31, 2**32 - 1]
    words = reference.words(rng.seeds_to_tensor(seed), torch.tensor(positions), stream, 11)
    for row, position in enumerate(positions):
        for code in range(11):
            block = philox_by_hand((code // 4, position, stream, 0), (seed & WORD, seed >> 32))
            assert words[row, code] == block[code % 4]


def test_u_is_exact_and_never_0_or_1():
    u = rng.uniform(EVERY_U)
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    k = torch.arange(2**23, dtype=torch.float64)
    assert torch.equal(u.double(), (k + 0.5) / 2**23)
    assert torch.equal(rng.uniform(EVERY_U + 511), u)  # the low 9 bits do not count


def test_gumbel_is_finite_and_rises_for_every_u():
    noise = rng.gumbel(EVERY_U)
    assert noise.isfinite().all()
    assert (noise.diff() >= 0).all()


@pytest.mark.parametrize("noise_of", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_gumbel_is_within_2_ulp_of_its_exact_value(noise_of):
    """Against 40 digits, at both ends, near 0 where relative precision is hardest, and at random."""
    near_zero = round(2**23 / math.e)
    chosen = [*range(3), *range(2**23 - 3, 2**23), *range(near_zero - 4, near_zero + 4)]
    chosen += torch.randint(2**23, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    words = torch.tensor(chosen) << 9
    noise = rng.gumbel(words) if noise_of == "reference" else gumbel_from_extension(words)
    with decimal.localcontext() as context:
        context.prec = 40
        exact = [-((-((decimal.Decimal(k) + decimal.Decimal("0.5")) / 2**23).ln()).ln()) for k in chosen]
    exact = torch.tensor([float(value) for value in exact], dtype=torch.float64)
    assert ((noise.double() - exact).abs() <= 2 * ulp(noise)).all()


def test_gumbel_has_the_moments_of_its_distribution():
    noise = gumbel_noise(11, torch.arange(128), rng.Stream.VAE, 8192).double()
    n = noise.numel()
    variance = math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 6 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 6 * math.sqrt(4.4 * variance**2 / n)  # excess kurtosis 2.4


# -- independence


def test_no_counter_repeats():
    """Blocks of four words of neighbouring seeds, positions, streams and codes are all different."""
    blocks = [
        reference.words(rng.seeds_to_tensor(seed), torch.arange(64), stream, 64).reshape(-1, 4)
        for seed in (0, 1, 2**32)
        for stream in rng.Stream
    ]
    found = torch.cat(blocks)
    assert len(found.unique(dim=0)) == len(found)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_noise_of_a_position_depends_on_nothing_else(impl):
    positions, seeds = torch.tensor([5, 0, 5, 900]), [3, 4, 9, 2**64 - 1]
    together = gumbel_noise(seeds, positions, rng.Stream.IMAGE_SAMPLING, 37, impl=impl)
    for row in range(4):
        alone = gumbel_noise(seeds[row], positions[row : row + 1], rng.Stream.IMAGE_SAMPLING, 37, impl=impl)
        assert torch.equal(alone[0], together[row])
    order = torch.tensor([2, 0, 3, 1])
    mixed = gumbel_noise([seeds[i] for i in order], positions[order], rng.Stream.IMAGE_SAMPLING, 37, impl=impl)
    assert torch.equal(mixed, together[order])
    fewer = gumbel_noise(seeds, positions, rng.Stream.IMAGE_SAMPLING, 10, impl=impl)
    assert torch.equal(fewer, together[:, :10])


# -- the extension


def test_every_value_of_every_instruction_set(isa):
    """All 2**23 inputs: equal bits on all, within 1 ulp of the reference (each rounds a value good to 2**-52)."""
    found, expected = gumbel_from_extension(EVERY_U), rng.gumbel(EVERY_U)
    assert found.isfinite().all()
    assert ((found.double() - expected.double()).abs() <= ulp(expected)).all()
    _extension.set_isa("baseline")
    assert torch.equal(found, gumbel_from_extension(EVERY_U)), isa


@pytest.mark.parametrize(("rows", "codes"), SIZES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(isa, rows, codes, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        positions = torch.arange(rows) * 1000
        seeds = rng.seeds_to_tensor(range(2**63 - 1, 2**63 - 1 + rows))
        for s in (seeds, seeds[:1]):
            words = words_from_extension(s, positions, rng.Stream.VAE, codes)
            assert torch.equal(words, reference.words(s, positions, rng.Stream.VAE, codes))
            noise = gumbel_noise(s, positions, rng.Stream.VAE, codes, impl="cpu")
            assert torch.equal(noise.flatten(), gumbel_from_extension(words.flatten()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("codes", [1, 6, 32, 45, 2048, 2051])
def test_nothing_is_written_beyond_the_result(isa, codes):
    rows, guard = 3, 64
    buffer = torch.full((guard + rows * codes + guard,), float("nan"))
    positions, seeds = torch.arange(rows), rng.seeds_to_tensor(1)
    start = buffer[guard:].data_ptr()
    _extension.library().dalle_fast_gumbel_noise(seeds.data_ptr(), 1, positions.data_ptr(), rows, 0, codes, start)
    assert buffer[:guard].isnan().all()
    assert buffer[-guard:].isnan().all()
    assert not buffer[guard:-guard].isnan().any()


@needs_extension
def test_environment_chooses_the_instruction_set(monkeypatch):
    before = _extension.isa()
    load_afresh = _extension._open.__wrapped__
    try:
        for name in _extension.instruction_sets():
            monkeypatch.setenv("DALLE_FAST_ISA", name)
            load_afresh()
            assert _extension.isa() == name
        monkeypatch.setenv("DALLE_FAST_ISA", "sse9")
        with pytest.raises(ValueError, match=r"must be one that this machine has, baseline.*, got 'sse9'"):
            load_afresh()
    finally:
        _extension.set_isa(before)


def test_without_extension_the_reference_runs_and_says_why():
    code = """if True:
        import torch, dalle_fast
        from dalle_fast import rng
        from dalle_fast.ops.gumbel_noise import gumbel_noise
        positions = torch.arange(2)
        print(gumbel_noise(5, positions, rng.Stream.VAE, 6).tolist())
        print(dalle_fast.explain("gumbel_noise", device="cpu"))
        try:
            gumbel_noise(5, positions, rng.Stream.VAE, 6, impl="cpu")
        except RuntimeError as error:
            print(error)
        from dalle_fast import _extension
        print(_extension._open.cache_info().currsize)
    """
    sentence = "the compiled extension is switched off by DALLE_FAST_NO_EXTENSION=1."
    environment = os.environ | {"DALLE_FAST_NO_EXTENSION": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    noise, chosen, *lines = done.stdout.splitlines()
    assert noise == str(gumbel_noise(5, torch.arange(2), rng.Stream.VAE, 6).tolist())
    assert chosen == "gumbel_noise: runs on 'reference'."
    assert f"  cpu: {sentence}" in lines
    assert f"gumbel_noise: impl='cpu' cannot run here: {sentence} Use impl='auto' for another one." in lines
    assert lines[-1] == "0"  # never opened


# -- the op


def test_auto_takes_the_extension_where_it_is():
    chosen = dispatch.choose("gumbel_noise", "auto", **facts(torch.arange(1))).name
    assert chosen == ("reference" if missing else "cpu")
    assert explain("gumbel_noise", device="cpu").startswith(f"gumbel_noise: runs on {chosen!r}.")
    assert "the extension runs on the CPU" in explain("gumbel_noise", device="cuda")


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_odd_arguments(impl):
    stream = rng.Stream.TEXT_SAMPLING
    strided = torch.arange(10)[::3]
    plain = gumbel_noise(1, strided.clone(), stream, 9, impl=impl)
    before = strided.clone()
    assert torch.equal(gumbel_noise(1, strided, stream, 9, impl=impl), plain)
    assert torch.equal(strided, before)
    assert torch.equal(gumbel_noise(1, strided.int(), stream, 9, impl=impl), plain)
    assert torch.equal(gumbel_noise(1, strided + 2**32, stream, 9, impl=impl), plain)  # modulo 2**32
    assert gumbel_noise(1, strided[:0], stream, 9, impl=impl).shape == (0, 9)
    assert gumbel_noise(1, strided, stream, 0, impl=impl).shape == (4, 0)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(gumbel_noise(1, strided, stream, 9, dtype=dtype, impl=impl), plain.to(dtype))


def test_bad_arguments_are_refused_in_words():
    positions, stream = torch.arange(3), rng.Stream.VAE
    with pytest.raises(TypeError, match=r"positions must be int64 \[n\], got float32 \[3\]"):
        gumbel_noise(1, positions.float(), stream, 4)
    with pytest.raises(ValueError, match="one for each of the 3 positions, got 2"):
        gumbel_noise([1, 2], positions, stream, 4)
    with pytest.raises(TypeError, match=r"a seed tensor must be int64 .* got int32 \[3\]"):
        gumbel_noise(positions.int(), positions, stream, 4)
    with pytest.raises(ValueError, match="n_codes must be 0 or more, got -1"):
        gumbel_noise(1, positions, stream, -1)
    with pytest.raises(ValueError, match="7 is not a valid Stream"):
        gumbel_noise(1, positions, 7, 4)
    with pytest.raises(ValueError, match=r"seed must be in 0 .. 2\*\*64 - 1, got -1"):
        gumbel_noise(-1, positions, stream, 4)


def test_op_is_registered_as_torch_wants_it():
    seeds, positions = rng.seeds_to_tensor([1, 2**64 - 1]), torch.arange(2)
    torch.library.opcheck(torch.ops.dalle_fast.gumbel_noise.default, (seeds, positions, 0, 6, "auto"))


def test_op_compiles_into_a_full_graph():
    def draw(positions: Tensor) -> Tensor:
        return gumbel_noise(3, positions, rng.Stream.VAE, 6) + 1

    positions = torch.arange(4)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(positions), draw(positions))


@pytest.mark.gpu
def test_gpu_draws_the_same_numbers():
    positions, seeds = torch.arange(64), rng.seeds_to_tensor(2**64 - 3)
    on_gpu = reference.words(seeds.cuda(), positions.cuda(), 0, 1027)
    assert torch.equal(on_gpu.cpu(), reference.words(seeds, positions, 0, 1027))
    exact = rng.gumbel(EVERY_U)
    found = rng.gumbel(EVERY_U.cuda()).cpu()
    assert ((found.double() - exact.double()).abs() <= 2 * ulp(exact)).all()


# -- seeds


def test_seeds_of_one_number_count_up_and_wrap():
    assert rng.resolve_seeds(5, 3) == [5, 6, 7]
    assert rng.resolve_seeds(2**64 - 2, 4) == [2**64 - 2, 2**64 - 1, 0, 1]
    assert rng.resolve_seeds(torch.tensor(5), 2) == [5, 6]
    assert rng.resolve_seeds(5, 0) == []


def test_seeds_may_be_given_one_by_one():
    assert rng.resolve_seeds([9, 2**64 - 1], 2) == [9, 2**64 - 1]
    assert rng.resolve_seeds(torch.tensor([1, 0, 3]), 3) == [1, 0, 3]


def test_seeds_from_generators_repeat_and_differ():
    torch.manual_seed(7)
    first, second = rng.resolve_seeds(None, 3), rng.resolve_seeds(None, 3)
    torch.manual_seed(7)
    assert rng.resolve_seeds(None, 3) == first
    assert first != second
    state = torch.get_rng_state()
    own = [rng.resolve_seeds(None, 2, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert own[0] == own[1] != own[2]
    assert torch.equal(torch.get_rng_state(), state)  # the default generator was left alone
    one, many = (rng.resolve_seeds(None, n, torch.Generator().manual_seed(1)) for n in (1, 5))
    assert many[:1] == one


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (-1, ValueError, r"in 0 .. 2\*\*64 - 1, got -1"),
        (2**64, ValueError, "got 18446744073709551616"),
        (1.0, TypeError, r"whole number, got 1.0 \(float\)"),
        (True, TypeError, "whole number, got True"),
        ("7", TypeError, "whole number, got '7'"),
        ([1, -2], ValueError, "got -2"),
        ([1, 2, 3], ValueError, "one for each of the 2 samples, got 3"),
        (torch.tensor([0.5, 1.0]), TypeError, "whole number, got 0.5"),
        (torch.tensor([-1, 1]), ValueError, "got -1"),
    ],
)
def test_impossible_seeds_are_refused_in_words(seed, error, words):
    with pytest.raises(error, match=words):
        rng.resolve_seeds(seed, 2)


def test_seed_and_generator_together_are_refused():
    with pytest.raises(ValueError, match="must not both be given"):
        rng.resolve_seeds(1, 2, torch.Generator())


def test_seeds_keep_their_bits_in_a_tensor():
    seeds = [0, 2**63 - 1, 2**63, 2**64 - 1]
    assert [s % 2**64 for s in rng.seeds_to_tensor(seeds).tolist()] == seeds
