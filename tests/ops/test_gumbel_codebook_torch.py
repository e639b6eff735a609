"""gumbel_codebook inside torch: registration, compilation, checkpoints, what autograd asks for, who runs and why."""

import pytest
import torch
from gumbel_codebook_cases import MODES, NAMES, SEED, Case, check_case, make_inputs, named, results, same
from implementations import auto_takes, skip_without
from tolerance import assert_within_budget
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import dalle_fast
from dalle_fast import _extension, rng
from dalle_fast.functional import gumbel_codebook
from dalle_fast.ops.gumbel_codebook import facts

OP = "gumbel_codebook"
every_mode = pytest.mark.parametrize("mode", MODES)
forward_op = torch.ops.dalle_fast.gumbel_codebook.default
backward_op = torch.ops.dalle_fast.gumbel_codebook_backward.default


@pytest.mark.parametrize(
    ("mode", "seeded", "dtype", "bias"),
    [
        ("soft", False, torch.float32, True),
        ("straight_through", True, torch.float32, False),
        ("reinmax", False, torch.bfloat16, False),
        ("soft", True, torch.bfloat16, True),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_opcheck(mode, seeded, dtype, bias, kernel):
    *inputs, noise = make_inputs(dtype=dtype)
    inputs = [t.requires_grad_() for t in inputs]
    if not bias:
        inputs[2] = None
    constants = (None, rng.seeds_to_tensor(SEED)) if seeded else (noise, None)
    constants = (*constants, torch.tensor(0.7, dtype=torch.float64))
    torch.library.opcheck(forward_op, (*inputs, *constants, 3, mode, True, kernel))
    saved = [None if t is None else t.detach() for t in inputs]
    embeds, _, noisy_codes, _, statistics = forward_op(*saved, *constants, 3, mode, True, kernel)
    rest = (*saved, *constants, embeds, noisy_codes, statistics, 3, mode, kernel)
    torch.library.opcheck(backward_op, (torch.randn_like(embeds), torch.ones(()), *rest))
    torch.library.opcheck(backward_op, (torch.randn_like(embeds), None, *rest))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("sizes", "bias"),
    [
        ({"batch": 0}, True),
        ({"grid": (3, 0)}, False),
        ({"grid": (1, 1)}, True),
        ({"batch": 3}, False),
        ({"n_codes": 1, "n_features": 1}, True),
    ],
)
def test_traced_and_real_results_lie_alike_in_memory(sizes, bias, impl):
    """opcheck cannot copy empty inputs."""
    skip_without(impl, OP)
    tensors = (*make_inputs(**sizes), torch.tensor(0.7, dtype=torch.float64))

    def lay(*tensors):
        inputs = (*tensors[:2], tensors[2] if bias else None, *tensors[3:5], None, tensors[5])
        embeds, codes, noisy_codes, kl, statistics = forward_op(*inputs, 0, "soft", True, impl)
        rest = (embeds, noisy_codes, statistics, 0, "soft", impl)
        found = (embeds, codes, noisy_codes, kl, statistics, *backward_op(embeds, kl, *inputs, *rest))
        return [(t.shape, t.stride(), t.dtype) for t in found]

    real = lay(*tensors)
    with FakeTensorMode():
        assert lay(*(torch.empty(t.shape, dtype=t.dtype) for t in tensors)) == real


def test_interpreted_triton_through_the_op():
    """The order in which a launcher of the other implementation gets its arguments; its numbers are tests/kernels'."""
    skip_without("triton", OP)
    for mode, seeded in (("soft", True), ("reinmax", False)):
        sizes = {"batch": 2, "grid": (3, 5), "problems": 2, "bias": seeded}
        check_case("triton", Case(20, 16, 16, mode, torch.float16, seeded=seeded, first_row=5, **sizes))


def _train(compiled, inputs, **arguments):
    leaves = [t.detach().requires_grad_() for t in inputs]
    embeds, codes, noisy_codes, kl = compiled(*leaves, with_kl=True, **arguments)
    loss = embeds.square().sum() + kl
    return embeds, codes, noisy_codes, kl, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    ("mode", "dynamic"), [("soft", False), ("straight_through", None), ("reinmax", True), ("soft", True)]
)
def test_compiles_into_one_graph(mode, dynamic, kernel, monkeypatch):
    auto_takes(monkeypatch, kernel, OP)
    torch.compiler.reset()
    compiled = torch.compile(gumbel_codebook, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, grid in ((2, (2, 3)), (3, (5, 4))):
        *inputs, noise = make_inputs(batch, 8, grid)
        for given in ({"seed": rng.seeds_to_tensor(SEED), "first_row": batch}, {"gumbel_noise": noise}):
            arguments = {"temperature": 0.7, **MODES[mode], **given}
            found = _train(compiled, inputs, **arguments)
            assert same(found, _train(gumbel_codebook, inputs, **arguments))


def _counting():
    """gumbel_codebook compiled, and the list of the graphs that were made for it."""
    torch.compiler.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    return torch.compile(gumbel_codebook, fullgraph=True, backend=keep), graphs


def test_another_seed_and_no_seed_compile_nothing_anew(impl, monkeypatch):
    auto_takes(monkeypatch, impl, OP)
    compiled, graphs = _counting()
    inputs = make_inputs()[:4]
    for seed in (0, 1, SEED):
        found = compiled(*inputs, temperature=0.7, seed=rng.seeds_to_tensor(seed))
        assert torch.equal(found[2], gumbel_codebook(*inputs, temperature=0.7, seed=seed)[2])
    assert len(graphs) == 1
    first, second = (compiled(*inputs, temperature=0.7)[0] for _ in range(2))
    assert len(graphs) == 2 and not torch.equal(first, second)


def test_a_temperature_that_falls_compiles_twice_at_most(impl, monkeypatch):
    auto_takes(monkeypatch, impl, OP)
    compiled, graphs = _counting()
    *inputs, noise = make_inputs()
    for temperature in (1.0, 0.9, 0.8, 0.7, 0.5):
        found = compiled(*inputs, temperature=temperature, gumbel_noise=noise)
        assert same(found, gumbel_codebook(*inputs, temperature=temperature, gumbel_noise=noise))
    assert len(graphs) <= 2


@every_mode
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_makes_the_same_noise_again(mode, reentrant, impl):
    """seed=None draws from torch's generator, whose state the checkpoint restores."""
    *inputs, _ = make_inputs(n_codes=40)
    seen = []

    def bottleneck(*tensors):
        embeds, _, noisy_codes, kl = gumbel_codebook(*tensors, temperature=0.7, with_kl=True, impl=impl, **MODES[mode])
        seen.append(noisy_codes)
        return embeds.square().sum() + kl

    def run(function):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in inputs]
        loss = function(*leaves)
        loss.backward()
        return loss, *(t.grad for t in leaves)

    plain = run(bottleneck)
    kept = run(lambda *tensors: checkpoint(bottleneck, *tensors, use_reentrant=reentrant))
    assert same(plain, kept)
    assert len(seen) == 3 and torch.equal(seen[1], seen[2])


# -- what autograd asks for


@every_mode
@pytest.mark.parametrize(
    "needed", [("features",), ("weight",), ("bias",), ("codebook",), ("features", "codebook"), NAMES[:3]]
)
def test_gradients_of_some_inputs_are_those_of_all(mode, needed, kernel):
    inputs, noise = named(make_inputs(n_codes=40))

    def gradients(names):
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        embeds, *_, kl = gumbel_codebook(
            **leaves, temperature=0.7, gumbel_noise=noise, with_kl=True, impl=kernel, **MODES[mode]
        )
        (embeds.square().sum() + kl).backward()
        return {name: t.grad for name, t in leaves.items()}

    some, every = gradients(needed), gradients(NAMES)
    assert all(torch.equal(some[n], every[n]) if n in needed else some[n] is None for n in NAMES)
    assert not gumbel_codebook(**inputs, temperature=0.7, impl=kernel)[0].requires_grad


@every_mode
def test_without_bias_there_is_no_gradient_of_it_and_a_zero_bias_changes_nothing(mode, kernel):
    inputs, noise = named(make_inputs(n_codes=40))
    without, zeros = {**inputs, "bias": None}, {**inputs, "bias": torch.zeros(40)}
    needed = ("features", "weight", "codebook")
    given = {"mode": mode, "needed": needed, "gumbel_noise": noise}
    assert same(results(kernel, without, **given), results(kernel, zeros, **given))


@every_mode
def test_gradients_of_embeds_and_of_the_kl_add_up(mode, kernel):
    """Each alone, as where only one is part of the loss; the KL has none to the codebook."""
    inputs, noise = named(make_inputs(4, 8, (5, 7), n_codes=40, dim=16))
    leaves = [t.requires_grad_() for t in inputs.values()]
    embeds, *_, kl = gumbel_codebook(
        *leaves, temperature=0.7, gumbel_noise=noise, with_kl=True, impl=kernel, **MODES[mode]
    )
    embeds_alone = torch.autograd.grad(embeds.square().sum(), leaves, retain_graph=True)
    kl_alone = torch.autograd.grad(kl, leaves, retain_graph=True)
    assert not kl_alone[3].any() and all(g.any() for g in (*kl_alone[:3], *embeds_alone))
    without_kl = gumbel_codebook(*leaves, temperature=0.7, gumbel_noise=noise, impl=kernel, **MODES[mode])[0]
    assert same(torch.autograd.grad(without_kl.square().sum(), leaves), embeds_alone)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    alone = gumbel_codebook(*exact, temperature=0.7, gumbel_noise=noise, with_kl=True)[3]
    own = gumbel_codebook(*leaves, temperature=0.7, gumbel_noise=noise, with_kl=True, impl="reference")[3]
    of_oracle = (torch.autograd.grad(value, given[:3]) for value, given in ((alone, exact), (own, leaves)))
    for got, right, other in zip(kl_alone, *of_oracle, strict=False):
        assert_within_budget(got, right, other, "gradient of the KL alone")


def test_a_second_derivative_is_refused_in_words(kernel):
    leaves = [t.requires_grad_() for t in make_inputs()[:4]]
    embeds = gumbel_codebook(*leaves, temperature=0.7, seed=1, impl=kernel)[0]
    (dfeatures,) = torch.autograd.grad(embeds.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^gumbel_codebook: only impl='reference' has a second derivative\. Pass"):
        dfeatures.sum().backward()


def test_nothing_with_an_axis_of_codes_is_saved(kernel):
    """Saved are inputs, embeds, codes, seed and a few numbers a row."""
    leaves = [t.requires_grad_() for t in make_inputs(2, 3, (5, 7), n_codes=1000)[:4]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        embeds, codes, *_ = gumbel_codebook(*leaves, temperature=0.7, seed=1, with_kl=True, impl=kernel)
    rows = codes.numel()
    extra = [t for t in saved if not any(t is leaf for leaf in leaves)]
    assert sum(t.numel() for t in extra) <= embeds.numel() + rows + 8 * rows + 1


# -- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_to_its_dtype(dtype, impl):
    leaves = [t.requires_grad_() for t in make_inputs(n_codes=40)[:4]]
    arguments = {"temperature": 0.7, "seed": 1, "with_kl": True, "impl": impl}
    with torch.autocast("cpu", dtype):
        mixed = (leaves[0].to(dtype), *leaves[1:])
        found = gumbel_codebook(*mixed, **arguments)
        embeds, *_, kl = found
        assert embeds.dtype == dtype and kl.dtype == torch.float32
    assert same(found, gumbel_codebook(*(t.to(dtype) for t in leaves), **arguments))
    gradients = torch.autograd.grad(embeds.float().sum() + kl, leaves)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        embeds = gumbel_codebook(*make_inputs(dtype=torch.float64)[:4], temperature=0.7)[0]
    assert embeds.dtype == torch.float64


def test_maps_lie_in_memory_as_a_convolution_reads_them():
    skip_without("cpu", OP)
    features, *rest, _ = make_inputs()
    embeds = gumbel_codebook(features.requires_grad_(), *rest, temperature=0.7, impl="cpu")[0]
    assert embeds.is_contiguous() and torch.autograd.grad(embeds.sum(), features)[0].is_contiguous()


# -- who runs, and why


def reasons(op=OP, **changes):
    """`explain`'s line for each implementation that does not run, by name; under "runs" the one that does."""
    features, _, _, codebook, _ = make_inputs()
    text = dalle_fast.explain(op, **{**facts(features, codebook), **changes})
    first, *lines = text.splitlines()
    return {"runs": first.split("'")[1]} | dict(line.strip().split(": ", 1) for line in lines)


@pytest.mark.parametrize("op", [OP, "codebook_indices"])
def test_the_extension_runs_where_it_can(op, monkeypatch):
    if _extension.missing() is None:
        assert reasons(op)["runs"] == reasons(op, dtype=torch.float16, n_codes=1)["runs"] == "cpu"
    assert reasons(op, dtype=torch.float64)["runs"] == "reference"
    assert reasons(op, dtype=torch.float64)["cpu"] == "it computes in float32, which float64 exceeds."
    monkeypatch.setenv(_extension.OFF_VARIABLE, "1")
    assert reasons(op)["runs"] == "reference"
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run here: the compiled extension is switched off by"):
        gumbel_codebook(*make_inputs()[:4], temperature=0.7, impl="cpu")


@pytest.mark.parametrize("op", [OP, "codebook_indices"])
def test_triton_runs_on_gpus_and_its_interpreter_by_name_only(op, monkeypatch):
    monkeypatch.setattr("dalle_fast.ops.support._missing_triton", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons(op)["triton"] == "Triton's interpreter is for tests: ask for it by name."
    assert reasons(op)["runs"] != "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reasons(op, device="cuda")["runs"] == "triton"
    assert reasons(op, device="cuda", dtype=torch.float64)["runs"] == "reference"
    assert reasons(op)["triton"] == "Triton's kernels run on GPUs, the tensors are on 'cpu'."
