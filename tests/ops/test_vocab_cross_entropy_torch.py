"""vocab_cross_entropy inside torch: registration, compilation, checkpoints, what autograd asks for, who runs, why."""

import pytest
import torch
from implementations import auto_takes
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from vocab_cross_entropy_cases import NAMES, Case, Inputs, losses_of, make_inputs, results, same

import dalle_fast
from dalle_fast import _extension
from dalle_fast.functional import vocab_cross_entropy
from dalle_fast.ops.vocab_cross_entropy import facts

OP = "vocab_cross_entropy"
forward_op = torch.ops.dalle_fast.vocab_cross_entropy.default
backward_op = torch.ops.dalle_fast.vocab_cross_entropy_backward.default


def _constants(case):
    return case.n_text, case.codes[0], case.divide_max


@pytest.mark.parametrize(
    "case",
    [Case(), Case(dtype=torch.bfloat16, bias=False), Case(divide_max=True, batch=1), Case(dtype=torch.float16, n=7)],
    ids=str,
)
def test_opcheck(case, kernel):
    inputs = make_inputs(case)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    torch.library.opcheck(forward_op, (*leaves, *_constants(case), 1e-5, case.dtype, kernel))
    saved = [None if t is None else t.detach() for t in leaves]
    losses, statistics = forward_op(*saved, *_constants(case), 1e-5, case.dtype, kernel)
    rest = (*saved, statistics, *_constants(case), case.dtype, kernel)
    torch.library.opcheck(backward_op, (torch.ones_like(losses), *rest))


@pytest.mark.parametrize(
    "case",
    [Case(batch=0), Case(batch=0, bias=False), Case(n=0), Case(), Case(bias=False), Case((1, 1), 1, batch=1)],
    ids=str,
)
def test_traced_and_real_results_lie_alike_in_memory(case, kernel):
    """opcheck cannot copy empty inputs."""
    inputs = make_inputs(case)

    def lay(*tensors):
        losses, statistics = forward_op(*tensors, *_constants(case), 1e-5, case.dtype, kernel)
        found = (losses, statistics, *backward_op(losses, *tensors, statistics, *_constants(case), case.dtype, kernel))
        return [(t.shape, t.stride(), t.dtype) for t in found]

    real = lay(*inputs)
    with FakeTensorMode():
        assert lay(*(None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in inputs)) == real


@pytest.mark.parametrize("dynamic", [False, None, True])
@pytest.mark.parametrize("divide_max", [False, True])
def test_compiles_into_one_graph(divide_max, dynamic, kernel, monkeypatch):
    auto_takes(monkeypatch, kernel, OP)
    torch.compiler.reset()
    compiled = torch.compile(vocab_cross_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, grid in ((2, (3, 5)), (3, (5, 4))):
        case = Case((40, 30), 24, divide_max=divide_max, batch=batch, grid=grid)
        inputs = make_inputs(case)
        leaves = [getattr(inputs, name).requires_grad_() for name in NAMES]
        found = losses_of("auto", case, inputs, function=compiled)
        expected = losses_of("auto", case, inputs)
        assert same(found, expected)
        assert same(*(torch.autograd.grad(losses[0] + 3 * losses[1], leaves) for losses in (found, expected)))


def test_compiled_calls_refuse_ids_out_of_range_too(kernel, monkeypatch):
    """The custom op looks when it runs: not while it is traced, when there are no ids."""
    auto_takes(monkeypatch, kernel, OP)
    torch.compiler.reset()
    case = Case()
    inputs = make_inputs(case)
    inputs.labels[1, 0] = case.codes[0]
    compiled = torch.compile(vocab_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^vocab_cross_entropy: labels of text positions must be in 0\.\.8, or -100"):
        losses_of("auto", case, inputs, function=compiled)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_the_same_bits(reentrant, impl):
    case = Case((40, 30), 24, divide_max=True)
    inputs = make_inputs(case)

    def run(function):
        leaves = inputs._replace(**{name: getattr(inputs, name).detach().requires_grad_() for name in NAMES})
        loss = function(*leaves)
        loss.backward()
        return loss, *(getattr(leaves, name).grad for name in NAMES)

    def loss_of(*tensors):
        return sum(losses_of(impl, case, Inputs(*tensors)))

    assert same(run(loss_of), run(lambda *tensors: checkpoint(loss_of, *tensors, use_reentrant=reentrant)))


# -- what autograd asks for


@pytest.mark.parametrize("needed", [*((name,) for name in NAMES), ("hidden", "weight"), NAMES[:3]])
def test_gradients_of_some_inputs_are_those_of_all(needed, kernel):
    case = Case((40, 30), 24)
    inputs = make_inputs(case)
    every = dict(zip(NAMES, results(kernel, case, inputs)[2:], strict=True))
    some = dict(zip(needed, results(kernel, case, inputs, needed=needed)[2:], strict=True))
    assert all(torch.equal(some[name], every[name]) for name in needed)
    assert not losses_of(kernel, case, inputs)[0].requires_grad


def test_without_bias_there_is_no_gradient_of_it_and_a_zero_bias_changes_nothing(kernel):
    case = Case((40, 30), 24)
    inputs = make_inputs(case)
    zeros = inputs._replace(bias=torch.zeros(70))
    without = results(kernel, case, inputs._replace(bias=None))
    assert same(without, results(kernel, case, zeros)[: len(without)]) and len(without) == 2 + len(NAMES) - 1


def test_a_second_derivative_is_refused_in_words(kernel):
    case = Case()
    inputs = make_inputs(case)
    hidden = inputs.hidden.requires_grad_()
    (dhidden,) = torch.autograd.grad(sum(losses_of(kernel, case, inputs)), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^vocab_cross_entropy: only impl='reference' has a second derivative\."):
        dhidden.sum().backward()


def test_nothing_with_an_axis_of_the_vocabulary_is_saved(kernel):
    """Saved are the inputs and six numbers a row."""
    case = Case((1000, 700), 6)
    inputs = make_inputs(case)
    leaves = [getattr(inputs, name).requires_grad_() for name in NAMES]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        losses_of(kernel, case, inputs)
    extra = [t for t in saved if not any(t is given for given in (*leaves, inputs.labels))]
    assert sum(t.numel() for t in extra) <= 6 * inputs.labels.numel() + 2


# -- autocast


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_takes_mixed_dtypes_and_gives_each_gradient_its_own(product, hidden, kernel):
    """Parameters come in float32, as they train. Where they hold 16-bit numbers, nothing differs from such inputs."""
    case = Case((40, 30), 24)
    rounded = make_inputs(case)._replace(weight=make_inputs(case).weight.to(product).float())
    mixed = rounded._replace(hidden=rounded.hidden.to(hidden))
    with torch.autocast("cpu", product):
        found = results(kernel, case, mixed)
        assert [t.dtype for t in found] == [torch.float32] * 2 + [hidden] + [torch.float32] * 4
        narrow = results(kernel, case, mixed._replace(weight=mixed.weight.to(product)))
    *same_of_both, dweight, dbias = found
    *expected, narrow_dweight, narrow_dbias = narrow
    assert same((*same_of_both, dbias), (*expected, narrow_dbias))
    assert torch.equal(dweight.to(product), narrow_dweight) and narrow_dweight.dtype == product


def test_autocast_refuses_integers_and_leaves_float64_to_the_reference(kernel):
    case = Case()
    inputs = make_inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"^vocab_cross_entropy: weight must be floating, got int64\. Convert it"):
            losses_of("auto", case, inputs._replace(weight=inputs.weight.long()))
        double = inputs._replace(norm_bias=inputs.norm_bias.double())
        assert losses_of("auto", case, double)[0].isfinite()
        with pytest.raises(NotImplementedError, match="it computes in float32, which float64 exceeds"):
            losses_of(kernel, case, double)


# -- who runs, and why


def _reasons(**changes):
    """`explain`'s line for each implementation that does not run, by name; under "runs" the one that does."""
    inputs = make_inputs(Case())
    text = dalle_fast.explain(OP, **{**facts(inputs.hidden, inputs.weight), **changes})
    first, *lines = text.splitlines()
    return {"runs": first.split("'")[1]} | dict(line.strip().split(": ", 1) for line in lines)


def test_the_extension_runs_where_it_can(monkeypatch):
    if _extension.missing() is None:
        assert _reasons()["runs"] == _reasons(dtype=torch.float16, n_vocabulary=1)["runs"] == "cpu"
    assert _reasons(dtype=torch.float64)["runs"] == "reference"
    assert _reasons(dtype=torch.float64)["cpu"] == "it computes in float32, which float64 exceeds."
    assert _reasons(device="cuda")["cpu"] == "the extension runs on the CPU, the tensors are on 'cuda'."
    monkeypatch.setenv(_extension.OFF_VARIABLE, "1")
    assert _reasons()["runs"] == "reference"
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run here: the compiled extension is switched off by"):
        losses_of("cpu", Case(), make_inputs(Case()))
