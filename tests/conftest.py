"""Settings of every test run: Triton interprets (no GPU needed), the header says which instruction sets are tested."""

import importlib.util
import os
import sys

# Triton reads this once, at import; torch._dynamo imports triton. Compiled kernels (-m gpu) need their own process.
if os.environ.get("DALLE_FAST_TEST_GPU") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The pass without extension and Triton (`make test-long`): both are as if they had never been installed.
if os.environ.get("DALLE_FAST_TEST_BARE") == "1":
    os.environ["DALLE_FAST_NO_EXTENSION"] = "1"
    sys.modules["triton"] = None  # type: ignore[assignment]

import pytest
import torch

from dalle_fast import _extension

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton_tools import interpreter

    interpreter.install()


MISSING = _extension.missing()


@pytest.fixture(params=["baseline"] if MISSING else _extension.instruction_sets())
def isa(request):
    """Each instruction set of this machine, in force while the test runs."""
    if MISSING:
        pytest.skip(MISSING.removeprefix("missing: "))
    before = _extension.isa()
    _extension.set_isa(request.param)
    yield request.param
    _extension.set_isa(before)


@pytest.fixture
def restored_threads():
    """The number of threads is again what it was when the test ends."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_report_header() -> list[str]:
    """What this run tests on."""
    extension = MISSING or f"instruction sets {', '.join(_extension.instruction_sets())}; auto takes {_extension.isa()}"
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs"
    return [machine, f"extension: {extension}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu say why they are skipped on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can see on this machine"))
