"""Triton kernels, one op a file; installed as `dalle_fast.kernels`. Inert: other libraries probe a top-level `kernels`."""
