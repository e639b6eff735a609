"""What training logs say of a codebook: counts, perplexity, errors, over steps and processes, and what they cost."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode
from two_processes import meeting

from dalle_fast import DiscreteVAE
from dalle_fast.models.dvae import ForwardStatistics
from dalle_fast.training.codebook_usage import CodebookUsage, TrainingStatistics

SMALL = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4}


def vae(**changes):
    torch.manual_seed(0)
    return DiscreteVAE(**{**SMALL, **changes}).double()


def pictures(batch, seed=1, size=16):
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model, images, **options):
    return model(images, return_loss=True, return_statistics=True, **options)[1]


def test_counts_dead_codes_and_perplexity():
    usage = CodebookUsage(5)
    assert (usage.used, usage.dead, usage.perplexity) == (0, 5, 1.0)
    usage.add(torch.tensor([[0, 0], [3, 0]]))
    usage.add(torch.tensor([3, 4, 4, 3]))
    usage.add(torch.tensor([], dtype=torch.int64))
    assert usage.counts.tolist() == [3, 0, 0, 3, 2]
    assert (usage.used, usage.dead) == (3, 2)
    entropy = -(2 * 3 / 8 * math.log(3 / 8) + 2 / 8 * math.log(2 / 8))
    assert usage.perplexity == pytest.approx(math.exp(entropy))
    usage.clear()
    usage.add(torch.arange(5))
    assert usage.perplexity == pytest.approx(5)


def test_a_row_is_what_the_steps_were():
    model = vae()
    usage = TrainingStatistics(model, pictures_per_hard_one=1)
    batches, seen = [pictures(3), pictures(5, seed=2)], []
    for images in batches:
        loss, recons, statistics = model(images, return_loss=True, return_recons=True, return_statistics=True)
        usage.add(images, statistics)
        seen.append((recons.detach(), statistics))
        assert loss == statistics.reconstruction and statistics.penalty is None
    row = usage.row()

    images = torch.cat(batches)
    codes = model.get_codebook_indices(images)
    drawn = torch.cat([s.noisy_codes.flatten() for _, s in seen])
    recons = torch.cat([recons for recons, _ in seen])
    soft = (recons - model.norm(images)).square().mean().item()
    hard = (model.decode(codes) - model.norm(images)).square().mean().item()
    by_hand, by_hand_drawn = CodebookUsage(12), CodebookUsage(12)
    by_hand.add(codes)
    by_hand_drawn.add(drawn)
    assert row == pytest.approx(
        {
            "codes_used": len(codes.unique()),
            "codes_dead": 12 - len(codes.unique()),
            "perplexity": by_hand.perplexity,
            "perplexity_drawn": by_hand_drawn.perplexity,
            "error_soft": soft,
            "error_hard": hard,
        }
    )
    assert soft != hard and not torch.equal(codes.flatten(), drawn)
    empty = usage.row()
    assert empty["codes_used"] == 0 and math.isnan(empty["error_soft"]) and math.isnan(empty["error_hard"])


@pytest.mark.parametrize(("batches", "decoded"), [([8] * 4, [1, 1]), ([1] * 33, [1, 1]), ([40, 40], [2, 3]), ([0], [])])
def test_one_picture_in_sixteen_is_decoded_again(batches, decoded):
    model, sizes = vae(), []
    usage = TrainingStatistics(model)
    for batch in batches:
        images = pictures(batch)
        statistics = step(model, images)
        hook = model.decoder.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
        usage.add(images, statistics)
        hook.remove()
    assert sizes == decoded


def test_vq_decodes_its_codes_in_training_and_nothing_again():
    model = vae(quantizer="vq")
    usage, images = TrainingStatistics(model), pictures(20)
    statistics = step(model, images)
    hard = (model.decode(statistics.codes.flatten(1)) - model.norm(images)).square().mean().item()
    hook = model.decoder.register_forward_hook(lambda module, given, out: pytest.fail("decoded again"))
    usage.add(images, statistics)
    hook.remove()
    row = usage.row()
    assert row["error_soft"] == row["error_hard"] == pytest.approx(hard)
    assert row["perplexity"] == row["perplexity_drawn"]


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("n_blocks", [0, 2])
def test_products_of_the_log_are_few_beside_those_of_training(batch, n_blocks):
    """Over sixteen pictures or more; the products of the bottleneck, a good part of a step, are not even counted."""
    model = DiscreteVAE(image_size=32, num_tokens=64, codebook_dim=64, num_layers=3, num_resnet_blocks=n_blocks)
    usage, images = TrainingStatistics(model), torch.rand(batch, 3, 32, 32)
    of_training = of_log = 0
    for _ in range(-(-16 // batch)):
        with FlopCounterMode(display=False) as counter:
            loss, statistics = model(images, return_loss=True, return_statistics=True)
            loss.backward()
        of_training += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            usage.add(images, statistics)
        of_log += counter.get_total_flops()
    assert 0 < of_log < 0.05 * of_training


def rows_of_two(rank, folder):
    with meeting(rank, folder):
        torch.save(row_of(rank), f"{folder}/{rank}.pt")


def row_of(rank=None):
    """Of four pictures with given codes, or of the part of them that a rank has."""
    model = vae()
    usage, images = TrainingStatistics(model, pictures_per_hard_one=1), pictures(4)
    codes = torch.arange(4 * 16).view(4, 4, 4) % 11
    for i in range(4):
        if rank is None or i // 2 == rank:
            one = slice(i, i + 1)
            error = torch.tensor(float(i), dtype=torch.float64)
            usage.add(images[one], ForwardStatistics(codes[one], codes[one] // 2, error, None))
    return usage.row()


def test_two_processes_report_what_both_did(tmp_path):
    mp.spawn(rows_of_two, args=(str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = row_of()
    assert one == two == pytest.approx(whole)
    assert whole["codes_used"] == 11 and whole["error_soft"] == 1.5


def test_refuses_to_measure_more_than_all():
    with pytest.raises(ValueError, match="pictures_per_hard_one must be at least 1, got 0"):
        TrainingStatistics(vae(), pictures_per_hard_one=0)


def test_refuses_a_wrapped_model_and_what_is_no_step():
    wrapped = torch.nn.Sequential(vae())
    with pytest.raises(TypeError, match=r"TrainingStatistics: vae must be a DiscreteVAE, got Sequential\."):
        TrainingStatistics(wrapped)
    usage = TrainingStatistics(vae())
    with pytest.raises(TypeError, match=r"statistics must be ForwardStatistics, got Tensor\."):
        usage.add(pictures(2), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"images must be the 2 that forward took, got 3\."):
        usage.add(pictures(3), step(usage.vae, pictures(2)))
    assert math.isnan(usage.row()["error_soft"])


@pytest.mark.parametrize("codes", [[5], [-1, 4]])
def test_refuses_codes_that_are_none(codes):
    usage = CodebookUsage(5)
    with pytest.raises(ValueError, match=rf"codes must be in 0\.\.4, got {min(codes)}\.\.{max(codes)}\."):
        usage.add(torch.tensor(codes))
    with pytest.raises(TypeError, match=r"codes must be int64, got torch\.float32\."):
        usage.add(torch.zeros(2))
    assert usage.used == 0
