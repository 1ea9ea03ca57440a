"""The state store: finds the state of each cache at every call and resets it when the cache was modified.

The state of a cache belongs to the sparsified model, or with ``backend="infllm"`` to all models compiled so, and lives
as long as the tensor. It is void, which costs compressing the cache anew and nothing else, when anybody but their
decoding wrote to the tensor: its version counter tells. A cache that grows by concatenation is another tensor after
every call, and its state goes with it: a second call from the same earlier tensor finds none.

CUDA graphs that Inductor records lie inside the compiled graph that is called here, so the counter is read at every
replay. In a CUDA graph that others record around the model it is not, and every replay starts over.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from infllm_pass.compat.tensors import base_of, version_of
from infllm_pass.errors import UncountedCacheWarning
from infllm_pass.kv_cache.dynamic import DynamicCacheSpec, with_room
from infllm_pass.kv_cache.inputs import CacheSpec
from infllm_pass.kv_cache.spec import StateTensor
from infllm_pass.kv_cache.static import StaticCacheSpec, new_tensors


@dataclass
class CacheState:
    """What is kept of one cache.

    Attributes:
        tensors: ``[B, Hkv, n, ...]`` each, as the spec's layout says: compressed keys, or index keys.
        filled: int32 ``[B]``: keys of each row, from its first, that they stand for.
        first: int32 ``[B]``: slot of each row's first key.
        version: the cache's version counter after the last call; None: the state is to be made anew.
        streams: the CUDA streams that the memory is known to be used in.
    """

    tensors: list[Tensor]
    filled: Tensor
    first: Tensor
    version: int | None = None
    streams: set[int] = field(default_factory=set)

    @classmethod
    def new(cls, tensors: list[Tensor], rows: int, device: torch.device) -> CacheState:
        """A state that stands for no key yet."""
        filled, first = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        return cls(tensors, filled, first)

    def use(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory, once the state is freed, from being given away before a CUDA stream is done with it.

        PyTorch's allocator only knows of the stream that was current when the memory was taken. A stream is told to it
        once; the work of one stream comes before that of another if the caller orders it, as for the cache itself.
        """
        if stream.cuda_stream not in self.streams:
            for tensor in (*self.tensors, self.filled, self.first):
                tensor.record_stream(stream)
            self.streams.add(stream.cuda_stream)

    def inputs(self) -> tuple[Tensor, ...]:
        """What the graph of a static cache gets."""
        return *self.tensors, self.filled, self.first

    def prefix(self, described: tuple[StateTensor, ...]) -> tuple[Tensor, ...]:
        """What the graph of a dynamic cache gets: views of memory ``[n, B, Hkv, ...]`` that has room for more."""
        slots = [tensor.shape[2] for tensor in described]
        roomy = [with_room(memory, count) for memory, count in zip(self.tensors, slots, strict=True)]
        if any(new is not old for new, old in zip(roomy, self.tensors, strict=True)):
            self.streams.clear()  # of other memory
        self.tensors = roomy
        views = [memory[:count].movedim(0, 2) for memory, count in zip(roomy, slots, strict=True)]
        return *views, self.filled, self.first


class CacheStore:
    """The states of all caches that a model decoded from, as long as these live. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._states: MutableMapping[Tensor, dict[Any, CacheState]] = WeakTensorKeyDictionary()
        self._growing: MutableMapping[Tensor, dict[Any, CacheState]] = WeakTensorKeyDictionary()
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheStore:
        """A copy of the model decodes with states of its own."""
        return CacheStore()

    def __len__(self) -> int:
        with self._lock:
            return sum(len(states) for kind in (self._states, self._growing) for states in kind.values())

    def state(self, cache: Tensor, spec: StaticCacheSpec) -> CacheState:
        """The state of a cache, brought to life if there is none, and emptied if it is void.

        Args:
            cache: the tensor that a graph is about to be called with.
            spec: what the graph keeps of it.
        """
        rows = spec.rows(cache)
        place = (*_place(cache), rows, spec.keys, spec.view, spec.padded)
        with self._lock:
            states = self._states.setdefault(_owner(cache), {})
            state: CacheState | None = states.get((place, spec.layout))
            if state is None:
                tensors = new_tensors(spec.tensors(rows, cache.dtype), cache.device)
                state = states[place, spec.layout] = CacheState.new(tensors, rows, cache.device)
                return state
        if state.version is None or state.version != self.version(cache):
            state.filled.zero_()
        return state

    def take(self, inputs: Sequence[Any], spec: DynamicCacheSpec) -> CacheState:
        """The state of a growing cache, which is the caller's from then on; a new one if there is none.

        Args:
            inputs: what a graph is about to be called with.
            spec: what the graph keeps of the cache.
        """
        past = inputs[spec.position]
        with self._lock:
            state = self._growing.get(_owner(past), {}).pop(_growing_key(past, spec, inputs), None)
        if state is None:
            return CacheState.new(spec.new_memory(inputs), spec.rows(inputs), past.device)
        if state.version != self.version(past):
            state.filled.zero_()
        return state

    def give(self, inputs: Sequence[Any], grown: Tensor, spec: DynamicCacheSpec, state: CacheState) -> None:
        """Keep the state of a cache that has grown for the call that continues it.

        Args:
            inputs: what the graph was called with.
            grown: the cache, which the graph returned.
            spec: what the graph keeps of it.
            state: its state.
        """
        state.version = self.version(grown)
        if state.version is not None:
            with self._lock:
                self._growing.setdefault(_owner(grown), {})[_growing_key(grown, spec, inputs)] = state

    def version(self, cache: Tensor) -> int | None:
        """How often a tensor was written to; None for one that does not count it."""
        if cache.is_inference():
            self._warn(
                "a cache was made under torch.inference_mode() and does not count what is written to it: its keys are "
                "compressed anew at every step; make the cache, or run the model, under torch.no_grad()"
            )
            return None
        if is_being_captured(cache):
            self._warn(
                "a CUDA graph is captured around a model that decodes from a cache, and replaying it does not count "
                "what is written: the cache's keys are compressed anew at every replay; let "
                'torch.compile(mode="reduce-overhead") record the CUDA graph instead'
            )
            return None
        return version_of(cache)

    def _warn(self, message: str) -> None:
        """Warn once."""
        with self._lock:
            known = message in self._warned
            self._warned.add(message)
        if not known:
            warnings.warn(message, UncountedCacheWarning, stacklevel=5)


def is_being_captured(tensor: Tensor) -> bool:
    """Whether calls on a tensor's device are recorded in a CUDA graph rather than run."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _owner(cache: Tensor) -> Tensor:
    """The tensor that a state is tied to: views that are made for a call share one."""
    return base_of(cache)


def _place(cache: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in the memory of its owner, and what is there."""
    return cache.storage_offset(), cache.stride(), cache.dtype, cache.device


def _growing_key(cache: Tensor, spec: DynamicCacheSpec, inputs: Sequence[Any]) -> Any:
    """What tells the states of one owner apart; the same for a cache of which the last keys were cut off."""
    return *_place(cache), spec.rows(inputs), spec.keys, spec.dtype, spec.order, spec.padded, spec.layout


class _Streams:
    """The current CUDA stream of each device during one call of a graph, asked for once."""

    def __init__(self) -> None:
        self._current: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, state: CacheState) -> CacheState:
        """The state, known to be used in its device's current stream."""
        if state.filled.is_cuda:
            device = state.filled.device
            if device not in self._current:
                self._current[device] = torch.cuda.current_stream(device)
            state.use(self._current[device])
        return state


class CachedGraph:
    """Calls a compiled graph with the states of its caches as its last inputs.

    Args:
        compiled: the compiled graph.
        specs: the caches that it keeps state of, in the order of its inputs.
        store: the states.
    """

    def __init__(self, compiled: Callable[..., Any], specs: tuple[CacheSpec, ...], store: CacheStore) -> None:
        self.compiled = compiled
        self.specs = specs
        self.store = store

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph; the outputs are its own."""
        given: list[Tensor] = []
        static: list[tuple[StaticCacheSpec, CacheState]] = []
        growing: list[tuple[DynamicCacheSpec, CacheState]] = []
        use = _Streams()
        with torch.inference_mode(False):  # states outlive the mode that they were made in
            for spec in self.specs:
                if isinstance(spec, DynamicCacheSpec):
                    growing.append((spec, use(self.store.take(inputs, spec))))
                    given += growing[-1][1].prefix(spec.tensors(inputs))
                else:
                    static.append((spec, use(self.store.state(inputs[spec.position], spec))))
                    given += static[-1][1].inputs()
        for _, state in static:
            state.version = None  # in case the call fails half-way
        outputs = self.compiled(*inputs, *given)
        for fixed, state in static:
            state.version = self.store.version(inputs[fixed.position])
        for grown, kept in growing:
            self.store.give(inputs, outputs[grown.output], grown, kept)
        return outputs
