"""Which samples a step takes: every sample once an epoch, the same for any split over processes and any restart."""

import pickle

import pytest
import torch

from dalle_fast.training.order import Draw, StepOrder, Stream, epoch_order, generator, is_held_out


def order(n=10, **options):
    settings = {"batch": 4, "micro_batch": 4, "rank": 0, "world": 1, "seed": 3, "first_step": 0, "steps": 10}
    return StepOrder(n, **{**settings, **options})


def flat(batches):
    return [draw for batch in batches for draw in batch]


def test_every_sample_is_taken_once_an_epoch_and_batches_straddle_epochs():
    draws = flat(order())
    assert [draw.position for draw in draws] == list(range(40))
    epochs = [[draw.index for draw in draws[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_hold_several_epochs_of_few_samples():
    draws = flat(order(n=1, steps=2))
    assert draws == [Draw(0, position) for position in range(8)]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 6), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_processes_and_accumulation_split_a_step_and_change_nothing(world, micro_batch):
    whole = list(order(batch=12, micro_batch=12, steps=3))
    ranks = [list(order(batch=12, micro_batch=micro_batch, world=world, rank=r, steps=3)) for r in range(world)]
    assert all(len(rank) == 3 * 12 // (world * micro_batch) for rank in ranks)
    together = [ranks[r][a] for a in range(len(ranks[0])) for r in range(world)]
    assert flat(together) == flat(whole)
    assert len(order(batch=12, micro_batch=micro_batch, world=world)) == 10 * 12 // (world * micro_batch)


def test_a_resumed_run_goes_on_where_it_stopped():
    assert flat(order(first_step=4, steps=6)) == flat(order())[16:]


def test_seeds_and_epochs_order_differently_and_repeatably():
    assert flat(order()) == flat(order())
    assert flat(order(seed=4)) != flat(order())
    assert torch.equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert not torch.equal(epoch_order(50, 1, 2), epoch_order(50, 1, 3))


def test_draws_depend_on_seed_position_and_stream_only():
    def drawn(*key):
        return tuple(torch.rand(4, generator=generator(*key)).tolist())

    keys = [(seed, position, stream) for seed in (0, 1, 2**63 - 1) for position in range(30) for stream in Stream]
    assert len({drawn(*key) for key in keys}) == len(keys)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert drawn(0, 7) == drawn(0, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_of_neighbouring_positions_are_unrelated():
    first = torch.stack([torch.rand(2, generator=generator(0, position)) for position in range(4000)]).double()
    assert (first.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 4000) ** 0.5
    pairs = torch.stack([first[:-1, 0], first[1:, 0], first[:-1, 1]])
    correlations = torch.corrcoef(pairs)[0, 1:]
    assert correlations.abs().max() < 5 / 4000**0.5


def test_the_held_out_share_is_kept_and_grows_by_adding():
    keys = [f"folder/{i}" for i in range(5000)]
    few, more = ({key for key in keys if is_held_out(key, share)} for share in (0.1, 0.2))
    assert few < more
    assert abs(len(few) / 5000 - 0.1) < 5 * (0.09 / 5000) ** 0.5
    assert not any(is_held_out(key, 0.0) for key in keys)


def test_a_batch_that_does_not_split_and_no_data_are_sentences():
    with pytest.raises(ValueError, match="got 4 for 3 x 1"):
        order(micro_batch=3)
    with pytest.raises(ValueError, match="got 4 for 4 x 2"):
        order(world=2)
    with pytest.raises(ValueError, match="at least one sample"):
        order(n=0)


def test_it_travels_to_workers():
    assert flat(pickle.loads(pickle.dumps(order()))) == flat(order())
