"""DistributedDataParallel: whole graphs for the pass, split at the gradient buckets behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import distributed
from torch._dynamo import config

__all__ = ["split_at_buckets", "whole_graphs"]

_WHOLE: ContextVar[bool] = ContextVar("infllm_pass_whole_graphs", default=False)


@contextmanager
def whole_graphs() -> Iterator[None]:
    """Graphs that Dynamo makes inside reach a backend whole, where its DDPOptimizer would hand over parts.

    ``torch._dynamo.config.optimize_ddp``, which each thread has for itself from torch 2.13 on; in 2.11 all threads
    share it, but so they do DistributedDataParallel's own note of the module that runs. Left alone where no process
    group is there.
    """
    from torch._dynamo.utils import get_optimize_ddp_mode

    in_group = distributed.is_available() and distributed.is_initialized()
    if not in_group or get_optimize_ddp_mode() != "ddp_optimizer":
        yield
        return
    token = _WHOLE.set(True)
    try:
        with config.patch(optimize_ddp="no_optimization"):
            yield
    finally:
        _WHOLE.reset(token)


def split_at_buckets(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """A backend that splits a graph as DDPOptimizer would have done, if `whole_graphs` has kept it from that.

    ``DDPOptimizer.compile_fn`` and ``DistributedDataParallel._get_active_ddp_module``, the same in torch 2.11 to 2.15:
    gradients of a bucket are sent while those before it are computed, which takes a graph for each bucket.
    """
    if not _WHOLE.get():
        return compiler
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if module is None:
        return compiler
    split: Callable[..., Any] = DDPOptimizer(module.bucket_bytes_cap, compiler).compile_fn
    return split
