"""The operators that rewritten graphs call: schemas, checks, fake implementations, autograd, kernels."""
