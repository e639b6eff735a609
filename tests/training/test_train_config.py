"""Configurations of trainings: from presets, files and single settings; what is refused, in which words."""

import pytest
import yaml

pytest.importorskip("pydantic")

from dalle_fast.training.config import (
    CONFIGS,
    DalleConfig,
    VaeConfig,
    preset_text,
    presets,
    resolve,
)

NEEDED = ["data.source=pictures", "loop.steps=10", "loop.batch=4"]


def test_later_settings_win_key_by_key(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("model: {dim: 64, depth: 2}\noptimiser: {learning_rate: 1e-4, betas: [0.9, 0.96]}\n")
    config = resolve("dalle", file=file, overrides=[*NEEDED, "model.depth=3", "optimiser.name=adam"])
    assert config.model == {"dim": 64, "depth": 3}
    assert (config.optimiser.learning_rate, config.optimiser.betas) == (1e-4, (0.9, 0.96))
    assert (config.optimiser.name, config.loop.steps) == ("adam", 10)


def test_yaml_reads_back_to_the_same():
    settings = [*NEEDED, "vae=models/vae", "model.attn_types=[full, axial_row]", "data.first_caption=0.6"]
    config = resolve("dalle", overrides=settings)
    text = config.to_yaml()
    assert DalleConfig.from_yaml(text, "config.yaml") == config
    assert yaml.safe_load(text)["kind"] == "dalle"


def test_a_bare_no_is_no_precision():
    config = resolve("vae", overrides=[*NEEDED, "loop.precision=no"])
    assert config.loop.precision == "no" and VaeConfig.from_yaml(config.to_yaml(), "config.yaml") == config


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("loop.stepz=3", "train: the options must have known keys, got 'loop.stepz'. Did you mean loop.steps?"),
        ("learning_rate=1", "got 'learning_rate'. Did you mean optimiser.learning_rate?"),
        ("temperature.stepz=1", "got 'temperature.stepz'. Did you mean temperature.steps?"),
        ("nonsense=1", "got 'nonsense'. Known are model, data.source,"),
        ("loop.steps=0", "train: loop.steps must be greater than or equal to 1, got 0 in the options."),
        ("loop.steps=many", "train: loop.steps must be a valid integer, "),
        ("optimiser.name=sgd", "train: optimiser.name must be 'adamw', 'adam' or 'muon', got 'sgd' in the options."),
        ("optimiser.learning_rate=.nan", "train: optimiser.learning_rate must be a finite number, got nan"),
        ("kind=dalle", "train: kind must be 'vae', got 'dalle'"),
        ("loop.steps", "train: a setting must be KEY=VALUE, as loop.steps=100, got 'loop.steps'."),
        ("loop.steps=[1", "train: the value of loop.steps must be YAML, got something else"),
        ("data.held_out=1", "train: data.held_out must be less than 1, got 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting, sentence):
    with pytest.raises(ValueError) as refusal:
        resolve("vae", overrides=[*NEEDED, setting])
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"train: data.source must be given, got none in the options\. Add it, in a"):
        resolve("clip", overrides=NEEDED[1:])


def test_a_file_that_is_no_nest_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    for text, got in (("- a", r"got \['a'\]"), ("a: [", "must be YAML"), ("loop: 3", "loop must be a valid dict")):
        file.write_text(text)
        with pytest.raises(ValueError, match=got):
            resolve("vae", file=file, overrides=["data.source=x"])


def test_differences_leave_out_what_changes_no_step():
    config = resolve("vae", overrides=NEEDED)
    assert config.differences(resolve("vae", overrides=[*NEEDED, "loop.steps=20", "data.workers=9"])) == []
    other = resolve("vae", overrides=[*NEEDED, "loop.seed=1", "model.num_layers=2"])
    assert config.differences(other) == ["loop.seed", "model.num_layers"]
    assert other.differences(config) == ["model.num_layers", "loop.seed"]


def test_every_preset_needs_only_data_and_steps():
    names = {kind: presets(kind) for kind in CONFIGS}
    for kind, known in names.items():
        for name in known:
            resolve(
                kind, preset=name, overrides=["data.source=x", "loop.steps=9", *(["vae=x"] if kind == "dalle" else [])]
            )
            assert yaml.safe_load(preset_text(kind, name))
    with pytest.raises(ValueError, match=r"train: preset must be one of .*, got 'huge'"):
        resolve("vae", preset="huge")


def test_configs_are_frozen():
    config = resolve("vae", overrides=NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.loop.steps = 5
    assert isinstance(config, VaeConfig)
