"""The arithmetic: compression, block selection and block attention on tensors and plain numbers."""
