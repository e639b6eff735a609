"""Proof of Triton kernels on a machine without a GPU: run them in the interpreter, compile them ahead of time.

In the interpreter (TRITON_INTERPRET=1, which tests/conftest.py sets before anything imports Triton, then calling
`triton_tools.interpreter.install()`): every launch of a test is checked, nothing is to be asked for.

    out = torch.full((n,), torch.nan)
    _double[(2,)](x, out, n, BLOCK=16)    # raises KernelFault where the kernel touches what it must not

    with pytest.raises(KernelFault, match="`x_ptr`"):    # from triton_tools.guard import KernelFault
        ...

- bfloat16 computes what a GPU computes: operands widened to float32, results rounded to nearest even.
- An access outside the elements of the very tensor view whose pointer it was computed from is a KernelFault that names
  the kernel argument: of packed queries, keys and values, reading a key through the query pointer counts.
- So are two program instances that touch one element, one of them writing, and a `tl.store` that stores twice to one.
- `tl.device_assert` asserts, and integer arithmetic narrower than 64 bits that overflows is such an assertion.
- Errors inside a kernel arrive as they were raised, not wrapped.

Not there: libdevice, inline assembly, atomics and reductions of bfloat16 (widen first; the last raises).

Ahead of time (another process, TRITON_INTERPRET unset): see `triton_tools.ahead_of_time`.
"""
