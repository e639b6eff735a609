"""Tasks under FSDP2, sharded by the layers that docs/training.md names: the losses and gradients of one process."""

import pytest
import torch
import torch.multiprocessing as mp
from tiny_tasks import WORDS, batch_of, dalle_config, vae, vae_config
from torch import distributed
from two_processes import meeting

from dalle_fast.training.tasks.dalle import DalleTask
from dalle_fast.training.tasks.vae import VaeTask


class Words:
    """Stands for a tokenizer where only its size matters."""

    vocab_size = len(WORDS)


def tasks():
    torch.manual_seed(0)
    return {
        "dalle": DalleTask(dalle_config(), vae(), Words(), None, 3.0),
        "end to end": DalleTask(dalle_config(end_to_end=True), vae(), Words(), None, 3.0),
        "gumbel": VaeTask(vae_config(kl={"start": 1.0, "end": 1.0, "steps": 1})),
        "vq": VaeTask(vae_config(model={"quantizer": "vq"})),
    }


def losses_of(rank, folder):
    from torch.distributed.fsdp import fully_shard

    with meeting(rank, folder):
        mesh = distributed.init_device_mesh("cpu", (2,))
        found = {}
        for name, task in tasks().items():
            for layer in [m for m in task.module.modules() if type(m).__name__ == "Branch"]:
                fully_shard(layer, mesh=mesh)
            module = fully_shard(task.module, mesh=mesh)
            loss, _ = module(batch_of(2, first=2 * rank), 0, 0.0)
            loss.backward()
            mean = loss.detach() / 2
            distributed.all_reduce(mean)
            gradients = {n: p.grad.full_tensor() for n, p in task.parameters_for()}
            found[name] = mean, gradients
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.long
def test_sharded_tasks_learn_what_whole_ones_do(tmp_path):
    mp.spawn(losses_of, args=(str(tmp_path),), nprocs=2)
    sharded = torch.load(tmp_path / "0.pt")
    for name, task in tasks().items():
        loss, _ = task.module(batch_of(4), 0, 0.0)
        loss.backward()
        torch.testing.assert_close(sharded[name][0], loss.detach(), msg=name)
        for parameter_name, parameter in task.parameters_for():
            torch.testing.assert_close(sharded[name][1][parameter_name], parameter.grad, msg=f"{name} {parameter_name}")
