"""What a compiled kernel must not be: each gate is one sentence, empty where the kernel passes."""

from __future__ import annotations

from triton_tools.compiled import Resources

# Dynamic and static shared memory that one block may have, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes a thread. A few registers saved around a loop cost nothing measurable; a spilled tile is hundreds of bytes.
SPILL_LIMIT = 64
STACK_LIMIT = 128  # spills live there, and arrays that are indexed at run time
SIXTEEN_BIT_TYPES = ("bf16", "f16")
MATRIX_INSTRUCTIONS = {100: ("UTCHMMA",)}
MATRIX_INSTRUCTIONS_ELSEWHERE = ("HMMA", "HGMMA")


def problems(kernel: Resources, *, sixteen_bit: bool) -> list[str]:
    """Why a kernel must not be shipped, a sentence each.

    Args: sixteen_bit: the kernel is for bfloat16 or float16 tensors: its products must be of 16-bit operands.
    """
    found = [_spills(kernel), _shared(kernel), _tf32(kernel), _atomics(kernel)]
    if sixteen_bit:
        found.append(_sixteen_bit(kernel))
    return [sentence for sentence in found if sentence]


def _spills(kernel: Resources) -> str:
    if max(kernel.spill_store_bytes, kernel.spill_load_bytes) <= SPILL_LIMIT and kernel.stack_bytes <= STACK_LIMIT:
        return ""
    return (
        f"spills: {kernel.spill_store_bytes} bytes a thread stored and {kernel.spill_load_bytes} loaded for want of"
        f" registers, at most {SPILL_LIMIT} may be; {kernel.stack_bytes} bytes of stack, at most {STACK_LIMIT}."
    )


def _shared(kernel: Resources) -> str:
    limit = SHARED_LIMIT[kernel.target]
    if kernel.shared_bytes <= limit:
        return ""
    return f"shared memory: {kernel.shared_bytes} bytes a block, sm_{kernel.target} has {limit}."


def _tf32(kernel: Resources) -> str:
    """tf32x3 is three TF32 products that give float32 accuracy; a single one gives 10 bits."""
    precisions = {precision for operand, precision in kernel.dots if operand == "f32"}
    if "tf32" in precisions:
        return 'TF32: a tl.dot of float32 must say input_precision="ieee" or "tf32x3".'
    if kernel.tf32 and "tf32x3" not in precisions:
        return f"TF32: {kernel.tf32} mentions in the PTX of a kernel that asks for none."
    return ""


def _atomics(kernel: Resources) -> str:
    if not kernel.atomics:
        return ""
    return f"atomics: {kernel.atomics} in the PTX; their order, and so the sum, differs from run to run."


def _sixteen_bit(kernel: Resources) -> str:
    wide = sorted({operand for operand, _ in kernel.dots if operand not in SIXTEEN_BIT_TYPES})
    if wide:
        return f"16-bit: a tl.dot has operands of type {', '.join(wide)}: convert them to the tensors' type."
    wanted = MATRIX_INSTRUCTIONS.get(kernel.target, MATRIX_INSTRUCTIONS_ELSEWHERE)
    if not any(name in kernel.instructions for name in wanted):
        return f"16-bit: none of {', '.join(wanted)} in the machine code, only {kernel.instructions}."
    return ""
