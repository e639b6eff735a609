"""Models that take weights as they are: parameters without values, files written and read tensor by tensor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import prompts, small_dalle
from torch import nn

from dalle_fast.models.dalle import DALLE
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.models.state_dicts import aliases, tie_again
from dalle_fast.models.transformer import Transformer
from dalle_fast.models.unfilled import unfilled
from dalle_fast.models.weights_file import read_weights, write_weights


def codes(n=64):
    return torch.randint(30, (2, n), generator=torch.Generator().manual_seed(5))


def twin_of(model):
    """Another one of the same arguments, built where the caller says."""
    return type(model)(**{**model.config, "vae": DiscreteVAE(**model.vae.config)})


# -------------------------------------------------------------------------------------------- parameters without values


@pytest.mark.parametrize("options", [{}, {"rotary_emb": False, "attn_types": "sparse"}, {"shared_ff_ids": (0, 1)}])
@pytest.mark.parametrize("how", ["unfilled", "meta"])
def test_a_model_built_without_values_computes_what_it_is_given(how, options):
    model = small_dalle(torch.float32, **options)
    state = torch.get_rng_state()
    with unfilled() if how == "unfilled" else torch.device("meta"):
        again = twin_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_meta for p in again.parameters())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = aliases(again.state_dict(keep_vars=True))
    assert tied == aliases(model.state_dict())
    again.load_state_dict(weights, assign=True)
    tie_again(again, tied)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert again.to_logits.weight.data_ptr() == weights["to_logits.weight"].data_ptr()
    assert torch.equal(again.eval()(prompts(2), codes()), model(prompts(2), codes()))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_a_meta_model_leaves_patterns_and_angles_real():
    with torch.device("meta"):
        transformer = Transformer(
            dim=8, depth=1, seq_len=12, heads=2, dim_head=8, image_fmap_size=3, attn_types="sparse"
        )
    assert not transformer.angles.is_meta and transformer.to_empty(device="cpu").angles.isfinite().all()
    dense = transformer.blocks[0].attn.fn.pattern.dense()
    assert not dense.is_meta and dense.diagonal().all()


def test_only_this_thread_builds_without_values_and_only_inside():
    built = []
    with unfilled():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        mine = nn.Linear(2, 2)
        mine.other = mine.weight
    assert mine.weight.is_meta and mine.other is mine.weight and not built[0].weight.is_meta
    with pytest.raises(KeyError), unfilled():
        raise KeyError
    assert not nn.Linear(2, 2).weight.is_meta


def test_parameters_that_were_one_are_one_again():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = aliases(model.state_dict(keep_vars=True))
    assert tied == {"b.weight": "a.weight"}
    model.load_state_dict(state, assign=True)
    tie_again(model, tied)
    assert model["b"].weight is model["a"].weight and model["b"].bias is not model["a"].bias


# ------------------------------------------------------------------------------------------------- the VAE in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_of_a_model_in_16_bits_is_float32(dtype):
    model = small_dalle(torch.float32)
    exact = model.vae.state_dict()
    exact = {name: tensor.clone() for name, tensor in exact.items()}
    model = model.half() if dtype == torch.float16 else model.bfloat16()
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("vae.")} == {dtype}
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(tensor, exact[name]), name
    assert model.float().to_logits.weight.dtype == torch.float32
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_pixels_in_16_bits_are_read_by_a_float32_vae():
    model = small_dalle(torch.float32).bfloat16()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = model(prompts(2), model.vae.get_codebook_indices(pixels.float()))
    assert torch.equal(model(prompts(2), pixels), wanted)


def test_under_autocast_pixels_have_the_codes_that_they_have_without():
    model = small_dalle(torch.float32)
    dtypes = []
    model.vae.encoder[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = model.vae.get_codebook_indices(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(prompts(2), pixels)
        assert torch.equal(logits, model(prompts(2), wanted))
    assert set(dtypes) == {torch.float32} and logits.dtype == torch.bfloat16


def test_a_saved_model_in_16_bits_has_a_float32_vae(tmp_path):
    model = small_dalle(torch.float32)
    model.save_pretrained(tmp_path / "model")
    again = DALLE.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert again.to_logits.weight.dtype == torch.bfloat16
    assert torch.equal(again.vae.codebook.weight, model.vae.codebook.weight)


# --------------------------------------------------------------------------------------------------- files of weights


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(3, 5, generator=generator),
        "turned": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 3, generator=generator).bfloat16(),
        "double": torch.randn(3, generator=generator).double(),
        "scalar": torch.tensor(4),
        "flag": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 3),
        "byte": torch.arange(5, dtype=torch.uint8),
    }


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    given = tensors()
    write_weights(tmp_path / "a", given)
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "b")
    for read in (load_file(tmp_path / "a"), read_weights(tmp_path / "a"), read_weights(tmp_path / "b")):
        assert read.keys() == given.keys()
        for name, tensor in given.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_floating_tensors_are_converted_on_the_way(tmp_path):
    given = tensors()
    write_weights(tmp_path / "a", given, torch.bfloat16)
    for name, tensor in read_weights(tmp_path / "a", torch.float32).items():
        floating = given[name].is_floating_point()
        wanted = given[name].to(torch.bfloat16).float() if floating else given[name]
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    assert given["wide"].dtype == torch.float32


def test_damaged_files_are_refused(tmp_path):
    write_weights(tmp_path / "a", tensors())
    whole = (tmp_path / "a").read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:cut])
        with pytest.raises((ValueError, OSError)):
            read_weights(tmp_path / "a")
    with pytest.raises(TypeError, match=r"must be of a dtype safetensors knows, got torch\.complex64"):
        write_weights(tmp_path / "b", {"a": torch.zeros(1, dtype=torch.complex64)})


MEASURED = """if True:
    import resource, sys, torch
    from dalle_fast import DALLE, DiscreteVAE
    from dalle_fast.models.unfilled import unfilled

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    folder = sys.argv[1]
    if sys.argv[2] == "write":
        model = DALLE(vae=DiscreteVAE(image_size=16, num_layers=2), dim=512, depth=8, num_text_tokens=500)
        model.half().save_pretrained(folder)
    else:
        from dalle_fast.models import saving  # what reading needs is imported before it is measured
        with unfilled():
            model = DALLE(vae=DiscreteVAE(image_size=16, num_layers=2), dim=512, depth=8, num_text_tokens=500)
        before = peak()
        model = DALLE.from_pretrained(folder, dtype=torch.float16)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print(size, peak() - before, "torch._dynamo" in sys.modules)
"""


def test_loading_holds_one_copy(tmp_path: Path):
    """Measured in a process of its own: the peak of its memory grows by the model, not by two of it."""

    def run(what):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "model"), what]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("write")
    size, grown, imports_the_compiler = run("read").split()
    assert int(size) > 40e6 and int(grown) < 1.3 * int(size) + 8e6
    assert imports_the_compiler == "False"
