"""A digest changes with whatever a kernel is compiled from, and with nothing else."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from triton_tools.digest import digest

CODE = '''
import triton.language as tl

FACTOR = 3

def helper(x):
    """Doubles."""
    return x * 2

def kernel(x_ptr, n):
    # why
    tl.store(x_ptr, helper(tl.load(x_ptr)) + FACTOR)
'''
X = torch.zeros(8)


@pytest.fixture
def kernel(tmp_path):
    """Makes the kernel from code, as its own module each time."""
    pytest.importorskip("triton", reason="Triton is not installed (or blocked: the bare pass)")
    made = []

    def build(code: str):
        path = tmp_path / f"code_{len(made)}.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location("code", path)
        made.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(made[-1])
        return made[-1].kernel

    return build


@pytest.mark.parametrize(
    ("old", "new"),
    [("# why", "# why not\n    # a line more"), ('"""Doubles."""', '"""Twice."""'), ("import", "\n\n\nimport")],
)
def test_comments_docstrings_and_places_do_not_count(kernel, old, new):
    assert digest(kernel(CODE), (X, 7), {}) == digest(kernel(CODE.replace(old, new, 1)), (X, 7), {})


@pytest.mark.parametrize(("old", "new"), [("+ FACTOR", "- FACTOR"), ("x * 2", "x * 4"), ("FACTOR = 3", "FACTOR = 5")])
def test_code_called_code_and_constants_count(kernel, old, new):
    assert digest(kernel(CODE), (X, 7), {}) != digest(kernel(CODE.replace(old, new, 1)), (X, 7), {})


@pytest.mark.parametrize(
    "arguments", [(X.half(), 7), (X[1:], 7), (X, 1), (X, 16), (X, 2**40), (X, 7.0), (X, None), (X, (7,))]
)
def test_kinds_of_arguments_count(kernel, arguments):
    assert digest(kernel(CODE), arguments, {}) != digest(kernel(CODE), (X, 7), {})


def test_values_that_triton_does_not_specialise_for_do_not_count(kernel):
    assert digest(kernel(CODE), (torch.ones(3), 9), {}) == digest(kernel(CODE), (X, 7), {})


def test_options_count(kernel):
    digests = {
        digest(kernel(CODE), (X, 7), options) for options in ({}, {"BLOCK": 16}, {"BLOCK": 32}, {"num_warps": 4})
    }
    assert len(digests) == 4
