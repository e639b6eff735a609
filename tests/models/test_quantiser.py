"""VectorQuantiser: the nearest codes forward, gradients, the moving averages, revival, several processes."""

import pytest
import torch
import torch.multiprocessing as mp
from tolerance import assert_same_in_float64
from torch.utils.checkpoint import checkpoint
from two_processes import meeting

from dalle_fast.models.quantiser import VectorQuantiser, spread_sample


def maps(*shape, seed=3):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(z):
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def quantiser(num_codes=9, dim=3, *, placed=True, **options):
    """In float64; placed: on codes of its own, as after the first batch."""
    torch.manual_seed(0)
    made = VectorQuantiser(num_codes, dim, **options).double()
    made.started.fill_(placed)
    if made.normalised:
        made.weight.copy_(torch.nn.functional.normalize(made.weight, dim=1))  # to the last bit of float64
    return made


def same_state(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# --- forward and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_values_are_the_nearest_codes_and_gradients_pass_straight_through(normalised):
    model = quantiser(normalised=normalised).eval()
    z = maps(2, 3, 4, 5).requires_grad_()
    quantised, codes, commitment = model(z)
    vectors = rows(z)
    if normalised:
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        assert_same_in_float64(model.weight.norm(dim=1), torch.ones(9).double(), 3)
    assert torch.equal(codes.flatten(), torch.cdist(vectors, model.weight).argmin(1))
    assert torch.equal(codes, model.nearest(z))
    assert torch.equal(quantised, model.weight[codes].permute(0, 3, 1, 2)), "what is decoded are the codes themselves"
    assert_same_in_float64(commitment, (vectors - model.weight[codes.flatten()]).square().mean(), vectors.numel())

    weights = maps(*quantised.shape, seed=4)
    (gradient,) = torch.autograd.grad((quantised * weights).sum(), z, retain_graph=True)
    (expected,) = torch.autograd.grad((vectors * rows(weights)).sum(), z, retain_graph=True)
    assert torch.equal(gradient, expected)
    (pull,) = torch.autograd.grad(commitment, z, retain_graph=True)
    away = 2 * (vectors - rows(quantised)).detach() / z.numel()
    (expected,) = torch.autograd.grad((vectors * away).sum(), z)
    assert_same_in_float64(pull, expected, 3)


def test_autocast_and_bfloat16_vectors_are_quantised_in_float32():
    model = VectorQuantiser(9, 3)
    z = maps(2, 3, 4, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quantised, codes, commitment = model(z)
    assert quantised.dtype == commitment.dtype == model.new_sums.dtype == torch.float32
    assert torch.equal(codes.flatten(), torch.cdist(rows(z.float()), model.weight).argmin(1))


# --- what a batch teaches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_moving_averages_equal_those_written_by_hand(normalised):
    model = quantiser(decay=0.9, normalised=normalised)
    counts, weight = model.counts.clone(), model.weight.clone()
    for seed in range(3):
        z = maps(2, 3, 4, 5, seed=seed)
        codes = model.nearest(z).flatten()
        model(z)
        vectors = torch.nn.functional.normalize(rows(z), dim=1) if normalised else rows(z)
        new_counts, new_weight = counts.clone(), weight.clone()
        for k in range(9):
            mine = vectors[codes == k]
            new_counts[k] = 0.9 * counts[k] + 0.1 * len(mine)
            new_weight[k] = (0.9 * counts[k] * weight[k] + 0.1 * mine.sum(0)) / new_counts[k]
        counts, weight = new_counts, torch.nn.functional.normalize(new_weight, dim=1) if normalised else new_weight
        model.update()
        assert_same_in_float64(model.counts, counts, 40)
        assert_same_in_float64(model.weight, weight, 40)
    assert model.updates == 3


def test_a_batch_moves_the_codebook_when_the_next_one_comes():
    model = quantiser()
    weight = model.weight.clone()
    model(maps(2, 3, 4, 5))
    assert torch.equal(model.weight, weight)
    model.eval()(maps(2, 3, 4, 5))
    assert torch.equal(model.weight, weight)
    model.train()(maps(2, 3, 4, 5))
    assert not torch.equal(model.weight, weight) and model.updates == 1


def test_codes_without_vectors_stay_bit_for_bit():
    model = quantiser(revive_below=0.0)
    with torch.no_grad():
        model.weight[4] = 1000.0
    model(maps(1, 3, 2, 2))
    for _ in range(3000):  # until its count is below what is divided by
        model.collected.fill_(1)
        model.update()
    assert torch.equal(model.weight[4], torch.full((3,), 1000.0).double())
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_meets_the_same_codes_and_counts_once(use_reentrant):
    models, gradients = (quantiser(), quantiser()), ([], [])
    for seed in range(3):
        for model, found, repeated in zip(models, gradients, (False, True), strict=True):

            def loss(z, model=model):
                quantised, _, commitment = model(z)
                return (3 * quantised.sin()).sum() + commitment

            z = maps(2, 3, 4, 5, seed=seed).requires_grad_()
            (checkpoint(loss, z, use_reentrant=use_reentrant) if repeated else loss(z)).backward()
            found.append(z.grad)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert same_state(*models)


def test_accumulated_parts_teach_what_the_whole_batch_does():
    whole, parts = quantiser(), quantiser()
    parts.batches_per_update = 3
    for seed in range(4):
        z = maps(6, 3, 2, 2, seed=seed)
        whole(z)
        for part in z.split(2):
            parts(part)
    assert whole.updates == parts.updates == 3
    assert_same_in_float64(parts.weight, whole.weight, 24)
    assert torch.equal(parts.counts, whole.counts)


def test_a_saved_state_goes_on_bit_for_bit():
    first, second = quantiser(placed=False, decay=0.5, revive_below=0.5), quantiser(placed=False, decay=0.5)
    second.revive_below = 0.5
    for seed in range(14):
        first(maps(1, 3, 2, 3, seed=seed))
    second.load_state_dict(first.state_dict())
    for seed in range(14, 25):
        first(maps(1, 3, 2, 3, seed=seed))
        second(maps(1, 3, 2, 3, seed=seed))
    assert first.revived > 0
    assert same_state(first, second)


def test_an_empty_batch_teaches_nothing():
    for placed in (False, True):
        model = quantiser(placed=placed)
        before = quantiser(placed=placed)
        quantised, codes, _ = model(maps(0, 3, 4, 5))
        model.update()
        assert quantised.shape == (0, 3, 4, 5) and codes.shape == (0, 4, 5)
        assert same_state(model, before)


# --- where codes are placed -------------------------------------------------------------------------------------------


def test_the_first_batch_places_the_codes_on_its_vectors():
    model = quantiser(placed=False)
    z = maps(2, 3, 4, 5)
    _, codes, _ = model(z)
    assert model.started
    is_vector = (model.weight[:, None] == rows(z)).all(2).any(1)
    assert is_vector.all()
    assert len(codes.unique()) == 9
    other = quantiser(placed=False, seed=1)
    other(z)
    assert not torch.equal(other.weight, model.weight)


def test_fewer_vectors_than_codes():
    model = quantiser(num_codes=40, placed=False)
    z = maps(1, 3, 2, 3)
    quantised, _, commitment = model(z)
    assert commitment == 0 and torch.equal(quantised, z)


def test_spread_sample_takes_distinct_places_while_there_are_some():
    vectors = torch.tensor([[0.0], [0.0], [0.0], [5.0], [9.0]])
    assert spread_sample(vectors, 3, torch.Generator().manual_seed(0)).flatten().sort().values.tolist() == [0, 5, 9]
    many = torch.arange(2000.0)[:, None]
    chosen = spread_sample(many, 1100, torch.Generator().manual_seed(0))  # three a round
    assert chosen.shape == (1100, 1) and len(chosen.unique()) == 1100


def test_spread_sample_tells_near_places_apart_far_from_the_origin():
    far, *near = torch.randn(21, 64, generator=torch.Generator().manual_seed(1))
    vectors = torch.cat(((100 * far).expand(1000, 64), 100 * far + 1e-2 * torch.stack(near)))
    with torch.autocast("cpu", torch.bfloat16):
        chosen = spread_sample(vectors, 20, torch.Generator().manual_seed(0))
    assert len(chosen.unique(dim=0)) == 20


def test_codes_that_nobody_uses_are_moved_where_the_error_is():
    model = quantiser(num_codes=2, dim=1, decay=0.5, revive_below=0.2)
    model.weight.copy_(torch.tensor([[0.0], [100.0]]))
    z = torch.cat((torch.zeros(6), torch.full((2,), 9.0))).double().view(1, 1, 2, 4)
    for _ in range(10):
        model(z)
        assert model.revived == 0 and model.weight[1] == 100, "too early: nobody has looked yet"
    _, codes, _ = model(z)
    assert model.revived == 1 and model.weight[1] == 9
    assert codes.flatten().tolist() == [0] * 6 + [1] * 2, "a moved code is used at once"


def test_a_moved_code_has_time_to_be_used():
    """Whatever the threshold, it starts at twice that and falls with the decay: 0.95 ** 10 is above a half."""
    model = quantiser(num_codes=2, dim=1, decay=0.95, revive_below=3.0)
    model.weight.copy_(torch.tensor([[0.0], [100.0]]))
    model.counts.copy_(torch.tensor([8.0, 0.0]))
    nothing, far = torch.zeros(1, 1, 2, 4).double(), torch.full((1, 1, 2, 4), 9.0).double()
    for z in (*[nothing] * 10, far, *[nothing] * 10):
        model(z)
    assert model.updates == 20 and model.revived == 1 and model.weight[1] == 9
    for _ in range(10):
        model(nothing)
    assert model.revived == 2


def test_no_code_is_moved_with_revival_off():
    model = quantiser(num_codes=2, dim=1, decay=0.5, revive_below=0.0)
    model.weight.copy_(torch.tensor([[0.0], [100.0]]))
    for _ in range(25):
        model(torch.ones(1, 1, 2, 4).double())
    assert model.revived == 0 and model.weight[1] == 100


# --- several processes ------------------------------------------------------------------------------------------------


def train(model, batches):
    for z in batches:
        model(z)
    model.update()
    return model


def uneven(batches, rank):
    """The part of each batch of six that a rank has: two samples, then four."""
    return [z[:2] if rank == 0 else z[2:] for z in batches]


BATCHES = [maps(6, 3, 2, 2, seed=seed) for seed in range(24)]
SETTINGS = {"num_codes": 15, "placed": False, "decay": 0.5, "revive_below": 0.4}


def one_of_two(rank, folder):
    with meeting(rank, folder):
        model = train(quantiser(**SETTINGS), uneven(BATCHES, rank))
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_teach_what_one_with_the_whole_batch_does(tmp_path):
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = train(quantiser(**SETTINGS), BATCHES)
    assert whole.revived > 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(one[name], two[name]), f"{name} differs between the processes"
        if tensor.is_floating_point():
            assert_same_in_float64(one[name], tensor, 100, name)
        else:
            assert torch.equal(one[name], tensor), name


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "VectorQuantiser: num_codes and dim must be at least 1, got 0 and 2."),
        ({"decay": 1.0}, "VectorQuantiser: decay must be in 0 .. below 1, got 1.0."),
        ({"decay": -0.1}, "VectorQuantiser: decay must be in 0 .. below 1, got -0.1."),
        ({"revive_below": -1.0}, "VectorQuantiser: revive_below must be 0 or more, got -1.0."),
    ],
)
def test_refuses_impossible_arguments(options, message):
    with pytest.raises(ValueError) as raised:
        VectorQuantiser(**{"num_codes": 4, "dim": 2, **options})
    assert str(raised.value).startswith(message)


def test_refuses_to_learn_in_sixteen_bits():
    model = VectorQuantiser(4, 3).bfloat16()
    with pytest.raises(TypeError, match=r"must be float32 or float64 in training, got torch\.bfloat16"):
        model(maps(1, 3, 2, 2))
    assert model.eval()(maps(1, 3, 2, 2))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("updates", [None, 3, 9])
def test_refuses_to_learn_what_is_not_finite_and_keeps_what_it_knew(updates):
    """In the batch that would place the codes, in any other, and in one that dead codes would be moved to."""
    model = quantiser(placed=updates is not None, revive_below=2.0)
    for _ in range(1 + updates if updates else 0):
        model(maps(1, 3, 2, 2))
    model.counts.zero_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    z = maps(1, 3, 2, 2)
    z[0, 1, 0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"vectors must be finite in training, got nan or infinity in 1\."):
        model(z)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 5, 5)])
def test_refuses_what_are_no_maps_of_its_width(shape):
    for call in (quantiser(), quantiser().nearest, quantiser().start):
        with pytest.raises(ValueError, match=r"VectorQuantiser: z must be \[B, D=3, h, w\], got \[2, "):
            call(maps(*shape))
