"""taming-transformers' VQGANs: names and shapes, yaml, checkpoints that hold more than weights, what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_vqgans import checkpoint, known_model, pictures, weights, yaml_of

from dalle_fast.compat.formats import Companions, known_formats, taming_vqgan
from dalle_fast.compat.formats.taming_vqgan import architecture_of, own_names, taming_names, vqgan_from
from dalle_fast.compat.reading import read
from dalle_fast.models.vqgan import VQGanVAE

KEYS = Path(__file__).parent / "taming_keys"
KINDS = ("vq", "gumbel")
(FORMAT,) = taming_vqgan.FORMATS


def published_keys(name: str) -> dict[str, torch.Tensor]:
    """The names of a published model's tensors -> tensors of their shapes, on the meta device."""
    lines = (line.split("\t") for line in (KEYS / f"{name}.txt").read_text().splitlines() if not line.startswith("#"))
    return {
        key: torch.empty([int(n) for n in shape.strip("()").split(",") if n.strip()], device="meta")
        for key, shape, _ in lines
    }


def assert_same_model(got: VQGanVAE, kind: str) -> None:
    wanted = known_model(kind)
    assert got.architecture == wanted.architecture
    assert_same_tensors(got, wanted.state_dict())


def assert_same_tensors(got: VQGanVAE, wanted: dict[str, torch.Tensor], what: str = "") -> None:
    found = got.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), (what, name)


# -- names and shapes


@pytest.mark.parametrize(
    ("file", "count", "kind", "num_tokens", "multipliers", "num_layers"),
    [
        ("taming_vqmodel_f16_1024", 343, "vq", 1024, (1, 1, 2, 2, 4), 4),
        ("taming_gumbelvq_f8_8192", 301, "gumbel", 8192, (1, 1, 2, 4), 3),
    ],
)
def test_published_models_are_known_by_their_tensors(file, count, kind, num_tokens, multipliers, num_layers) -> None:
    stored = published_keys(file)
    assert len(stored) == count
    model = vqgan_from(stored, image_size=256)
    assert sorted(taming_names(model).values()) == sorted(stored)
    assert all(parameter.is_meta for parameter in model.parameters())
    a = model.architecture
    assert (a.quantizer, a.multipliers, a.hidden_dim, a.num_res_blocks) == (kind, multipliers, 128, 2)
    assert (a.codebook_dim, a.z_channels, a.attention_levels, a.norm_eps) == (256, 256, (num_layers,), 1e-6)
    numbers = (model.image_size, model.num_tokens, model.num_layers, model.channels, model.is_gumbel)
    assert numbers == (256, num_tokens, num_layers, 3, kind == "gumbel")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_yaml_say_the_same(kind: str) -> None:
    wanted = known_model(kind).architecture
    assert architecture_of(weights(kind), yaml_of(kind)) == wanted
    assert architecture_of(weights(kind), image_size=64) == wanted
    assert architecture_of(weights(kind), yaml_of(kind), image_size=128).image_size == 128


def test_attention_at_several_levels_and_at_none() -> None:
    for resolutions, levels in (([64, 16, 4], (0, 2, 4)), ([], ())):
        stored = weights("vq", attention_levels=levels)
        assert architecture_of(stored, yaml_of("vq", attn_resolutions=resolutions)).attention_levels == levels
        assert vqgan_from(stored, image_size=64).architecture.attention_levels == levels


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_of_the_names_is_read(kind: str) -> None:
    model = known_model(kind)
    own, theirs = dict(model.state_dict()), weights(kind)
    spellings = {
        "ours": own,
        "taming-transformers": theirs | {"loss.discriminator.main.0.weight": torch.zeros(3)},
        "dalle_pytorch": {f"model.{name}": tensor for name, tensor in theirs.items()}
        | {"model.loss.perceptual_loss.lin0.model.1.weight": torch.zeros(3)},
    }
    for spelling, state_dict in spellings.items():
        again = VQGanVAE(architecture=model.architecture)
        again.load_state_dict(state_dict)
        assert_same_tensors(again, own, spelling)


def test_weights_are_taken_as_they_are() -> None:
    """No copy, no other dtype, no random numbers, no other dict for the caller."""
    stored = {name: tensor.half() for name, tensor in weights("vq").items()}
    before, state = dict(stored), torch.get_rng_state()
    model = vqgan_from(stored, yaml_of("vq"))
    assert torch.equal(torch.get_rng_state(), state) and stored.keys() == before.keys() and not model.training
    names = taming_names(model)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == stored[names[name]].data_ptr(), name
        assert parameter.dtype == torch.float16


# -- files


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_reads_files(kind: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    paths = checkpoint(tmp_path, kind)
    state = torch.get_rng_state()
    model = VQGanVAE(*paths)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_model(model, kind)
    assert VQGanVAE(*map(str, paths), image_size=128).image_size == 128


def test_constructor_makes_float32_of_halves(tmp_path: Path) -> None:
    path, config = checkpoint(tmp_path, "vq")
    torch.save({name: tensor.half() for name, tensor in weights("vq").items()}, path)
    assert {p.dtype for p in VQGanVAE(path, config).parameters()} == {torch.float32}


def test_constructor_without_paths_takes_the_originals_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"vqgan_model_path must be a file, got .*vqgan.1024.model.ckpt.*README"
    ):
        VQGanVAE()
    cache = tmp_path / ".cache" / "dalle"
    cache.mkdir(parents=True)
    model, config = checkpoint(tmp_path, "vq")
    model.rename(cache / "vqgan.1024.model.ckpt")
    with pytest.raises(FileNotFoundError, match=r"vqgan_config_path must be a file, got .*vqgan.1024.config.yml"):
        VQGanVAE()
    config.rename(cache / "vqgan.1024.config.yml")
    assert_same_model(VQGanVAE(), "vq")


@pytest.mark.parametrize("given", ["vqgan_model_path", "vqgan_config_path"])
def test_one_of_two_files_is_not_enough(given: str, tmp_path: Path) -> None:
    other = {"vqgan_model_path": "vqgan_config_path", "vqgan_config_path": "vqgan_model_path"}[given]
    with pytest.raises(ValueError, match=f"{other} must be given with {given}, got None"):
        VQGanVAE(**{given: tmp_path / "file"})


def test_files_and_architecture_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture must come without paths"):
        VQGanVAE(*checkpoint(tmp_path, "vq"), architecture=known_model("vq").architecture)


def lightning_extras(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What Lightning and omegaconf leave in a checkpoint: objects of packages that are not there when it is read."""

    class ModelCheckpoint:
        pass

    class DictConfig(dict):
        pass

    class LambdaWarmUpCosineScheduler:
        def __init__(self) -> None:
            self.last_lr, self.history, self.owner = 0.5, [np.float64(0.5)], self

    class ImageLogger:
        def __getstate__(self) -> dict[str, object]:
            return {"log_steps": [1, 2, 4], "schedule": LambdaWarmUpCosineScheduler()}

    homes = {
        "pytorch_lightning.callbacks.model_checkpoint": ModelCheckpoint,
        "omegaconf.dictconfig": DictConfig,
        "taming.lr_scheduler": LambdaWarmUpCosineScheduler,
        "main": ImageLogger,
    }
    for home, cls in homes.items():
        packages = home.split(".")[:-1]
        for depth in range(len(packages)):
            name = ".".join(packages[: depth + 1])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        module = types.ModuleType(home)
        cls.__module__, cls.__qualname__ = home, cls.__name__
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, home, module)
    score = torch.tensor(0.25)
    return {
        "epoch": np.int64(12),
        "global_step": 3000,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {
            ModelCheckpoint: {"best_model_score": score, "best_model_path": Path("logs/best.ckpt")},
            "image_logger": ImageLogger(),
        },
        "optimizer_states": [{"state": {0: {"step": 7, "exp_avg": torch.zeros(4)}}, "lr": np.float32(1)}],
        "lr_schedulers": [LambdaWarmUpCosineScheduler()],
        "hparams_name": "kwargs",
        "hyper_parameters": DictConfig(model={"target": "x"}, when=np.array([1, 2])),
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_lightnings_checkpoints_are_read_without_lightning(container, protocol, tmp_path, monkeypatch) -> None:
    path, config = checkpoint(tmp_path, "vq")
    state_dict = OrderedDict(weights("vq"))
    state_dict["loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
    state_dict["loss.perceptual_loss.net.slice1.0.bias"] = torch.zeros(2)
    state_dict._metadata = OrderedDict({"": {"version": 1}})
    with monkeypatch.context() as during_saving:
        content = {**lightning_extras(during_saving), "state_dict": state_dict}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert read(path).container == container
    assert_same_model(VQGanVAE(path, config), "vq")
    assert not {"pytorch_lightning", "omegaconf", "taming", "main", "no_such_package"} & set(sys.modules)


def test_format_knows_describes_and_loads(tmp_path: Path) -> None:
    path, config = checkpoint(tmp_path, "gumbel", epoch=3)
    stored = read(path)
    assert [known.name for known in known_formats() if known.matches(stored)] == [FORMAT.name]
    description = FORMAT.describe(stored)
    assert (description.kind, description.problem) == ("VQGanVAE", "")
    told = {name: value for name, value in description.architecture.items() if name != "image_size"}
    assert {**vars(known_model("gumbel").architecture), **told} == vars(known_model("gumbel").architecture)
    assert_same_model(FORMAT.load(stored, Companions(yaml=config)), "gumbel")
    with pytest.raises(ValueError, match=r"size of pictures must be known.*Give the .yaml.*taming-transformers"):
        FORMAT.load(stored, Companions())
    assert not FORMAT.matches(read(tmp_path))
    save_file(weights("gumbel"), tmp_path / "model.safetensors")
    assert_same_model(FORMAT.load(read(tmp_path / "model.safetensors"), Companions(yaml=config)), "gumbel")


def test_knowing_the_format_is_quick() -> None:
    """The typical keys are those of a model: building it draws no weights, and imports no compiler of torch's."""
    code = "import sys, dalle_fast.compat.formats.taming_vqgan; print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_typical_keys_cover_published_ones() -> None:
    numberless = {".".join("N" if part.isdigit() else part for part in name.split(".")) for name in weights("vq")}
    assert numberless <= FORMAT.keys and "quantize.proj.weight" in FORMAT.keys


# -- codebooks cut to fewer codes


@pytest.mark.parametrize("kind", KINDS)
def test_renumbered_codebook_is_cut(kind: str) -> None:
    """Codes are places in the list, and decode to what the codes of the list decode to."""
    used = torch.tensor([7, 3, 39, 0, 12])
    config = yaml_of(kind)
    config["model"]["params"]["remap"] = "used.npy"
    whole = known_model(kind)
    cut = vqgan_from(weights(kind) | {"quantize.used": used}, config)
    assert cut.num_tokens == 5
    codes = torch.tensor([[0, 4, 2, 1]])
    assert torch.equal(cut.decode(codes), whole.decode(used[codes]))
    # the nearest of the codes that are left
    found, wanted = used[cut.get_codebook_indices(pictures(2))], whole.get_codebook_indices(pictures(2))
    left = torch.isin(wanted, used)
    assert torch.equal(found[left], wanted[left])
    with pytest.raises(ValueError, match=r"must hold quantize.used, the codes that remap \('used.npy'\)"):
        vqgan_from(weights(kind), config)


def test_own_names_leave_the_callers_dict_alone() -> None:
    stored = weights("vq") | {"loss.logvar": torch.zeros(1)}
    before = list(stored)
    own_names(known_model("vq"), stored)
    assert list(stored) == before
