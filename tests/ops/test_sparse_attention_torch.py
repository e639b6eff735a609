"""Sparse attention inside torch: the registration, compilation, what autograd asks for, who runs and why."""

import pytest
import torch
from attention_cases import LENGTH, PATTERNS, TEXT_LEN, make_angles, make_key_mask, make_qkv
from implementations import auto_takes, skip_without
from tolerance import check_against_oracle
from torch._subclasses import FakeTensorMode

import dalle_fast
from dalle_fast import _extension, patterns
from dalle_fast.functional import sparse_attention
from dalle_fast.ops.sparse_attention import facts

ROW = PATTERNS["axial_row"]
forward_op = torch.ops.dalle_fast.sparse_attention.default
backward_op = torch.ops.dalle_fast.sparse_attention_backward.default


@pytest.mark.parametrize(
    ("label", "batch", "n", "dtype"), [("axial_row", 2, LENGTH, torch.float32), ("full", 1, 11, torch.bfloat16)]
)
def test_opcheck(label, batch, n, dtype, kernel):
    packed = torch.randn(batch, n, 3, 2, 16, dtype=dtype).permute(2, 0, 3, 1, 4)
    q, k, v = (t.detach().requires_grad_() for t in packed)
    rest = (make_key_mask(label, batch)[:, :n], make_angles(n, 6), PATTERNS[label].spec, 0.3, kernel)
    torch.library.opcheck(forward_op, (q, k, v, *rest))
    saved = [t.detach() for t in (q, k, v, *forward_op(q, k, v, *rest))]
    torch.library.opcheck(backward_op, (torch.randn_like(saved[3]), *saved, *rest))


@pytest.mark.parametrize("shape", [(0, 2, LENGTH, 16), (2, 3, 0, 16), (2, 3, LENGTH, 16), (1, 1, 1, 1)])
def test_traced_and_real_results_lie_alike_in_memory(shape, kernel):
    """opcheck cannot copy empty inputs."""
    rest = (None, None, ROW.spec, 0.3, kernel)

    def results(q, k, v):
        out, statistics = forward_op(q, k, v, *rest)
        return out, statistics, *backward_op(torch.ones_like(out), q, k, v, out, statistics, *rest)

    real = results(*make_qkv(*shape))
    with FakeTensorMode():
        traced = results(*(torch.empty(shape) for _ in "qkv"))
    assert [(t.shape, t.stride(), t.dtype) for t in traced] == [(t.shape, t.stride(), t.dtype) for t in real]


def test_interpreted_triton_through_the_op():
    """The order in which a launcher of the other implementation gets its arguments; its numbers are tests/kernels'."""
    skip_without("triton")
    options = {"key_mask": make_key_mask("full", 1), "rotary": make_angles(LENGTH, 12), "pattern": PATTERNS["full"]}

    def run(impl):
        return lambda q, k, v: sparse_attention(q, k, v, scale=0.1, impl=impl, **options)

    check_against_oracle(run("triton"), run("reference"), make_qkv(1, 4, LENGTH, 16), torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, kernel, monkeypatch):
    auto_takes(monkeypatch, kernel)
    rotary = make_angles(LENGTH, 4)

    def attend(q, k, v, mask):
        return sparse_attention(q, k, v, pattern=ROW, key_mask=mask, rotary=rotary)

    def results(function, batch, n):
        leaves = [t.requires_grad_() for t in make_qkv(batch, 2, n, 8)]
        out = function(*leaves, make_key_mask("axial_row", batch))
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, n in ((2, LENGTH), (3, LENGTH - 1)):
        assert all(
            torch.equal(a, b) for a, b in zip(results(compiled, batch, n), results(attend, batch, n), strict=True)
        )


@pytest.mark.parametrize("needed", ["q", "k", "v", "qv"])
def test_gradients_of_some_inputs_are_those_of_all(needed, kernel):
    inputs = dict(zip("qkv", make_qkv(1, 2, LENGTH, 8), strict=True))

    def gradients(names):
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        sparse_attention(**leaves, pattern=ROW, impl=kernel).square().sum().backward()
        return {name: t.grad for name, t in leaves.items()}

    some, every = gradients(needed), gradients("qkv")
    assert all(torch.equal(some[name], every[name]) if name in needed else some[name] is None for name in "qkv")
    assert not sparse_attention(**inputs, pattern=ROW, impl=kernel).requires_grad


def test_a_second_derivative_is_refused_in_words(kernel):
    leaves = [t.requires_grad_() for t in make_qkv(1, 2, LENGTH, 8)]
    out = sparse_attention(*leaves, pattern=ROW, impl=kernel)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^sparse_attention: only impl='reference' has a second derivative\. Pass"):
        dq.sum().backward()


def test_autocast_casts_as_scaled_dot_product_attention_does(impl, monkeypatch):
    auto_takes(monkeypatch, impl)
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 2, LENGTH, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(q, k.bfloat16(), v, pattern=ROW)  # of two dtypes, which autocast makes one
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert torch.equal(out, sparse_attention(*(t.bfloat16() for t in (q, k, v)), pattern=ROW))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_autocast_leaves_float64_alone():
    q, k, v = make_qkv(1, 2, LENGTH, 8, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_attention(q, k, v, pattern=ROW).dtype == torch.float64


def test_results_lie_in_memory_as_a_projection_reads_them(kernel):
    """[B, N, H, D]: transposing and flattening for the output projection copies nothing, gradients likewise."""
    leaves = [t.requires_grad_() for t in make_qkv(2, 3, LENGTH, 8)]
    out = sparse_attention(*leaves, pattern=ROW, impl=kernel)
    for t in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert t.transpose(1, 2).is_contiguous()


def test_equal_patterns_of_any_make_reach_the_kernel(kernel):
    """A custom op takes a string: a layout given cell by cell must survive it."""
    layout = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    layout.fill_diagonal_(True)
    pattern = patterns.make("block_sparse", text_len=TEXT_LEN, grid=(3, 4), block=4, layout=layout)
    q = torch.zeros(1, 1, LENGTH, LENGTH)
    weights = sparse_attention(q, q, torch.eye(LENGTH)[None, None], pattern=pattern, impl=kernel)
    assert torch.equal(weights[0, 0] > 0, pattern.dense())


# -- who runs, and why


def reasons(**changes):
    """`explain`'s line for each implementation that does not run, by name; under "runs" the one that does."""
    text = dalle_fast.explain("sparse_attention", **{**facts(torch.zeros(1, 1, 1, 16), ROW), **changes})
    first, *lines = text.splitlines()
    return {"runs": first.split("'")[1]} | dict(line.strip().split(": ", 1) for line in lines)


def test_the_extension_runs_where_it_can(monkeypatch):
    if _extension.missing() is None:
        assert reasons()["runs"] == reasons(dtype=torch.bfloat16, head_dim=7)["runs"] == "cpu"
        assert reasons()["reference"] == "supported, ranked lower."
    assert reasons(dtype=torch.float64)["runs"] == "reference"
    assert reasons(dtype=torch.float64)["cpu"] == "it computes in float32, which float64 exceeds."
    monkeypatch.setenv(_extension.OFF_VARIABLE, "1")
    assert reasons()["runs"] == "reference"
    assert reasons()["cpu"] == "the compiled extension is switched off by DALLE_FAST_NO_EXTENSION=1."
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run here: the compiled extension is switched off by"):
        sparse_attention(*make_qkv(1, 1, LENGTH, 4), pattern=ROW, impl="cpu")


@pytest.fixture
def with_triton(monkeypatch):
    """As on a machine with Triton installed."""
    monkeypatch.setattr("dalle_fast.ops.support._missing_triton", lambda: None)


def test_triton_runs_on_gpus_for_its_head_widths(with_triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = reasons(device="cuda")
    assert gpu["runs"] == "triton" and gpu["cpu"] == "the extension runs on the CPU, the tensors are on 'cuda'."
    odd = reasons(device="cuda", head_dim=24)
    assert odd["runs"] == "reference" and odd["triton"] == "head width D must be one of 16, 32, 64, 128, got 24."
    assert reasons(device="cuda", dtype=torch.float64)["runs"] == "reference"
    assert reasons()["triton"] == "Triton's kernels run on GPUs, the tensors are on 'cpu'."


def test_interpreted_triton_runs_by_name_only(with_triton, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons()["triton"] == "Triton's interpreter is for tests: ask for it by name."
    assert reasons()["runs"] != "triton"


def test_absent_triton_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert reasons(device="cuda")["triton"].startswith("triton is not installed.")
    assert reasons(device="cuda")["runs"] == "reference"
