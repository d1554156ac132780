"""Triton's launches recorded and its kernels compiled, on a machine without a GPU."""
