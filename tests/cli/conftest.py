"""A saved model for all tests of commands, and the commands as functions."""

import pytest
from click.testing import CliRunner
from job_folders import checked
from small_models import saved_model

from dalle_fast.cli.merge import merge
from dalle_fast.cli.sample import sample


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a small model; tests that change it copy it."""
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def draw(model, tmp_path):
    """`dalle-fast sample` with this model, into tmp_path / "out" unless it is told otherwise."""

    def run(*arguments, model=model, out=tmp_path / "out", stdin=None, fails=None):
        places = [*(["--model", model] if model else []), *(["--out", out] if out else [])]
        result = CliRunner().invoke(sample, [str(a) for a in (*arguments, *places)], input=stdin)
        return checked(result, fails)

    return run


@pytest.fixture
def join():
    """`dalle-fast merge`."""

    def run(*arguments, fails=None):
        return checked(CliRunner().invoke(merge, [str(a) for a in arguments]), fails)

    return run
