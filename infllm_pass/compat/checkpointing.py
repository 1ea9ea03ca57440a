"""Activation checkpointing in compiled graphs: which operators' results are saved where all others are recomputed.

A graph of Dynamo holds a checkpointed part as a body of ``tag_activation_checkpoint``; a ``context_fn`` that the user
gave is in the body's ``meta``, and what compiles or runs the graph asks it, the same in torch 2.11 to 2.15.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["checkpointed_bodies", "save_results", "saves_quietly", "traces_writes"]

_CONTEXT_FN = "_checkpoint_context_fn"
_OPERATORS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
_NOTICE = "Detected that context_fn is passed to torch.utils.checkpoint under torch.compile"


def checkpointed_bodies(root: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs that are called to be recomputed in the backward pass, in a module tree."""
    found: dict[int, fx.GraphModule] = {}
    for module in root.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.find_nodes(op="get_attr"):
            if any(getattr(user.target, "__name__", "") in _OPERATORS for user in node.users):
                body = getattr(module, str(node.target), None)
                if isinstance(body, fx.GraphModule):
                    found[id(body)] = body
    return list(found.values())


def traces_writes() -> bool:
    """Whether a body with a ``context_fn`` may write in place to what it computed.

    From torch 2.13 on; before, tracing the backward pass takes what the forward pass left, and finds it overwritten.
    """
    return hasattr(torch._higher_order_ops.wrap, "_always_prefer_recompute")


def save_results(body: fx.GraphModule, operators: frozenset[Any]) -> None:
    """Let the results of some operators be saved for the backward pass of a checkpointed body.

    What the user's own ``context_fn`` says of other operators stays, and what it forbids to be saved is not saved.

    Args:
        body: one of `checkpointed_bodies`.
        operators: overloads that it calls, or that graphs nested in it call.
    """
    known = body.meta.get(_CONTEXT_FN)
    names = frozenset(map(str, operators))
    if isinstance(known, _SavingContexts):
        body.meta[_CONTEXT_FN] = _SavingContexts(names | known.operators, known.given)
    else:
        body.meta[_CONTEXT_FN] = _SavingContexts(names, known)


@dataclass(frozen=True)
class _SavingContexts:
    """A ``context_fn``.

    Attributes:
        operators: names of those whose results are saved; caches of compiled graphs pickle names, no overloads.
        given: what decides about the others; None: they are recomputed.
    """

    operators: frozenset[str]
    given: Callable[[], tuple[Any, Any]] | None

    def __call__(self) -> tuple[Any, Any]:
        """The contexts of the forward pass and of recomputing; ``policy_fn`` decides in both."""
        given = self.given or partial(create_selective_checkpoint_contexts, _recompute)
        contexts: tuple[Any, Any] = given()
        for context in contexts:
            if hasattr(context, "policy_fn"):
                context.policy_fn = partial(self._decide, context.policy_fn)
        return contexts

    def _decide(self, otherwise: Callable[..., Any], context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        decided = otherwise(context, operator, *args, **kwargs)
        if str(operator) in self.operators and decided is not CheckpointPolicy.MUST_RECOMPUTE:
            return CheckpointPolicy.MUST_SAVE
        return decided

    @property
    def cache_hash(self) -> str:
        """What AOTAutograd's cache knows the contexts by; an AttributeError, as it expects, if `given` has none."""
        given = "" if self.given is None else self.given.cache_hash  # type: ignore[attr-defined]
        return f"infllm {sorted(self.operators)} {given}"


def _recompute(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def saves_quietly(root: fx.GraphModule) -> Iterator[None]:
    """Without PyTorch's notice that graphs have a ``context_fn``, if none is the user's own."""
    contexts = [body.meta.get(_CONTEXT_FN) for body in checkpointed_bodies(root)]
    own = all(isinstance(each, _SavingContexts) and each.given is None for each in contexts if each is not None)
    if not own or not any(contexts):
        yield
        return
    log = torch._higher_order_ops.wrap.log
    log.addFilter(_is_no_notice)
    try:
        yield
    finally:
        log.removeFilter(_is_no_notice)


def _is_no_notice(record: logging.LogRecord) -> bool:
    return _NOTICE not in record.getMessage()
