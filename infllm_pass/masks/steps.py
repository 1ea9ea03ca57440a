"""The steps of a proof, in the log at DEBUG level: what each node evaluated to, how a mask was split, what followed."""

from __future__ import annotations

import logging

import sympy
from sympy.core.function import AppliedUndef
from torch import fx

from infllm_pass.masks.normal_form import MaskPredicate, UnprovenMask

logger = logging.getLogger("infllm_pass")

_MOST_CHARACTERS = 300
"""Of one expression; what is longer is cut."""


def told() -> bool:
    """Whether anybody reads the steps; making their text costs more than the proof."""
    return logger.isEnabledFor(logging.DEBUG)


def tell_value(node: fx.Node, value: sympy.Basic, why: str) -> None:
    """Tell what the element of a node's tensor at ``(i0, i1, …)`` is.

    Args:
        node: the node.
        value: its element.
        why: why nothing is known of it but its name; "" where it was followed.
    """
    if told():
        logger.debug("proof: node %s is %s%s", node.name, _text(value), f": {why}" if why else "")


def tell_terms(nodes: list[fx.Node], value: sympy.Basic) -> None:
    """Tell of what the tensors that mask a site say together."""
    if told():
        logger.debug("proof: mask of %s lets through %s", ", ".join(node.name for node in nodes), _text(value))


def tell_part(part: sympy.Basic, found: str) -> None:
    """Tell what a part of a mask was taken for."""
    if told():
        logger.debug("proof: part %s: %s", _text(part), found)


def tell_proof(proof: MaskPredicate | UnprovenMask, again: bool = False) -> None:
    """Tell what was proved of a mask, or what kept it from being proved.

    Args:
        proof: the outcome.
        again: whether it was known from a site before.
    """
    if told():
        found = f"unproven {proof.described}" if isinstance(proof, UnprovenMask) else f"proved {proof}"
        logger.debug("proof: %s%s", found, ", as for a site before" if again else "")


def plain_names(expression: sympy.Basic) -> sympy.Basic:
    """An expression with tensors named as their nodes are, without the graph that each belongs to."""
    functions = {
        atom: sympy.Function(atom.func.__name__.split("@")[0])(*atom.args) for atom in expression.atoms(AppliedUndef)
    }
    symbols = {symbol: sympy.Symbol(symbol.name.split("@")[0]) for symbol in expression.free_symbols}
    return expression.xreplace(functions).xreplace(symbols)


def _text(expression: sympy.Basic) -> str:
    text = str(plain_names(expression))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
