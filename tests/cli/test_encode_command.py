"""`dalle-fast encode`: options reach what encodes, and errors are sentences."""

import pytest
import torch
from click.testing import CliRunner
from data_folders import SIZE, write_folder

from dalle_fast.cli.encode import encode
from dalle_fast.models.dvae import DiscreteVAE
from dalle_fast.training.data.codes import CodesManifest


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """OUT of a training: the model is a folder deeper."""
    path = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    DiscreteVAE(image_size=SIZE, num_tokens=12, codebook_dim=5, num_layers=1, hidden_dim=6).save_pretrained(
        path / "model"
    )
    return path


def run(*arguments):
    result = CliRunner().invoke(encode, [str(a) for a in arguments])
    assert "Traceback" not in result.output
    return result


def test_it_encodes_a_folder_and_says_what_it_made(tmp_path, vae):
    write_folder(tmp_path / "data", 3)
    (tmp_path / "data" / "broken.png").write_bytes(b"")
    result = run(tmp_path / "data", "--vae", vae, "--out", tmp_path / "codes", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/codes: 3 grids of 16 codes; 1 could not be used, the log names them." in result.output
    made = CodesManifest.read(tmp_path / "codes")
    assert (made.resize, made.crops, made.dtype, made.vae) == ("none", 1, "float32", str(vae / "model"))


def test_options_are_what_the_manifest_says(tmp_path, vae):
    write_folder(tmp_path / "data", 3)
    options = ["--crops", 2, "--smallest-crop", 0.5, "--seed", 4, "--dtype", "bfloat16", "--shard-size", 2]
    result = run(tmp_path / "data", "--vae", vae / "model", "--out", tmp_path / "codes", "--workers", 1, *options)
    assert result.exit_code == 0, result.output
    made = CodesManifest.read(tmp_path / "codes")
    assert (made.resize, made.crops, made.smallest_crop, made.seed) == ("upstream", 2, 0.5, 4)
    assert (made.dtype, made.shard_size, made.counts) == ("bfloat16", 2, [4, 2])


def test_errors_are_sentences(tmp_path, vae):
    write_folder(tmp_path / "data", 1)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "absent", "--vae", vae), "found nothing at"),
        ((tmp_path / "empty", "--vae", vae), "must hold pictures"),
        ((tmp_path / "data", "--vae", tmp_path / "empty"), "must be a directory of weights that we know"),
        ((tmp_path / "data", "--vae", vae, "--device", "nowhere"), "device must be one that torch finds here"),
        ((tmp_path / "data", "--vae", vae, "--device", "meta"), "device must be one that torch finds here"),
        ((tmp_path / "data", "--vae", vae, "--crops", 2, "--resize", "none"), "upstream or paper for crops=2"),
    ):
        result = run(*arguments, "--out", tmp_path / "codes")
        assert result.exit_code == 1, result.output
        assert message in result.output
