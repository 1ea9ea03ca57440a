"""Every causal language model at hand, built small and random, as test specimens of the pass.

``python -m tests.zoo`` examines them all and writes ``docs/zoo.md`` and ``tests/zoo/expected.json``.
"""
