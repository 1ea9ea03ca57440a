"""PyTorch operators: schema, fake implementation and autograd for the arithmetic in ``kernels``."""
