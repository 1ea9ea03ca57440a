"""Selection and attention on the CPU: C++ kernels and the torch operators behind them."""
