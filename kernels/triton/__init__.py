"""Triton kernels for CUDA devices, and how they are launched."""
