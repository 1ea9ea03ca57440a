"""The decode step in Triton kernels: what `infllm::decode_attention` computes on CUDA devices. Nothing syncs the host.

Launches whose grids follow from shapes alone: compressed keys or index keys with their normaliser, block scores and
their ranking (a launch of its own in steps of several tokens), attention, merge. Which rows are sparse is decided on
the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infllm_pass.compat.inductor import compiles_ahead_of_time, records_cuda_graphs
from infllm_pass.kernels.triton.decode.attention import decode_attend
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState, IndexState
from infllm_pass.kernels.triton.decode.select import decode_compress_kernel, decode_select
from infllm_pass.kernels.triton.decode.step import DecodeStep
from infllm_pass.kernels.triton.decode.token_scores import decode_select_tokens
from infllm_pass.kernels.triton.launch import launching_at_once
from infllm_pass.kernels.triton.pdl import recording_drops_pdl

from .attention_args import SCORE_TERMS, DecodeCall


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], call: DecodeCall
) -> tuple[Tensor, Tensor]:
    """The kernels of a step, in the form that compilers record; the state is written."""
    rows = DecodeRows(call.lengths, call.starts)
    numbers = {name: getattr(call, name) for name in ("geometry", "scale", "dense_len", "window")}
    step = DecodeStep(q, k, rows, **numbers, key_mask=call.key_mask, softcap=call.softcap, key_bias=call.key_bias)
    if call.geometry.scorer == "tokens":
        blocks = decode_select_tokens(step, IndexState.of(state))
    else:
        blocks = decode_select(step, DecodeState.of(state))
    terms = {name: getattr(call, name) for name in SCORE_TERMS}
    return decode_attend(q, k, v, blocks, rows, call.key_mask, **numbers, **terms)


def launched(q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], call: DecodeCall) -> tuple[Tensor, Tensor]:
    """The kernels of a step, launched at once, with all of their options."""
    with launching_at_once():
        return decode_attention(q, k, v, state, call)


def is_recorded_in_graphs(q: Tensor) -> bool:
    """Whether Inductor lets CUDA graphs record a step, and the device overlaps launches, an option Inductor drops."""
    in_graphs = records_cuda_graphs() and not compiles_ahead_of_time()
    return in_graphs and recording_drops_pdl(decode_compress_kernel, q)
