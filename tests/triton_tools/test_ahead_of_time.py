"""The gates refuse every fault they are for, on kernels that have it; what they read is read rightly."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest

from triton_tools import ahead_of_time
from triton_tools.ahead_of_time import (
    TARGETS,
    AotCase,
    Task,
    compile_case,
    compile_task,
    in_own_process,
    representative,
    tasks,
)
from triton_tools.compiled import Resources, count_instructions, dots_of
from triton_tools.gates import SHARED_LIMIT, SPILL_LIMIT, STACK_LIMIT, problems

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (or blocked: the bare pass)",
)

GOOD = Resources(
    registers=128,
    stack_bytes=0,
    spill_store_bytes=0,
    spill_load_bytes=0,
    shared_bytes=65_536,
    warps=4,
    instructions={"HMMA": 32},
    dots=[("bf16", "ieee")],
    tf32=0,
    atomics=0,
    target=80,
    triton="3.9.0",
)


@needs_triton
def test_every_faulty_kernel_is_refused_and_every_clean_one_passes():
    outcomes = in_own_process("--cases", "triton_tools.faulty_cases")
    assert {outcome["task"]["target"] for outcome in outcomes} == {80, 90, 100}
    for outcome in outcomes:
        case = outcome["task"]["case"]
        first_words = [problem.split(":")[0] for problem in outcome["problems"]]
        assert first_words == ([] if case.startswith("clean") else [case]), outcome
    [recorded] = [outcome for outcome in outcomes if outcome["task"]["case"] == "clean sum"]
    assert recorded["resources"]["warps"] == 2


@needs_triton
def test_interpreted_kernel_cannot_be_compiled():
    case = AotCase("any", SimpleNamespace(__name__="_kernel"), (), {}, {}, sixteen_bit=False)
    with pytest.raises(RuntimeError, match=r"_kernel: must be a @triton.jit function"):
        compile_case(case, 90)


@needs_triton
def test_what_does_not_compile_is_an_error():
    with pytest.raises(RuntimeError, match="no_such_cases"):
        in_own_process("--cases", "no_such_cases")


def test_good_resources_pass():
    assert problems(GOOD, sixteen_bit=True) == []
    at_limit = replace(GOOD, stack_bytes=STACK_LIMIT, spill_store_bytes=SPILL_LIMIT, spill_load_bytes=SPILL_LIMIT)
    assert problems(at_limit, sixteen_bit=True) == []


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"stack_bytes": STACK_LIMIT + 8}, "spills"),
        ({"spill_store_bytes": SPILL_LIMIT + 4}, "spills"),
        ({"spill_load_bytes": SPILL_LIMIT + 4}, "spills"),
        ({"shared_bytes": SHARED_LIMIT[80] + 1}, "shared memory"),
        ({"dots": [("bf16", "ieee"), ("f32", "tf32")]}, "TF32"),
        ({"tf32": 1}, "TF32"),
        ({"atomics": 1}, "atomics"),
        ({"dots": [("bf16", "ieee"), ("f32", "ieee")]}, "16-bit"),
        ({"instructions": {"FFMA": 999}}, "16-bit"),
        ({"instructions": {"HMMA": 32}, "target": 100}, "16-bit"),
    ],
)
def test_each_gate_says_its_sentence(fault, word):
    found = problems(replace(GOOD, **fault), sixteen_bit=True)
    assert any(problem.startswith(f"{word}: ") for problem in found)


def test_three_tf32_products_are_float32():
    kernel = replace(GOOD, dots=[("f32", "tf32x3")], tf32=96)
    assert problems(kernel, sixteen_bit=False) == []


def test_every_target_has_a_limit():
    assert set(SHARED_LIMIT) == set(TARGETS)


def test_instructions_are_counted_with_and_without_predicates():
    code = """
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;   /* 0x0000000c0804723c */
                                                                           /* 0x004fe20000041804 */
        /*0090*/              @!P0 STL [R1+0x4], R7 ;                      /* 0x0000000701007387 */
        /*00a0*/              @P2  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;   /* 0x0000000c0804723c */
        /*00b0*/             @!UP0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*00c0*/                   FFMA R1, R2, R3, R4 ;
        /*00d0*/                   STLXX R1, R2 ;
    """
    assert count_instructions(code) == {"HMMA": 2, "UTCHMMA": 1, "FFMA": 1, "STL": 1}


def test_dots_are_read_with_operand_and_precision():
    ttir = """
        %a = tt.dot %x, %y, %z : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>
        %b = tt.dot %x, %y, %z, inputPrecision = tf32x3 : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>
        %c = tt.dot %x, %y, %z, inputPrecision = tf32 {k = 1 : i32} : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32>
    """  # noqa: E501
    assert dots_of(ttir) == [("bf16", "ieee"), ("f16", "tf32"), ("f32", "tf32x3")]


def case(kernel: str, name: str, sixteen_bit: bool, targets: tuple[int, ...] = TARGETS) -> AotCase:
    """A case that nothing can compile."""
    return AotCase(name, SimpleNamespace(__name__=kernel, fn=case), (), {}, {}, sixteen_bit, targets)


@pytest.fixture
def some_cases(monkeypatch):
    """Stands in for a module of cases."""
    cases = [
        case("_fwd", "bf16", True),
        case("_fwd", "fp16", True),
        case("_fwd", "fp32", False, (80,)),
        case("_bwd", "bf16", True, (86, 90)),
    ]
    monkeypatch.setattr(ahead_of_time, "_load", lambda module: cases)
    return cases


def chosen(some: list[Task]) -> list[tuple[str, str, int]]:
    return [(task.kernel, task.case, task.target) for task in some]


def test_tasks_are_all_cases_for_their_targets(some_cases):
    everything = list(tasks(["some"]))
    assert len(everything) == 6 + 6 + 1 + 2
    assert {task.target for task in everything} == set(TARGETS)


def test_slice_has_every_kernel_with_and_without_sixteen_bit_operands(some_cases):
    assert chosen(representative(tasks(["some"]))) == [
        ("_fwd", "bf16", 90),
        ("_fwd", "fp32", 80),
        ("_bwd", "bf16", 90),
    ]


def test_code_that_changed_since_it_was_listed_is_not_compiled(some_cases):
    task = next(tasks(["some"]))
    with pytest.raises(RuntimeError, match="_fwd, bf16: its code changed after it was listed"):
        compile_task(replace(task, digest="another"))


def test_cases_of_one_name_are_an_error(some_cases):
    some_cases.append(some_cases[0])
    with pytest.raises(ValueError, match="must differ in name, got 'bf16' twice"):
        list(tasks(["some"]))
