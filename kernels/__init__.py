"""Triton kernels, one op a file, installed as `dalle_fast.kernels`. Inert: other libraries probe for a `kernels`."""
