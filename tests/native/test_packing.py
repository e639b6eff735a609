"""Packed weights: what lies where, what int8 loses, and the products over them against float64."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within_budget

from dalle_fast import _extension
from dalle_fast.native.packing import CHUNK, PANEL, Arena, Epilogue, in_arena, pack, pack_gated, product

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
SIZES = [(1, 1), (64, 128), (65, 129), (70, 37), (130, 300), (31, 2)]  # width, depth
needs_extension = pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))


def name(dtype):
    return str(dtype).removeprefix("torch.")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unpacked(packed):
    """float64 [depth, panels * 64], as the header describes it."""
    panels = packed.panels.double()
    if packed.panels.dtype != torch.float32:
        panels = panels.transpose(2, 3).flatten(1, 2)
        assert not panels[:, packed.depth :].any()
        panels = panels[:, : packed.depth]
    if packed.scales is not None:
        chunk = torch.arange(packed.depth) // CHUNK
        panels = panels * packed.scales.double()[:, chunk]
    return panels.transpose(0, 1).flatten(1)


def halves(columns, half):
    """Values and gates [..., F] of columns [..., panels * 64]."""
    values, gates = columns.unflatten(-1, (-1, 2, PANEL // 2)).unbind(-2)
    assert not values.flatten(-2)[..., half:].any() and not gates.flatten(-2)[..., half:].any()
    return values.flatten(-2)[..., :half], gates.flatten(-2)[..., :half]


def gelu_gated(values, gates):
    return values * F.gelu(gates)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("width", "depth"), SIZES)
def test_unpacking_gives_the_weights_back(width, depth, dtype):
    weight, bias = random(width, depth), random(width, seed=1)
    packed, _ = in_arena(lambda arena: pack(weight, bias, dtype, arena))
    columns = unpacked(packed)
    assert not columns[:, width:].any() and not packed.bias[width:].any()
    assert torch.equal(packed.bias[:width], bias)
    if dtype == torch.int8:
        chunks = torch.stack([chunk.abs().amax(0) for chunk in weight.t().split(CHUNK)])
        allowed = chunks[torch.arange(depth) // CHUNK].double() / 254 * (1 + 1e-6)  # half of 1/127 of the largest
        assert bool(((columns[:, :width] - weight.t()).abs() <= allowed).all())
    else:
        assert torch.equal(columns[:, :width], weight.to(dtype).t().double())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("half", [1, 32, 40, 96])
def test_gated_panels_hold_values_beside_their_gates(half, dtype):
    weight, bias = random(2 * half, 5), random(2 * half, seed=1)
    packed, _ = in_arena(lambda arena: pack_gated(weight, bias, dtype, arena))
    plain, _ = in_arena(lambda arena: pack(weight, bias, dtype, arena))
    expected = unpacked(plain)[:, : 2 * half]
    assert torch.equal(torch.cat(halves(unpacked(packed), half), dim=1), expected)
    assert torch.equal(torch.cat(halves(packed.bias, half)), bias)
    assert packed.width == 2 * half


def test_columns_of_zeros_stay_zeros_in_int8():
    weight = random(3, 300)
    weight[1], weight[2, :CHUNK], weight[0, 0] = 0.0, 0.0, 1e-42
    packed, _ = in_arena(lambda arena: pack(weight, None, torch.int8, arena))
    columns = unpacked(packed)
    assert bool(columns.isfinite().all())
    assert not columns[:, 1].any() and not columns[:CHUNK, 2].any()


def test_an_arena_hands_out_cache_lines_and_counts_what_it_would():
    def take(arena):
        return arena.take(torch.bfloat16, 3, 5), arena.take(torch.float32, 0), arena.put(torch.ones(17))

    parts, arena = in_arena(take)
    assert all(part.data_ptr() % 64 == 0 for part in parts)
    assert arena.used == 64 + 128
    assert not parts[0].any() and bool((parts[2] == 1).all())
    arena.clear()
    assert not parts[2].any()
    assert all(part.device.type == "meta" for part in take(Arena(None)))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("width", "depth"), SIZES)
def test_products_are_within_the_budget_and_equal_for_any_number_of_rows(width, depth, dtype, isa):
    weight, bias, x = random(2 * width, depth), random(2 * width, seed=1), random(13, depth, seed=2)
    before, scale = random(13, 2 * width, seed=3), random(2 * width, seed=4)
    plain, _ = in_arena(lambda arena: pack(weight, bias, dtype, arena))
    gated, _ = in_arena(lambda arena: pack_gated(weight, bias, dtype, arena))
    exact_weight = unpacked(plain)[:, : 2 * width]
    for epilogue, packed, start in (
        (Epilogue.STORE, plain, torch.full((13, 2 * width), torch.nan)),
        (Epilogue.GATE, gated, torch.full((13, width), torch.nan)),
        (Epilogue.RESIDUAL, plain, before),
    ):
        whole = product(x, packed, epilogue, start.clone(), scale)
        multiplied = rounded_to_int16(x) if dtype == torch.int8 else x
        exact, own = (
            expected(epilogue, *(part.to(float_) for part in (multiplied, exact_weight, bias, before, scale)))
            for float_ in (torch.float64, torch.float32)
        )
        assert_within_budget(whole, exact, own, f"{epilogue.name} of {name(dtype)}")
        for rows in range(1, 13):
            for first in (0, 13 - rows):
                some = slice(first, first + rows)
                assert torch.equal(product(x[some], packed, epilogue, start[some].clone(), scale), whole[some])


def rounded_to_int16(x):
    """What rows become beside int8 weights: of each chunk the largest number becomes 32767."""
    chunks = F.pad(x, (0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    largest = chunks.abs().amax(dim=2, keepdim=True)
    # not 32767 / largest, which torch computes as a product with the reciprocal
    numbers = (chunks * (torch.full_like(largest, 32767) / largest)).nan_to_num().round()
    return (numbers * (largest / 32767).double()).flatten(1)[:, : x.shape[1]]


def expected(epilogue, x, weight, bias, before, scale):
    y = x @ weight + bias
    if epilogue == Epilogue.GATE:
        return gelu_gated(*y.chunk(2, dim=1))
    return before + y * scale if epilogue == Epilogue.RESIDUAL else y
