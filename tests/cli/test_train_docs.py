"""docs/training.md says what the commands are: its options and keys exist, every flag of the original has a row."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from dalle_fast import CLIP, DALLE, DiscreteVAE
from dalle_fast.cli.__main__ import main
from dalle_fast.cli.train_options import presets
from dalle_fast.training.config import DalleConfig, VaeConfig, _known_keys, resolve
from dalle_fast.training.config import presets as known_presets

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
LAUNCHERS = {"--cpu", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}
LAUNCHERS |= {"--standalone", "--nproc-per-node"}
DISTRIBUTED = {"--distributed_backend", "--distr_backend", "--deepspeed", "--deepspeed_config", "--local_rank"}
# Of dalle_pytorch 1.6.6; the deepspeed package adds two of the distributed ones.
ORIGINAL = {
    "train_vae.py": DISTRIBUTED | {
        "--image_folder", "--image_size", "--epochs", "--batch_size", "--learning_rate", "--lr_decay_rate",
        "--starting_temp", "--temp_min", "--anneal_rate", "--num_images_save", "--num_tokens", "--num_layers",
        "--num_resnet_blocks", "--smooth_l1_loss", "--emb_dim", "--hidden_dim", "--kl_loss_weight", "--transparent",
    },
    "train_dalle.py": DISTRIBUTED | {
        "--vae_path", "--dalle_path", "--vqgan_model_path", "--vqgan_config_path", "--image_text_folder", "--wds",
        "--truncate_captions", "--random_resize_crop_lower_ratio", "--chinese", "--taming", "--hug", "--bpe_path",
        "--dalle_output_file_name", "--fp16", "--amp", "--wandb_name", "--wandb_entity", "--stable_softmax",
        "--flops_profiler", "--epochs", "--save_every_n_steps", "--keep_n_checkpoints", "--batch_size", "--ga_steps",
        "--learning_rate", "--clip_grad_norm", "--lr_decay", "--dim", "--text_seq_len", "--depth", "--heads",
        "--dim_head", "--ff_dropout", "--attn_dropout", "--reversible", "--loss_img_weight", "--attn_types",
        "--shift_tokens", "--rotary_emb", "--shared_attn_ids", "--shared_ff_ids", "--share_input_output_emb",
    },
}  # fmt: skip
CONFIGS = {"train_vae.py": (VaeConfig, DiscreteVAE, "train-vae"), "train_dalle.py": (DalleConfig, DALLE, "train")}


def options(*names):
    commands = [main.get_command(None, name) for name in names]
    commands += [command.get_command(None, "train") for command in commands if hasattr(command, "commands")]
    return {option for command in commands for parameter in command.params for option in parameter.opts}


def keys(config, model):
    return {*_known_keys(config), *(f"model.{name}" for name in inspect.signature(model.__init__).parameters)}


def rows(script):
    """(flags, what each is here) of the table of one of the original's trainers."""
    table = PAGE.split(f"### {script}\n")[1].split("\n### ")[0]
    return [
        (re.findall(r"`(--\w+)`", flags), here) for flags, here in re.findall(r"^\| (`--.*?) \| (.*) \|$", table, re.M)
    ]


@pytest.mark.parametrize("script", CONFIGS)
def test_every_flag_of_the_original_has_a_row_that_exists_here(script):
    config, model, command = CONFIGS[script]
    flags = [flag for names, _ in rows(script) for flag in names]
    assert sorted(flags) == sorted(ORIGINAL[script])
    known_options, known_keys = options(command), keys(config, model)
    for _, here in rows(script):
        assert set(re.findall(r"`(--[a-z-]+)`", here)) <= known_options, here
        found = set(re.findall(r"`([a-z]+\.[a-z_0-9]+)(?:=[^`]*)?`", here)) - {"vae.pt", "dalle.pt"}
        assert found <= known_keys, here


def test_settings_of_the_tables_are_accepted():
    for script, kind in (("train_vae.py", "vae"), ("train_dalle.py", "dalle")):
        settings = [s for _, here in rows(script) for s in re.findall(r"`([a-z]+\.[a-z_]+=[^`]+)`", here)]
        resolve(kind, preset="upstream", overrides=["data.source=x", *settings])
        assert len(settings) >= 4


def test_every_option_that_is_named_exists():
    commands = ("train-vae", "train", "train-clip", "encode", "tokenizer", "sample")
    page = PAGE.split("### train_vae.py")[0]
    assert set(re.findall(r"--[a-z][a-z_-]*", page)) - LAUNCHERS <= options(*commands)


def test_every_key_that_is_named_exists():
    known = keys(VaeConfig, DiscreteVAE) | keys(DalleConfig, DALLE) | keys(VaeConfig, CLIP)
    sections = {key.split(".")[0] for key in known}
    page = PAGE.split("### train_vae.py")[0]
    named = {key for key in re.findall(r"`([a-z]+\.[a-z_0-9]+)[:=`]", page) if key.split(".")[0] in sections}
    named -= {"data.txt", "vae.pt"}
    assert {"kl.end", "loop.ema_decay", "model.quantizer"} <= named <= known
    for key in ("l1_weight", "entropy_weight", "plain_steps", "fold", "null_cond_prob", "padding_loss", "end_to_end"):
        assert f"`{key}" in page and key in known


def test_every_preset_has_a_row_and_a_file():
    listed = set(
        re.findall(r"^\| `(\w+)` \| (?!.*here)", PAGE.split("## What is learnt")[0].split("| preset |")[1], re.M)
    )
    assert listed == {name for kind in ("vae", "dalle", "clip") for name in presets(kind)}
    for kind in ("vae", "dalle", "clip"):
        assert presets(kind) == known_presets(kind)
        for name in presets(kind):
            config = resolve(kind, preset=name, overrides=["data.source=x"])
            model = {"vae": DiscreteVAE, "dalle": DALLE, "clip": CLIP}[kind]
            assert set(config.model) <= set(inspect.signature(model.__init__).parameters), name


def test_the_emoji_presets_fit_together():
    vae, dalle, clip = (resolve(kind, preset="emoji", overrides=["data.source=x"]) for kind in ("vae", "dalle", "clip"))
    model = DiscreteVAE(**vae.model)
    assert (model.image_size // 2**model.num_layers) ** 2 == 1024
    assert clip.model["visual_image_size"] == vae.model["image_size"]
    assert clip.model["text_seq_len"] == dalle.model["text_seq_len"]
    assert len(resolve("dalle", preset="paper", overrides=["data.source=x"]).model["attn_types"]) == 64
