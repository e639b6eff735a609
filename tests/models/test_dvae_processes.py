"""DiscreteVAE under DistributedDataParallel: two processes train what one does with the batch of both."""

import pytest
import torch
import torch.multiprocessing as mp
from tolerance import assert_same_in_float64
from torch.nn.parallel import DistributedDataParallel
from two_processes import meeting

from dalle_fast import DiscreteVAE

SMALL = {"image_size": 16, "num_tokens": 20, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4}
SETTINGS = {"gumbel": {}, "vq": {"codebook_decay": 0.5, "revive_codes_below": 0.5}}
N_POSITIONS = 4 * 4


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(13)]


def vae(quantizer):
    torch.manual_seed(0)
    return DiscreteVAE(**SMALL, quantizer=quantizer, **SETTINGS[quantizer]).double()


def trained(model, quantizer, first=0, last=4):
    """The state after a step of SGD on pictures first..last - 1 of each batch, for a loss that is their mean."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    for step, images in enumerate(batches()):
        noise = {"seed": step, "first_row": first * N_POSITIONS} if quantizer == "gumbel" else {}
        loss = model(images[first:last], return_loss=True, **noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if quantizer == "vq":
        inner.codebook.update()
    return inner.state_dict()


def one_of_two(rank, quantizer, folder):
    with meeting(rank, folder):
        state = trained(DistributedDataParallel(vae(quantizer)), quantizer, 2 * rank, 2 * rank + 2)
        torch.save(state, f"{folder}/{rank}.pt")


@pytest.mark.long
@pytest.mark.parametrize("quantizer", SETTINGS)
def test_two_processes_train_what_one_with_the_whole_batch_does(quantizer, tmp_path):
    mp.spawn(one_of_two, args=(quantizer, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = trained(vae(quantizer), quantizer)
    assert quantizer == "gumbel" or whole["codebook.revived"] > 0
    for name, tensor in whole.items():
        assert torch.equal(one[name], two[name]), f"{name} differs between the processes"
        if tensor.is_floating_point():
            # steps, times pictures and pixels that a gradient is summed over
            assert_same_in_float64(one[name], tensor, 13 * 4 * 16 * 16, name)
        else:
            assert torch.equal(one[name], tensor), name
