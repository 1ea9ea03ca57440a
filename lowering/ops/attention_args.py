"""The arguments of the attention operators: one table, from which everything that lists arguments is made.

Made from it: the operators' schemas, the records that implementations, fake implementations and checks take in place of
arguments, what autograd saves and where it puts no gradient, and the names by which exporters read a call.

Semantics: arXiv 2509.24663, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, Generic, TypeVar

from torch import Tensor, fx

from infllm_pass.compat.aten import OpOverload, operator_name
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.params import DecodeParams, PrefillParams

from .sources import SOURCES


@dataclass(frozen=True)
class Argument:
    """An argument: its type in schemas, and what it is."""

    name: str
    type: str
    doc: str


ARGUMENTS = {
    argument.name: argument
    for argument in (
        Argument("grad_out", "Tensor", "gradient of the output, ``[B, Hq, Lq, Dv]``"),
        Argument("q", "Tensor", "``[B, Hq, Lq, D]``; query ``i`` stands at key ``offset + i`` and sees no later one"),
        Argument("k", "Tensor", "``[B, Hkv, Lk, D]``; ``Hq`` is a multiple of ``Hkv``"),
        Argument("v", "Tensor", "``[B, Hkv, Lk, Dv]``"),
        Argument("out", "Tensor", "the output of attention"),
        Argument("lse", "Tensor", "the log-sum-exp that attention gave"),
        Argument("state", "Tensor[]", "what `compress_keys` gave; in decode steps, what `new_state` gave"),
        Argument("selection", "Tensor[]", "what `select_blocks` gave; empty: every sequence is dense"),
        Argument("lengths", "Tensor", "integers ``[1]`` or ``[B]``: slot after a row's last valid key"),
        Argument("starts", "Tensor?", "the same: slot of a row's first valid key; None: 0"),
        Argument(
            "key_mask",
            "Tensor?",
            "bool ``[B, Lk]``, True where a key is valid. A row's sequence runs from its first to its last valid key, "
            "and positions and blocks count from its first; in decode steps and packed rows it only hides keys",
        ),
        Argument(
            "key_bias",
            "Tensor?",
            "floats ``[B or 1, Hkv or 1, Lk]``, added to the scaled and capped scores of keys; below -1e29, such as "
            "``-inf``, they hide a key. No part of the selection",
        ),
        Argument(
            "sinks",
            "Tensor?",
            "floats ``[Hq]``: logits that join the sum of every row's softmax and have no value. No part of the "
            "selection",
        ),
        Argument(
            "offsets",
            "Tensor?",
            "int32 or int64 ``[1]`` or ``[B]``: key index of query 0, added to `offset`. Keys after a row's last "
            "query, the free slots of a cache, then are no part of its sequence",
        ),
        Argument(
            "cu_seqlens_q",
            "Tensor?",
            "int32 ``[R + 1]``: packed sequences' query bounds, batch 1; only with `cu_seqlens_k`. The last query of a "
            "sequence then stands at its last key, and `offset` is not read",
        ),
        Argument(
            "cu_seqlens_k",
            "Tensor?",
            "int32 ``[R + 1]``: packed sequences' key bounds, counted through all rows; no sequence crosses a row",
        ),
        Argument("offset", "SymInt?", "key index of query 0; None: ``Lk - Lq`` (0 with `offsets`)"),
        Argument(
            "window",
            "SymInt?",
            "sliding window: the query at ``p`` sees keys after ``p - window`` only, and blocks wholly before are no "
            "candidates",
        ),
        Argument("scale", "float", "softmax scale"),
        Argument(
            "softcap",
            "float",
            "scaled scores ``x`` become ``softcap * tanh(x / softcap)``, in the selection too; 0: no cap",
        ),
        Argument("dense_len", "SymInt", "sequences of fewer keys are dense: they select nothing"),
        Argument("geometry", "str", "`geometry_text` of the block geometry"),
    )
}
"""All arguments, in the order in which operators take them."""


class AttentionCall(PrefillParams):
    """What a call over whole prompts says beside q, k and v; fields: see `ARGUMENTS`."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The operators' last arguments."""
        return _positional(self)


class DecodeCall(DecodeParams):
    """What a decode step says beside q, k, v and the state; fields: see `ARGUMENTS`."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The operator's last arguments."""
        return _positional(self)


def geometry_text(geometry: BlockGeometry) -> str:
    """The argument ``geometry``: the geometry as text, and the hash of the code behind the operators."""
    return f"{geometry.format()};{SOURCES}"


@lru_cache
def geometry_of(text: str) -> BlockGeometry:
    """The geometry of `geometry_text`, whatever code the text was made by."""
    return BlockGeometry.parse(text.partition(";")[0])


def _positional(call: AttentionCall | DecodeCall) -> tuple[Any, ...]:
    """The fields of a call in the order of `ARGUMENTS`; in a form that Dynamo traces, which does not know ``vars``."""
    names = _FIELDS[type(call)]
    return tuple(geometry_text(call.geometry) if name == "geometry" else getattr(call, name) for name in names)


_FIELDS = {
    record: tuple(name for name in ARGUMENTS if name in {field.name for field in fields(record)})
    for record in (AttentionCall, DecodeCall)
}


Call = TypeVar("Call", AttentionCall, DecodeCall)


class Signature(Generic[Call]):
    """The arguments of one operator.

    Args:
        own: names of its first arguments, which implementations take one by one.
        record: what the other arguments make together.
        returns: what it returns, as in schemas.
        mutated: name of a first argument that it writes to.
        without: names of the record's fields that it does not take.
    """

    def __init__(
        self,
        own: tuple[str, ...],
        record: type[Call],
        returns: str,
        *,
        mutated: str = "",
        without: tuple[str, ...] = (),
    ) -> None:
        self.own, self.record, self.returns, self.mutated = own, record, returns, mutated
        self.names = (*own, *(name for name in _FIELDS[record] if name not in without))
        self._rest = self.names[len(own) :]

    @property
    def schema(self) -> str:
        """The schema without the operator's name."""
        arguments = (f"{self._type(name)} {name}" for name in self.names)
        return f"({', '.join(arguments)}) -> {self.returns}"

    def _type(self, name: str) -> str:
        type_ = ARGUMENTS[name].type
        return type_.replace("Tensor", "Tensor(a!)") if name == self.mutated else type_

    @property
    def doc(self) -> str:
        """What the arguments are, a line each."""
        return "\n".join(f"    {name}: {ARGUMENTS[name].doc}." for name in self.names)

    def read(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Call]:
        """The first arguments, and the record of the others."""
        count = len(self.own)
        given = dict(zip(self._rest, arguments[count:], strict=True))
        given["geometry"] = geometry_of(given["geometry"])
        call = object.__new__(self.record)  # the constructor of a frozen record sets field by field: a microsecond
        call.__dict__.update(given)
        return arguments[:count], call

    def positional(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments by position, as a caller may have given some by name."""
        return (*args, *(kwargs[name] for name in self.names[len(args) :])) if kwargs else tuple(args)

    def rest(self, values: Mapping[str, Any]) -> list[Any]:
        """The arguments after the first ones by position, defaults where `values` names none."""
        return [values[name] if name in values else self._default(name) for name in self._rest]

    def _default(self, name: str) -> Any:
        default = {field.name: field.default for field in fields(self.record)}[name]
        if default is MISSING:
            raise TypeError(f"the operator needs {name}")
        return default

    def named(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a call in a graph, by name."""
        return dict(zip(self.names, self.positional(node.args, node.kwargs), strict=True))


def flatten_tensors(arguments: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among arguments and in lists, and what `restore_tensors` needs to put them back."""
    tensors: list[Tensor] = []
    rest: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            rest.append(_Places(1, False))
        elif isinstance(argument, list | tuple):
            tensors.extend(argument)
            rest.append(_Places(len(argument), True))
        else:
            rest.append(argument)
    return tensors, rest


def restore_tensors(tensors: Sequence[Tensor], rest: Sequence[Any]) -> list[Any]:
    """The arguments that `flatten_tensors` took apart."""
    left = iter(tensors)
    return [
        argument
        if not isinstance(argument, _Places)
        else [next(left) for _ in range(argument.count)]
        if argument.many
        else next(left)
        for argument in rest
    ]


def no_gradients(rest: Sequence[Any]) -> tuple[Any, ...]:
    """What autograd takes for arguments without a gradient, from `flatten_tensors`: None, a list of it for a list."""
    return tuple([None] * each.count if isinstance(each, _Places) and each.many else None for each in rest)


@dataclass(frozen=True)
class _Places:
    """Where tensors stood among arguments: one, or a list of some."""

    count: int
    many: bool


DIFFERENTIABLE_TERMS = ("key_bias", "sinks")
"""Arguments that have gradients beside q, k and v, in the order in which `BACKWARD` returns those that are given."""

SCORE_TERMS = (*DIFFERENTIABLE_TERMS, "softcap")
"""What scores have beside a mask."""

COMPRESS = Signature(("q", "k"), AttentionCall, "Tensor[]")
SELECT = Signature(("q", "k", "state"), AttentionCall, "Tensor[]")
ATTEND = Signature(("q", "k", "v", "selection"), AttentionCall, "(Tensor, Tensor)")
BACKWARD = Signature(
    ("grad_out", "q", "k", "v", "out", "lse", "selection"), AttentionCall, "(Tensor, Tensor, Tensor, Tensor[])"
)
DECODE = Signature(("q", "k", "v", "state"), DecodeCall, "(Tensor, Tensor)", mutated="state")
FUSED = Signature(("q", "k", "v"), AttentionCall, "Tensor", without=("cu_seqlens_q", "cu_seqlens_k"))

SIGNATURES: dict[str, Signature[Any]] = {
    "compress_keys": COMPRESS,
    "select_blocks": SELECT,
    "block_attention": ATTEND,
    "block_attention_backward": BACKWARD,
    "decode_attention": DECODE,
    "switchable_attention": FUSED,
}
"""The operators' arguments, by name in the namespace ``infllm``."""


def name_of(node: fx.Node) -> str:
    """The name of one of this package's operators that a node calls, without its namespace; "" for anything else."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "infllm":
        return ""
    return operator_name(node.target)
