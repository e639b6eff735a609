"""Folders of DeepSpeed: float32 weights put together from the ranks' parts, and what cannot be."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from record_releases import inputs

from dalle_fast.compat.checkpoints import upstream_checkpoint
from dalle_fast.compat.formats.base import Companions
from dalle_fast.compat.formats.deepspeed import NAME
from dalle_fast.compat.formats.recognise import recognise
from dalle_fast.compat.reading import read
from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE

FLAT, DEALT = "single_partition_of_fp32_groups", "local_sub_partitions_of_fp32_groups"


def dalle(**changes):
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=16, num_tokens=12, codebook_dim=6, num_layers=2, hidden_dim=4)
    sizes = {"dim": 24, "num_text_tokens": 9, "text_seq_len": 4, "depth": 3, "heads": 2, "dim_head": 12}
    return DALLE(vae=vae, **sizes, **changes, shared_attn_ids=(0, 1, 0)).eval()


def write_folder(folder, model, *, ranks=2, stage=2, half=True, padded=True, groups=2, step=7, told="list"):
    """What train_dalle.py leaves: groups of trained parameters, each one vector cut into as many parts as ranks."""
    checkpoint = upstream_checkpoint(model)
    weights = checkpoint.pop("weights")
    inside = folder / f"global_step{step}"
    inside.mkdir(parents=True)
    torch.save({**checkpoint, "weights": "To get a working standard checkpoint, ..."}, folder / "auxiliary.pt")
    (folder / "latest").write_text(inside.name)
    seen: set[int] = set()
    trained = []
    for name, tensor in weights.items():
        if not name.startswith("vae.") and not name.endswith("pos_emb") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            trained.append(name)
    shapes = [OrderedDict((n, weights[n].shape) for n in trained[g::groups]) for g in range(groups)]
    narrow = {}  # tensors that are one stay one
    for tensor in weights.values():
        narrow.setdefault(tensor.data_ptr(), tensor.half() if half else tensor)
    module = OrderedDict((name, narrow[tensor.data_ptr()]) for name, tensor in weights.items())
    states = {"module": module, "dp_world_size": ranks, "global_steps": step, "ds_version": "0.5.4"}
    if told != "nothing":
        states["param_shapes"] = shapes if told == "list" else shapes[0]
    torch.save(states, inside / "mp_rank_00_model_states.pt")
    for rank in range(ranks) if stage else ():
        parts = []
        for group in shapes:
            flat = torch.cat([weights[name].flatten() for name in group])
            size = -(-len(flat) // (2 * ranks)) * 2
            part = torch.nn.functional.pad(flat, (0, size * ranks - len(flat)))[rank * size : (rank + 1) * size]
            parts.append(part.clone() if padded else flat[rank * size : (rank + 1) * size].clone())
        optimiser = {"zero_stage": stage, "partition_count": [ranks] * groups, FLAT: parts, "overflow": False}
        torch.save({"optimizer_state_dict": optimiser}, inside / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def made(folder):
    stored = read(folder)
    known = recognise(stored)
    assert known.name == NAME
    return known.load(stored, Companions())


def assert_same(model, wanted):
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(*inputs()), wanted(*inputs()))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_float32_weights_of_all_ranks_are_put_together(ranks, stage, padded, tmp_path):
    model = dalle()
    folder = write_folder(tmp_path / "dalle-ds-cp", model, ranks=ranks, stage=stage, padded=padded)
    again = made(folder)
    # the frozen VAE and the positions are in no rank's part: they are what the module had
    wanted = dalle(rotary_dtype="float16")
    wanted.vae.load_state_dict({name: tensor.half().float() for name, tensor in model.vae.state_dict().items()})
    assert_same(again, wanted)
    assert again.transformer.blocks[0].attn.fn is again.transformer.blocks[2].attn.fn


def test_parts_that_were_dealt_out_in_turns(tmp_path):
    """ZeRO 1 of older releases: part i of a group is with rank i % ranks."""
    model = dalle()
    folder = write_folder(tmp_path / "d", model, ranks=1, groups=1)
    path = folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    optimiser = torch.load(path, weights_only=True)["optimizer_state_dict"]
    (flat,) = optimiser.pop(FLAT)
    parts = flat.split(-(-len(flat) // 6))
    for rank in range(2):
        mine = {**optimiser, "partition_count": 2, "zero_stage": 1, DEALT: [list(parts[rank::2])]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": mine}, path.with_name(name))
    assert torch.equal(made(folder).to_logits.weight, model.to_logits.weight)
    torch.save({"optimizer_state_dict": optimiser}, path)
    path.with_name("zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="must hold group 0 of the weights as single_partition_of_fp32_groups"):
        made(folder)


def test_one_group_as_older_releases_told_it(tmp_path):
    model = dalle()
    again = made(write_folder(tmp_path / "d", model, groups=1, told="dict"))
    assert torch.equal(again.to_logits.weight, model.to_logits.weight)


@pytest.mark.parametrize("options", [{"stage": 0}, {"told": "nothing"}], ids=["ZeRO 0", "no param_shapes"])
def test_without_float32_weights_the_modules_are_taken(options, tmp_path):
    model = dalle()
    again = made(write_folder(tmp_path / "d", model, **options))
    assert again.to_logits.weight.dtype == torch.float16 and again.vae.codebook.weight.dtype == torch.float32
    assert torch.equal(again.to_logits.weight, model.to_logits.weight.half())


def test_a_float32_module_needs_no_parts(tmp_path):
    model = dalle()
    folder = write_folder(tmp_path / "d", model, half=False)
    (folder / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert_same(made(folder), model)


def test_the_newest_step_is_the_one_that_latest_names(tmp_path):
    first, second = dalle(), dalle()
    with torch.no_grad():
        second.to_logits.weight.add_(1)
    folder = write_folder(tmp_path / "d", first, step=9)
    write_folder(folder, second, step=10)
    assert torch.equal(made(folder).to_logits.weight, second.to_logits.weight)
    (folder / "latest").write_text("global_step9")
    assert torch.equal(made(folder).to_logits.weight, first.to_logits.weight)
    for name in ("../elsewhere", "..", ".", str(folder.parent), "global_step11"):
        (folder / "latest").write_text(name)
        assert torch.equal(made(folder).to_logits.weight, second.to_logits.weight)


def test_it_is_described_without_its_parts(tmp_path):
    folder = write_folder(tmp_path / "d", dalle())
    for part in (folder / "global_step7").glob("zero_*"):
        part.write_bytes(b"not read")
    stored = read(folder)
    told = recognise(stored).describe(stored)
    assert (told.kind, told.problem) == ("DALLE", "") and told.architecture["dtype"] == "float16"


def test_zero_3_is_refused_in_a_sentence(tmp_path):
    folder = write_folder(tmp_path / "d", dalle(), stage=3)
    with pytest.raises(ValueError, match=r"of ZeRO stage 0, 1 or 2, got stage 3.*zero_to_fp32\.py"):
        made(folder)
    (folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    stored = read(folder)
    assert "got stage 3" in recognise(stored).describe(stored).problem
    with pytest.raises(ValueError, match="got stage 3"):
        made(folder)


def test_what_is_missing_is_named(tmp_path):
    folder = write_folder(tmp_path / "d", dalle(), ranks=3)
    inside = folder / "global_step7"
    last = inside / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match="of 3 ranks, got those of 2"):
        made(folder)
    last.write_bytes(kept)
    (inside / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="of every rank, got those of ranks 0, 2"):
        made(folder)
    (inside / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"must hold mp_rank_00_model_states\.pt, got none"):
        made(folder)
    for path in inside.iterdir():
        path.unlink()
    inside.rmdir()
    with pytest.raises(ValueError, match="must hold folders global_stepN, got none"):
        made(folder)


def test_shapes_that_are_not_those_of_the_module_are_named(tmp_path):
    folder = write_folder(tmp_path / "d", dalle(), ranks=1, groups=1)
    path = folder / "global_step7" / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=True)
    for shape in ((1 << 40, 1 << 40), (-1,), "x", 3, torch.zeros(2)):
        states["param_shapes"] = [{"to_logits.1.weight": shape}]
        torch.save(states, path)
        with pytest.raises(ValueError, match=r"must be those of the module, got others for to_logits\.1\.weight"):
            made(folder)


def test_parts_of_another_step_are_refused(tmp_path):
    folder = write_folder(tmp_path / "d", dalle(), ranks=1)
    path = folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states = torch.load(path, weights_only=True)
    states["optimizer_state_dict"][FLAT][0] = states["optimizer_state_dict"][FLAT][0][:-5]
    torch.save(states, path)
    with pytest.raises(ValueError, match="Are the files of one step"):
        made(folder)
