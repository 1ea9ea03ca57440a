"""The table of operator spellings: from a graph target to what it computes (`Kind`) and its arguments by name.

The same computation has many spellings: ``torch.add``, ``operator.add``, ``Tensor.add`` in Dynamo graphs,
``aten.add.Tensor`` in graphs of ``torch.export``. Every other module asks `read` what a node computes and sees one
`Kind` with named arguments, whatever the spelling. To teach the pass a new spelling, add it here and nowhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from infllm_pass.compat import aten as private
from infllm_pass.graph.kinds import Call, Kind

__all__ = [
    "Call",
    "Kind",
    "Write",
    "read",
    "read_copy",
    "read_in_place",
    "read_update",
    "read_write",
    "scatters",
    "written_arguments",
]


@dataclass(frozen=True)
class _Entry:
    """How a target's positional arguments are named; a leading ``*`` takes all that are left.

    `constants` are arguments that the spelling itself fixes (``Tensor.bool`` is a cast to ``torch.bool``);
    `adapt` turns the arguments of a spelling into those that its kind is read with.
    """

    kind: Kind
    parameters: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...] = ()
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Attribute:
    """An attribute of a tensor that is an operator; up to torch 2.13 Dynamo writes ``getattr(x, "mT")``."""

    name: str


_TABLE: dict[object, _Entry] = {}


def _spell(
    kind: Kind,
    parameters: str,
    targets: Iterable[Callable[..., Any] | str | _Attribute],
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **constants: Any,
) -> None:
    """Enter spellings of one kind: callables stand for functions and overloads, strings for tensor methods."""
    entry = _Entry(kind, tuple(parameters.split()), tuple(constants.items()), adapt)
    for target in targets:
        _TABLE[target] = entry


def _as_index(args: dict[str, Any]) -> dict[str, Any]:
    """``select``, ``slice`` and ``narrow`` along one dimension, as the index of a subscript."""
    dim = args.get("dim", 0)
    entry = args["index"] if "index" in args else slice(args.get("start"), args.get("end"), args.get("step"))
    full = slice(None)
    index = (full,) * dim + (entry,) if dim >= 0 else (Ellipsis, entry, *(full,) * (-dim - 1))
    return {"input": args["input"], "index": index}


def _tensors_as_index(args: dict[str, Any]) -> dict[str, Any]:
    """``aten.index`` leaves a dimension alone where a subscript has a full slice."""
    return {
        "input": args["input"],
        "index": tuple(slice(None) if entry is None else entry for entry in args["indices"]),
    }


def _largest(args: dict[str, Any]) -> dict[str, Any]:
    """``max`` of a tensor and a second one, where that stands for the dimension."""
    if isinstance(args.get("dim"), fx.Node):
        args["other"] = args.pop("dim")
    return args


def _input_only(args: dict[str, Any]) -> dict[str, Any]:
    """A reshape whose arguments say no more than the shape of its result does."""
    return {"input": args["input"]}


aten = torch.ops.aten

_spell(
    Kind.ATTENTION,
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
    [
        F.scaled_dot_product_attention,
        private.ATTENTION_BUILTIN,
        aten.scaled_dot_product_attention.default,
    ],
)
_spell(Kind.ARANGE, "*bounds", [torch.arange, aten.arange.default, aten.arange.start, aten.arange.start_step])
_spell(Kind.SCALAR_TENSOR, "data", [private.SCALAR_TENSOR])
_spell(Kind.FULL, "*size", [torch.ones, aten.ones.default], fill_value=1)
_spell(Kind.FULL, "*size", [torch.zeros, aten.zeros.default], fill_value=0)
_spell(Kind.FULL, "size fill_value", [torch.full, aten.full.default])
_spell(Kind.FULL, "like", [torch.ones_like, aten.ones_like.default], fill_value=1)
_spell(Kind.FULL, "like", [torch.zeros_like, aten.zeros_like.default], fill_value=0)
_spell(Kind.FULL, "like fill_value", [torch.full_like, aten.full_like.default])
_spell(Kind.FULL, "like *size", ["new_ones", aten.new_ones.default], fill_value=1)
_spell(Kind.FULL, "like *size", ["new_zeros", aten.new_zeros.default], fill_value=0)
_spell(Kind.FULL, "like size fill_value", ["new_full", aten.new_full.default])
_spell(Kind.SCALAR_TENSOR, "data", [torch.tensor, torch.as_tensor, torch.scalar_tensor, aten.scalar_tensor.default])
_spell(Kind.NEG, "input", [operator.neg, torch.neg, "neg", "__neg__", aten.neg.default])
_spell(Kind.ABS, "input", [operator.abs, torch.abs, torch.absolute, "abs", "absolute", "__abs__", aten.abs.default])
_BINARY: dict[Kind, list[Callable[..., Any] | str]] = {
    Kind.ADD: [operator.add, torch.add, "add", "__add__", "__radd__", aten.add.Tensor, aten.add.Scalar],
    Kind.SUB: [operator.sub, torch.sub, "sub", "__sub__", aten.sub.Tensor, aten.sub.Scalar],
    Kind.MUL: [operator.mul, torch.mul, "mul", "__mul__", "__rmul__", aten.mul.Tensor, aten.mul.Scalar],
    Kind.FLOORDIV: [
        *(operator.floordiv, torch.floor_divide, "floor_divide", "__floordiv__"),
        *(aten.floor_divide.default, aten.floor_divide.Scalar),
    ],
    Kind.DIV: [
        *(operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide"),
        *("__truediv__", aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.divide.Tensor),
    ],
    Kind.POW: [
        *(operator.pow, torch.pow, "pow", "__pow__"),
        *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar),
    ],
    Kind.EQ: [operator.eq, torch.eq, "eq", "__eq__", aten.eq.Tensor, aten.eq.Scalar],
    Kind.NE: [operator.ne, torch.ne, torch.not_equal, "ne", "__ne__", aten.ne.Tensor, aten.ne.Scalar],
    Kind.LT: [operator.lt, torch.lt, torch.less, "lt", "__lt__", aten.lt.Tensor, aten.lt.Scalar],
    Kind.LE: [operator.le, torch.le, torch.less_equal, "le", "__le__", aten.le.Tensor, aten.le.Scalar],
    Kind.GT: [operator.gt, torch.gt, torch.greater, "gt", "__gt__", aten.gt.Tensor, aten.gt.Scalar],
    Kind.GE: [operator.ge, torch.ge, torch.greater_equal, "ge", "__ge__", aten.ge.Tensor, aten.ge.Scalar],
    Kind.AND: [
        *(operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", "bitwise_and", "__and__"),
        *(aten.logical_and.default, aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.__and__.Tensor),
    ],
    Kind.OR: [
        *(operator.or_, torch.logical_or, torch.bitwise_or, "logical_or", "bitwise_or", "__or__"),
        *(aten.logical_or.default, aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.__or__.Tensor),
    ],
}
for _kind, _targets in _BINARY.items():
    _spell(_kind, "input other", _targets)
_spell(
    Kind.NOT,
    "input",
    [
        *(operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not", "__invert__"),
        *(aten.logical_not.default, aten.bitwise_not.default),
    ],
)
_spell(
    Kind.WHERE,
    "condition input other",
    [torch.where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar],
)
_spell(Kind.WHERE, "input condition other", ["where"])
_spell(Kind.CAST, "input *targets", ["to", "type", aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout])
_spell(Kind.CAST, "input other", ["type_as", aten.type_as.default])
_spell(Kind.CAST, "input", [aten._to_copy.default])
for _name, _dtype in {
    "bool": torch.bool,
    "int": torch.int32,
    "long": torch.int64,
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}.items():
    _spell(Kind.CAST, "input", [_name], dtype=_dtype)
_spell(
    Kind.IDENTITY,
    "input",
    [
        *("contiguous", "clone", "cpu", "cuda", torch.clone, aten.contiguous.default),
        *(aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default),
    ],
)
_spell(Kind.DETACH, "input", ["detach", torch.detach, aten.detach.default])
_spell(Kind.GETITEM, "input index", [operator.getitem, "__getitem__"])
_spell(Kind.GETITEM, "input dim index", [torch.select, "select", aten.select.int], _as_index)
_spell(Kind.GETITEM, "input dim start end step", [aten.slice.Tensor], _as_index)
_spell(Kind.GETITEM, "input indices", [aten.index.Tensor], _tensors_as_index)
_spell(Kind.UNSQUEEZE, "input dim", [torch.unsqueeze, "unsqueeze", aten.unsqueeze.default])
_spell(Kind.EXPAND, "input *sizes", ["expand", aten.expand.default])
_spell(Kind.EXPAND, "input size", [torch.broadcast_to, "broadcast_to", aten.broadcast_to.default])
_spell(Kind.EXPAND, "input other", ["expand_as", aten.expand_as.default])
_spell(
    Kind.RESHAPE,
    "input *shape",
    [
        *(torch.reshape, "reshape", "view", aten.reshape.default, aten.view.default, aten._unsafe_view.default),
        *(torch.flatten, "flatten", aten.flatten.using_ints, torch.unflatten, "unflatten", aten.unflatten.int),
        *(torch.squeeze, "squeeze", aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *("view_as", "reshape_as", torch.ravel, "ravel"),
    ],
    _input_only,
)
_spell(
    Kind.TRANSPOSE,
    "input dim0 dim1",
    [torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.swapdims, "swapdims", aten.transpose.int],
)
_spell(Kind.TRANSPOSE, "input", ["t", torch.t, aten.t.default], dim0=0, dim1=1)
_spell(Kind.TRANSPOSE, "input", [_Attribute("mT"), aten.mT, aten.mT.default], dim0=-2, dim1=-1)
_spell(Kind.PERMUTE, "input *dims", [torch.permute, "permute", aten.permute.default])
_spell(Kind.REPEAT, "input *repeats", ["repeat", aten.repeat.default, torch.tile, "tile", aten.tile.default])
_spell(
    Kind.REPEAT_INTERLEAVE,
    "input repeats dim",
    [torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int],
)
_spell(Kind.DIFF, "input n dim prepend append", [torch.diff, "diff", aten.diff.default])
_spell(Kind.CUMSUM, "input dim", [torch.cumsum, "cumsum", aten.cumsum.default])
_spell(
    Kind.MATMUL,
    "input other",
    [
        *(operator.matmul, torch.matmul, torch.linalg.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__"),
        *(aten.matmul.default, aten.bmm.default, aten.mm.default),
    ],
)
_spell(Kind.BADDBMM, "input batch1 batch2 beta alpha", [torch.baddbmm, "baddbmm", aten.baddbmm.default])
_spell(Kind.EINSUM, "equation *operands", [torch.einsum, torch.functional.einsum, aten.einsum.default])
_spell(
    Kind.SOFTMAX,
    "input dim dtype",
    [torch.softmax, "softmax", aten.softmax.int, torch.special.softmax],
)
_spell(Kind.SOFTMAX, "input dim _stacklevel dtype", [F.softmax])
_spell(Kind.SOFTMAX, "input dim half_to_float", [aten._softmax.default])
_spell(Kind.SOFTMAX, "input dim dtype", [aten._safe_softmax.default])
_spell(Kind.DROPOUT, "input p training inplace", [F.dropout, torch.dropout, aten.dropout.default])
_spell(
    Kind.MASKED_FILL,
    "input mask value",
    [torch.masked_fill, "masked_fill", aten.masked_fill.Scalar, aten.masked_fill.Tensor],
)
_spell(Kind.TANH, "input", [torch.tanh, F.tanh, "tanh", aten.tanh.default])
_spell(Kind.EXP, "input", [torch.exp, "exp", aten.exp.default])
_spell(Kind.EXP2, "input", [torch.exp2, torch.special.exp2, "exp2", aten.exp2.default])
_spell(Kind.SIGMOID, "input", [torch.sigmoid, F.sigmoid, "sigmoid", aten.sigmoid.default])
_spell(Kind.LOG_SUM_EXP, "input dim keepdim", [torch.logsumexp, "logsumexp", aten.logsumexp.default])
_spell(Kind.LOG_ADD_EXP, "input other", [torch.logaddexp, "logaddexp", aten.logaddexp.default])
_spell(Kind.SQRT, "input", [torch.sqrt, "sqrt", aten.sqrt.default])
_spell(Kind.CAT, "tensors dim", [torch.cat, torch.concat, torch.concatenate, aten.cat.default])
_spell(Kind.MAX, "input dim keepdim", [torch.max, "max", torch.amax, "amax", aten.max.dim, aten.amax.default], _largest)
_spell(Kind.MAX, "input other", [torch.maximum, "maximum", aten.maximum.default, aten.max.other])
_spell(Kind.CLAMP, "input min max", [torch.clamp, "clamp", torch.clip, "clip", aten.clamp.default, aten.clamp.Tensor])
_spell(Kind.CLAMP, "input min", [torch.clamp_min, "clamp_min", aten.clamp_min.default])
_spell(Kind.SIZE, "input dim", ["size", aten.sym_size.int])
_spell(Kind.CHECK, "input", [aten._assert_tensor_metadata.default])
_spell(
    Kind.FLEX_ATTENTION,
    "query key value score_mod block_mask scale kernel_options score_mod_buffers mask_mod_buffers",
    [torch.ops.higher_order.flex_attention],
)
_spell(
    Kind.MULTI_HEAD_ATTENTION,
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias",
    [F.multi_head_attention_forward],
)
_spell(
    Kind.ENCODER_LAYER,
    "input embed_dim num_heads in_proj_weight in_proj_bias out_proj_weight out_proj_bias use_gelu norm_first eps "
    "norm1_weight norm1_bias norm2_weight norm2_bias linear1_weight linear1_bias linear2_weight linear2_bias mask "
    "mask_type",
    [private.ENCODER_LAYER, aten._transformer_encoder_layer_fwd.default],
)
_spell(
    Kind.XOR,
    "input other",
    [
        *(operator.xor, torch.logical_xor, torch.bitwise_xor, "logical_xor", "bitwise_xor", "__xor__"),
        *(aten.logical_xor.default, aten.bitwise_xor.Tensor),
    ],
)
_spell(Kind.TRIL, "input diagonal", [torch.tril, "tril", aten.tril.default])
_spell(Kind.TRIU, "input diagonal", [torch.triu, "triu", aten.triu.default])
_spell(Kind.PAD, "input pad mode value", [F.pad, private.PAD_BUILTIN, aten.pad.default])
_spell(Kind.PAD, "input pad value", [aten.constant_pad_nd.default])
_spell(Kind.GETITEM, "input indices", [aten.index], _tensors_as_index)
_spell(Kind.HIDE_DIM, "input dim level", [private.ADD_BATCH_DIM])
_spell(Kind.SHOW_DIM, "input level size dim", [private.REMOVE_BATCH_DIM])
_spell(Kind.COS, "input", [torch.cos, "cos", aten.cos.default])
_spell(Kind.SIN, "input", [torch.sin, "sin", aten.sin.default])
_spell(Kind.STACK, "tensors dim", [torch.stack, aten.stack.default])
_spell(
    Kind.SPLIT,
    "input sizes dim",
    [
        *(torch.split, torch.functional.split, "split", torch.chunk, "chunk", torch.tensor_split, "tensor_split"),
        *(torch.split_with_sizes, "split_with_sizes", aten.split.Tensor, aten.split.sizes),
        *(aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices),
    ],
)
_spell(Kind.UNBIND, "input dim", [torch.unbind, "unbind", aten.unbind.int])
_spell(Kind.OUTER, "input vec2", [torch.outer, "outer", aten.outer.default, torch.ger, "ger"])
_spell(Kind.GATHER, "input dim index", [torch.gather, "gather", aten.gather.default])
_spell(Kind.EMBEDDING, "weight indices", [torch.embedding, aten.embedding.default])
_spell(Kind.GETITEM, "input dim index", [torch.index_select, "index_select", aten.index_select.default], _as_index)
_spell(Kind.POLAR, "abs angle", [torch.polar, aten.polar.default])
_spell(Kind.COMPLEX, "real imag", [torch.complex, aten.complex.default])
_spell(Kind.VIEW_AS_COMPLEX, "input", [torch.view_as_complex, aten.view_as_complex.default])
_spell(Kind.VIEW_AS_REAL, "input", [torch.view_as_real, aten.view_as_real.default])

_IN_PLACE: dict[object, Kind] = {}
"""In-place spellings, by the kind that computes the same into new memory; see `read_in_place`."""

for _name, _kind in {"add": Kind.ADD, "mul": Kind.MUL, "div": Kind.DIV, "masked_fill": Kind.MASKED_FILL}.items():
    _IN_PLACE[f"{_name}_"] = _kind
    _IN_PLACE.update((getattr(getattr(aten, f"{_name}_"), overload), _kind) for overload in ("Tensor", "Scalar"))
_IN_PLACE.update(dict.fromkeys(("tanh_", torch.tanh_, aten.tanh_.default), Kind.TANH))
_IN_PLACE.update({operator.iadd: Kind.ADD, operator.imul: Kind.MUL, operator.itruediv: Kind.DIV})


def read(node: fx.Node) -> Call | None:
    """What a node computes, with its arguments by name, or None for a target that the table does not hold.

    A call with more positional arguments than the table names is None too: it is not the known spelling.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is getattr:
        entry = _TABLE.get(_Attribute(str(node.args[1])))
        return None if entry is None else _named(node.args[:1], {}, entry)
    entry = _TABLE.get(node.target)
    return None if entry is None else _named(node.args, node.kwargs, entry)


def read_in_place(node: fx.Node) -> Call | None:
    """What a node that overwrites its input computes, as the kind that computes it into new memory; else None."""
    kind = _IN_PLACE.get(node.target) if node.op in ("call_function", "call_method") else None
    if kind is None:
        return None
    parameters = ("input", "mask", "value") if kind is Kind.MASKED_FILL else ("input", "other")
    return _named(node.args, node.kwargs, _Entry(kind, parameters))


def _named(given: Sequence[Any], by_name: Mapping[str, Any], entry: _Entry) -> Call | None:
    args: dict[str, Any] = dict(entry.constants)
    rest = list(given)
    for name in entry.parameters:
        if name.startswith("*"):
            args[name[1:]] = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)
            rest = []
        elif rest:
            args[name] = rest.pop(0)
    if rest:
        return None
    args.update(by_name)
    return Call(entry.kind, args if entry.adapt is None else entry.adapt(args))


@dataclass(frozen=True)
class Write:
    """A node that overwrites a tensor at some places of its dimensions, and everywhere along the others.

    Attributes:
        target: the tensor.
        entries: for each dimension a slice, or a node that holds positions.
        value: what is written there.
    """

    target: fx.Node
    entries: tuple[Any, ...]
    value: Any


def read_write(node: fx.Node) -> Write | None:
    """Where a node writes to; None for one that is not known to leave some of its tensor alone."""
    return read_update(node) if node.target is operator.setitem or _called(node).endswith("_") else None


def read_update(node: fx.Node) -> Write | None:
    """As `read_write`, and the same of nodes that make a copy of a tensor with some elements replaced."""
    name = _called(node).removesuffix("_")
    target = node.args[0] if node.args else None
    if node.kwargs or not isinstance(target, fx.Node):
        return None
    example = target.meta.get("example_value", target.meta.get("val"))
    if not isinstance(example, torch.Tensor):
        return None
    full: list[Any] = [slice(None)] * example.dim()
    if name in ("index_copy", "scatter") and len(node.args) == 4 and isinstance(node.args[1], int):
        full[node.args[1] % example.dim()] = node.args[2]
        return Write(target, tuple(full), node.args[3])
    if node.target is operator.setitem or (name == "index_put" and len(node.args) == 3):
        index = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
        if node.target is not operator.setitem:
            index = [slice(None) if entry is None else entry for entry in index]  # its way to leave a dimension alone
        if any(entry is None or isinstance(entry, bool) for entry in index):
            return None
        gap = [place for place, entry in enumerate(index) if entry is Ellipsis]
        before = list(index[: gap[0]] if gap else index)
        after = list(index[gap[0] + 1 :] if gap else ())
        middle = [slice(None)] * (example.dim() - len(before) - len(after))
        return Write(target, (*before, *middle, *after), node.args[2])
    return None


def read_copy(node: fx.Node) -> fx.Node | None:
    """The tensor that a node writes over all of its first argument, by ``copy_``; None for any other node."""
    if _called(node) != "copy_" or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return None
    return node.args[1]


def _called(node: fx.Node) -> str:
    """The name of what a node calls, without the namespace and the overload."""
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    name: str = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
    return name


def scatters(node: fx.Node) -> bool:
    """Whether a node is a copy of a tensor with some elements replaced, as a cache is updated without writing to it."""
    return node.op in ("call_function", "call_method") and _called(node) in _SCATTERS


_SCATTERS = {"index_copy", "index_put", "index_fill", "scatter", "slice_scatter", "select_scatter", "where"}


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node overwrites in place.

    Overloads declare what they write to. Elsewhere names tell: see `_written_argument`.
    """
    if isinstance(node.target, private.OpOverload):
        written = private.written_values(node.target, node.args, node.kwargs)
        flat = [item for value in written for item in (value if isinstance(value, (list, tuple)) else [value])]
        return [item for item in flat if isinstance(item, fx.Node)]
    found = _written_argument(node)
    return [] if found is None else [found]


def _written_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that a function or method overwrites in place, or None for one that writes to none.

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
