"""Private API of PyTorch and transformers: all that this package relies on, one function or type for each.

Nothing outside this folder reads an underscored name of another package. Every docstring says what the private thing
does, which versions differ, and what public API would replace it; ``tests/compat`` checks on the installed versions
that each still has the form that is relied on, and names the function here that has to be mended.
"""
