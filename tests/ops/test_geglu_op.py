"""GEGLU against its oracle, inside torch, on every instruction set."""

import pytest
import torch
from implementations import skip_without
from tolerance import check_against_oracle

from dalle_fast.functional import geglu
from dalle_fast.native import geglu as native
from dalle_fast.reference import geglu as reference

OP = "geglu"
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _draw(*shape, scale=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


def _native(x):
    return geglu(x, impl="cpu")


@every_dtype
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 30), (5, 34), (2, 7, 128), (40, 4096), (1300, 6)])
def test_every_size(shape, dtype, isa):
    check_against_oracle(_native, reference.geglu, [_draw(*shape)], dtype)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 8.0, 1e3])
def test_small_and_large_gates(scale, isa):
    check_against_oracle(_native, reference.geglu, [_draw(64, 256, scale=scale)], torch.float32)


def test_every_range_of_the_gate(isa):
    """One point in a tensor: the largest of many does not hide the others."""
    skip_without("cpu", OP)
    for middle in torch.linspace(-5.5, 6.0, 24).tolist():
        gate = middle + torch.linspace(-0.25, 0.25, 1000)
        check_against_oracle(_native, reference.geglu, [torch.cat((torch.ones_like(gate), gate))], torch.float32)


@every_dtype
def test_any_strides_and_threads_give_the_same_bits_and_inputs_stay(dtype, kernel, restored_threads):
    x = _draw(130, 70).to(dtype)
    memory = torch.full((70, 133), torch.nan, dtype=dtype)
    view = memory[:, :130].T
    view.copy_(x)
    before = memory.clone()
    expected = None
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for given in (x, view):
            leaf = given.detach().requires_grad_()
            out = geglu(leaf, impl=kernel)
            found = out.detach(), *torch.autograd.grad(out, leaf, out.detach().flip(0))
            expected = expected or found
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(memory.nan_to_num(7.5), before.nan_to_num(7.5))


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 8)])
def test_nothing_gives_nothing(shape, impl):
    x = torch.empty(shape, requires_grad=True)
    out = geglu(x, impl=impl)
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_all_of_the_results_is_written(kernel, poisoned_memory):
    x = _draw(33, 38).requires_grad_()
    out = geglu(x, impl=kernel)
    assert out.isfinite().all() and torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_values_come_first_and_zero_gates_close(impl):
    x = torch.tensor([[3.0, -5.0, 0.0, 20.0]])
    assert torch.equal(geglu(x, impl=impl), torch.tensor([[0.0, -100.0]]))


def test_what_is_no_number_stays_so(impl):
    x = torch.tensor([torch.nan, 1.0, 1.0, 0.5, torch.nan, 2.0])
    assert geglu(x, impl=impl).isnan().tolist() == [True, True, False]


def test_wrong_inputs_are_refused_in_words(impl):
    with pytest.raises(TypeError, match="geglu: x must be floating, got int64"):
        geglu(torch.ones(2, 4, dtype=torch.int64), impl=impl)
    with pytest.raises(ValueError, match=r"geglu: x must be \[\.\.\., 2 W\], got \[2, 3\]"):
        geglu(torch.ones(2, 3), impl=impl)


def test_float64_is_for_the_oracle():
    skip_without("cpu", OP)
    x = _draw(4, 6).double().requires_grad_()
    assert torch.equal(geglu(x), reference.geglu(x))
    assert torch.autograd.gradcheck(geglu, x) and torch.autograd.gradgradcheck(geglu, x)
    with pytest.raises(NotImplementedError, match="float64"):
        geglu(x, impl="cpu")


def test_inside_torch(kernel):
    x = _draw(5, 34).requires_grad_()
    torch.library.opcheck(torch.ops.dalle_fast.geglu.default, (x,))
    compiled = torch.compile(lambda t: geglu(t, impl=kernel).square(), fullgraph=True, backend="aot_eager")
    both = compiled(x), geglu(x, impl=kernel).square()
    assert torch.equal(*both)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in both))


def test_saves_its_input_alone(kernel):
    x = _draw(5, 34).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        geglu(x, impl=kernel)
    assert kept == [x.data_ptr()]


def test_second_derivatives_are_refused_in_words(kernel):
    x = _draw(5, 34).requires_grad_()
    (gradient,) = torch.autograd.grad(geglu(x, impl=kernel).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="geglu: only impl='reference' has a second derivative"):
        gradient.sum().backward()


def test_structure_is_that_of_the_extension():
    assert [name for name, _ in native._Geglu._fields_] == ["rows", "width", "element", "x", "out", "dout", "dx"]
