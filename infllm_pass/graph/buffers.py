"""Module buffers read by value: closed forms that match every element, with a guard to detect later writes.

A causal limit kept in a buffer is compared with its closed form over the buffer's whole extent. Nothing stops a
program from writing to such a buffer later, so whoever relies on a reading has to watch the tensor: `HeldTensors`
remembers what was read, `Reading.still_holds` says whether a tensor is unchanged since.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from infllm_pass.compat.tensors import version_of, without_modes
from infllm_pass.graph.input_readings import InputReadings

_ROWS_AT_ONCE = 1024
_MOST_RUNS = 4


@dataclass(frozen=True)
class ClosedForm:
    """Every element of a tensor by its index.

    The element depends on ``position``, the last index (`rank` 1) or the last minus the one before it (`rank` 2);
    for `rank` 0 all elements are equal. It is ``start + step * position`` or constant on runs of positions.

    Attributes:
        rank: indices that matter.
        dims: the dimensions of those indices, outermost first.
        values: the value on each run.
        ends: last position of each run but the last.
        step: None for runs; otherwise `values` holds the element at position 0 alone.
    """

    rank: int
    dims: tuple[int, ...]
    values: tuple[float, ...]
    ends: tuple[int, ...] = ()
    step: int | None = None


@dataclass
class Reading:
    """A tensor that was read by value, and its state then."""

    form: ClosedForm
    tensor: weakref.ref[Tensor]
    version: int

    def still_holds(self, tensor: object) -> bool:
        """Whether this is the tensor that was read, and nothing has been written to it since."""
        return tensor is self.tensor() and isinstance(tensor, Tensor) and version_of(tensor) == self.version

    def holds_again(self, tensor: object) -> bool:
        """Whether another or a changed tensor has the same closed form; if so, it is the one watched from now on."""
        if not isinstance(tensor, Tensor) or not _may_be_read(tensor) or closed_form(tensor) != self.form:
            return False
        self.tensor, self.version = weakref.ref(tensor), version_of(tensor)
        return True


@dataclass
class HeldTensors:
    """The tensors that modules hold, by the nodes that stand for them, and those that a call hands over.

    Attributes:
        tensors: real tensors by placeholder or ``get_attr`` node.
        readings: what was read of them.
        looked_at: further tensors, which only choices that are right for any values may depend on.
        inputs: what is read of the tensors that a call hands over.
    """

    tensors: Mapping[fx.Node, Tensor]
    readings: dict[fx.Node, Reading] = field(default_factory=dict)
    looked_at: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    inputs: InputReadings = field(default_factory=InputReadings)

    def read(self, node: fx.Node) -> ClosedForm | None:
        """The closed form of a held tensor; None if it has none, or if writing to it would go unseen."""
        tensor = self.tensors.get(node)
        if tensor is None or not _may_be_read(tensor):
            return None
        if node not in self.readings:
            form = closed_form(tensor)
            if form is None:
                return None
            self.readings[node] = Reading(form, weakref.ref(tensor), version_of(tensor))
        return self.readings[node].form


def _may_be_read(tensor: object) -> bool:
    """Whether a tensor is plain data whose writes are counted; single integers are counters, which change."""
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.is_inference():  # no parameter, no subclass
        return False
    return tensor.numel() > 1 or tensor.is_floating_point()


def closed_form(tensor: Tensor) -> ClosedForm | None:
    """The closed form of a tensor, checked against each of its elements; None if it has none."""
    if tensor.numel() == 0 or tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    dims = tuple(dim for dim, extent in enumerate(tensor.shape) if extent > 1)
    with without_modes(), torch.no_grad():
        values = tensor.detach()
        while len(dims) > 1 and _is_repeated(values, dims[0]):
            values, dims = values.narrow(dims[0], 0, 1), dims[1:]
        if len(dims) > 2:
            return None
        flat = values.reshape([values.shape[dim] for dim in dims])
        if len(dims) == 2:
            return _diagonals(flat, dims)
        return _line(flat.reshape(-1), dims, 0)


def _is_repeated(values: Tensor, dim: int) -> bool:
    """Whether all slices along a dimension are equal."""
    first = values.narrow(dim, 0, 1)
    return all(bool((values.narrow(dim, i, 1) == first).all()) for i in range(1, values.shape[dim]))


def _diagonals(matrix: Tensor, dims: tuple[int, ...]) -> ClosedForm | None:
    """The form of a matrix whose element depends on column minus row alone."""
    rows = matrix.shape[0]
    for start in range(1, rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, rows)
        if not bool((matrix[start:stop, 1:] == matrix[start - 1 : stop - 1, :-1]).all()):
            return None
    line = torch.cat([matrix[:, 0].flip(0), matrix[0, 1:]])
    return _line(line, dims, 1 - rows)


def _line(line: Tensor, dims: tuple[int, ...], first: int) -> ClosedForm | None:
    """The form of values at the positions ``first, first + 1, …``."""
    changes = (line[1:] != line[:-1]).nonzero().flatten()
    if line.isnan().any():
        return None
    if len(changes) < _MOST_RUNS:
        starts = [0, *(int(place) + 1 for place in changes)]
        values = tuple(line[place].item() for place in starts)
        return ClosedForm(len(dims) if changes.numel() else 0, dims, values, tuple(first + s - 1 for s in starts[1:]))
    if line.dtype not in (torch.int64, torch.int32):
        return None
    step = int(line[1] - line[0])
    if not bool((line[1:] - line[:-1] == step).all()):
        return None
    return ClosedForm(len(dims), dims, (int(line[0]) - step * first,), (), step)
