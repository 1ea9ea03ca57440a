"""The one table of what graph targets compute.

Dynamo writes the same computation in many spellings: ``torch.add``, ``operator.add``, ``Tensor.add``. Every
other module asks `read` what a node computes and sees one `Kind` with named arguments, whatever the spelling.
To teach the pass a new spelling, add it here and nowhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


class Kind(Enum):
    """What an operator computes."""

    ATTENTION = auto()
    ARANGE = auto()
    FULL = auto()
    NEG = auto()
    ADD = auto()
    SUB = auto()
    MUL = auto()
    FLOORDIV = auto()
    EQ = auto()
    NE = auto()
    LT = auto()
    LE = auto()
    GT = auto()
    GE = auto()
    AND = auto()
    OR = auto()
    NOT = auto()
    WHERE = auto()
    CAST = auto()
    IDENTITY = auto()
    GETITEM = auto()
    UNSQUEEZE = auto()
    EXPAND = auto()
    RESHAPE = auto()
    TRANSPOSE = auto()
    PERMUTE = auto()
    REPEAT_INTERLEAVE = auto()
    DIFF = auto()
    CUMSUM = auto()


@dataclass(frozen=True)
class Call:
    """A node read through the table: what it computes and its arguments by name."""

    kind: Kind
    args: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """How a target's positional arguments are named; a leading ``*`` takes all that are left.

    `constants` are arguments that the spelling itself fixes (``Tensor.bool`` is a cast to ``torch.bool``).
    """

    kind: Kind
    parameters: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...] = ()


_TABLE: dict[object, _Entry] = {}


def _spell(kind: Kind, parameters: str, targets: Iterable[Callable[..., Any] | str], **constants: Any) -> None:
    """Enter spellings of one kind: callables stand for functions, strings for tensor methods."""
    entry = _Entry(kind, tuple(parameters.split()), tuple(constants.items()))
    for target in targets:
        _TABLE[target] = entry


_spell(
    Kind.ATTENTION,
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
    [F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention],
)
_spell(Kind.ARANGE, "*bounds", [torch.arange])
_spell(Kind.FULL, "size", [torch.ones], fill_value=1)
_spell(Kind.FULL, "size", [torch.zeros], fill_value=0)
_spell(Kind.FULL, "size fill_value", [torch.full])
_spell(Kind.FULL, "like", [torch.ones_like], fill_value=1)
_spell(Kind.FULL, "like", [torch.zeros_like], fill_value=0)
_spell(Kind.FULL, "like fill_value", [torch.full_like])
_spell(Kind.FULL, "like size", ["new_ones"], fill_value=1)
_spell(Kind.FULL, "like size", ["new_zeros"], fill_value=0)
_spell(Kind.FULL, "like size fill_value", ["new_full"])
_spell(Kind.NEG, "input", [operator.neg, torch.neg, "neg", "__neg__"])
_BINARY: dict[Kind, list[Callable[..., Any] | str]] = {
    Kind.ADD: [operator.add, torch.add, "add", "__add__"],
    Kind.SUB: [operator.sub, torch.sub, "sub", "__sub__"],
    Kind.MUL: [operator.mul, torch.mul, "mul", "__mul__"],
    Kind.FLOORDIV: [operator.floordiv, torch.floor_divide, "floor_divide", "__floordiv__"],
    Kind.EQ: [operator.eq, torch.eq, "eq", "__eq__"],
    Kind.NE: [operator.ne, torch.ne, torch.not_equal, "ne", "__ne__"],
    Kind.LT: [operator.lt, torch.lt, torch.less, "lt", "__lt__"],
    Kind.LE: [operator.le, torch.le, torch.less_equal, "le", "__le__"],
    Kind.GT: [operator.gt, torch.gt, torch.greater, "gt", "__gt__"],
    Kind.GE: [operator.ge, torch.ge, torch.greater_equal, "ge", "__ge__"],
    Kind.AND: [operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", "bitwise_and", "__and__"],
    Kind.OR: [operator.or_, torch.logical_or, torch.bitwise_or, "logical_or", "bitwise_or", "__or__"],
}
for _kind, _targets in _BINARY.items():
    _spell(_kind, "input other", _targets)
_spell(
    Kind.NOT,
    "input",
    [operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not", "__invert__"],
)
_spell(Kind.WHERE, "condition input other", [torch.where])
_spell(Kind.CAST, "input *targets", ["to", "type"])
for _name, _dtype in {
    "bool": torch.bool,
    "int": torch.int32,
    "long": torch.int64,
    "float": torch.float32,
}.items():
    _spell(Kind.CAST, "input", [_name], dtype=_dtype)
_spell(Kind.IDENTITY, "input", ["contiguous", "clone", "detach", "cpu", "cuda", torch.clone, torch.detach])
_spell(Kind.GETITEM, "input index", [operator.getitem, "__getitem__"])
_spell(Kind.UNSQUEEZE, "input dim", [torch.unsqueeze, "unsqueeze"])
_spell(Kind.EXPAND, "input *sizes", ["expand"])
_spell(Kind.EXPAND, "input size", [torch.broadcast_to, "broadcast_to"])
_spell(Kind.EXPAND, "input other", ["expand_as"])
_spell(Kind.RESHAPE, "input *shape", [torch.reshape, "reshape", "view"])
_spell(Kind.TRANSPOSE, "input dim0 dim1", [torch.transpose, "transpose", torch.swapaxes, "swapaxes"])
_spell(Kind.PERMUTE, "input *dims", [torch.permute, "permute"])
_spell(Kind.REPEAT_INTERLEAVE, "input repeats dim", [torch.repeat_interleave, "repeat_interleave"])
_spell(Kind.DIFF, "input n dim prepend append", [torch.diff, "diff"])
_spell(Kind.CUMSUM, "input dim", [torch.cumsum, "cumsum"])


def read(node: fx.Node) -> Call | None:
    """What a node computes, with its arguments by name, or None for a target that the table does not hold.

    A call with more positional arguments than the table names is None too: it is not the known spelling.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    entry = _TABLE.get(node.target)
    if entry is None:
        return None
    args: dict[str, Any] = dict(entry.constants)
    rest = list(node.args)
    for name in entry.parameters:
        if name.startswith("*"):
            args[name[1:]] = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)
            rest = []
        elif rest:
            args[name] = rest.pop(0)
    if rest:
        return None
    args.update(node.kwargs)
    return Call(entry.kind, args)


def written_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that a node overwrites in place, or None for a node that writes to none.

    In-place methods and functions end in one underscore (the table holds none, but ``operator.and_``),
    augmented assignments are ``operator.i*``, and any call with ``out=`` writes to it.
    """
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.target in _TABLE:
        return None
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if node.target in _AUGMENTED_ASSIGNMENTS:
            name = "assign_"
    else:
        return None
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED_METHODS
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if in_place and isinstance(first, fx.Node) else None


_AUGMENTED_ASSIGNMENTS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.imatmul,
}
_AUGMENTED_METHODS = {f"__{function.__name__}__" for function in _AUGMENTED_ASSIGNMENTS}
