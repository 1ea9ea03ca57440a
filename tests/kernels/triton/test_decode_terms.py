"""Score terms in the decode kernels: every step of a growing cache against the formula in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_pass.kernels import reference
from infllm_pass.kernels.triton.decode.attention import decode_attend
from infllm_pass.kernels.triton.decode.rows import DecodeRows, DecodeState, IndexState
from infllm_pass.kernels.triton.decode.select import decode_select
from infllm_pass.kernels.triton.decode.step import DecodeStep
from infllm_pass.kernels.triton.decode.token_scores import decode_select_tokens
from infllm_pass.lowering.ops.decode import new_state
from tests.kernels.triton.test_decode import TOKENS, _poisoned  # noqa: F401
from tests.kernels.triton.test_score_terms import exact_attention
from tests.support.decode_support import SMALL, Cache
from tests.support.score_terms import CAP, WINDOW, blocks_before_the_window
from tests.support.triton_device import DEVICE, arrange


def select_and_attend(q, k, v, *rest, key_bias=None, sinks=None, softcap=0.0):
    """The two stages of the operator."""
    *state, lengths, starts, key_mask, window, scale, dense_len, geometry = rest
    rows = DecodeRows(lengths, starts)
    common = {"geometry": geometry, "scale": scale, "dense_len": dense_len, "window": window}
    step = DecodeStep(q, k, rows, **common, key_mask=key_mask, softcap=softcap, key_bias=key_bias)
    tokens = geometry.scorer == "tokens"
    blocks = decode_select_tokens(step, IndexState.of(state)) if tokens else decode_select(step, DecodeState.of(state))
    terms = {"key_bias": key_bias, "sinks": sinks, "softcap": softcap}
    return decode_attend(q, k, v, blocks, rows, key_mask, **common, **terms)


@dataclass
class BiasedCache(Cache):
    """A cache whose attention has terms.

    Attributes:
        softcap: 0 for no cap.
        bias: rows and key/value heads of the key bias, each as many or 1; None: there is no bias.
        sinks: whether there are sinks.
    """

    softcap: float = 0.0
    bias: tuple[int, int] | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.terms: dict[str, Any] = {"softcap": self.softcap}
        if self.bias is not None:
            self.terms["key_bias"] = 2 * torch.randn(self.capacity, *self.bias, device=self.device).permute(1, 2, 0)
        if self.sinks:
            self.terms["sinks"] = torch.randn(self.heads * self.group, device=self.device) + 1
        self.operator = partial(self.operator, **self.terms)

    def bias_of(self, row: int) -> Tensor | None:
        """The bias of a row's valid keys, ``[1, Hkv or 1, L]``, in float64."""
        bias = self.terms.get("key_bias")
        if bias is None:
            return None
        return bias[row % bias.shape[0]][None, :, self.start(row) : self.lengths[row]].double()

    def selected(self, q: Tensor, row: int) -> Tensor:
        (row_q, row_k, _), common = self._row(q, row)
        common["softcap"] = self.softcap
        if self.geometry.agnostic_blocks:
            common["key_bias"] = self.bias_of(row)
        if self.geometry.scorer == "pooled" or row_k.shape[2] < max(1, self.dense_len):
            return reference.select_blocks(row_q, row_k, **common)
        del common["dense_len"]
        return reference.select_sequence(row_q[0], row_k[0], **common, key_mask=self._mask(row))[None]

    def expected(self, q: Tensor, row: int, selected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (row_q, row_k, row_v), common = self._row(q, row)
        count = row_k.shape[2]
        unit = torch.eye(count, device=self.device).expand(1, self.heads, -1, -1)
        selected = self.selected(q, row) if selected is None else selected
        allowed = reference.attention(torch.zeros_like(row_q), row_k, unit, selected, **common)[0] > 0
        key_bias, sinks = self.bias_of(row), self.terms.get("sinks")
        sinks = None if sinks is None else sinks.double()
        tensors = (tensor.double() for tensor in (row_q, row_k, row_v))
        return exact_attention(*tensors, allowed & self._mask(row), self.scale, key_bias, sinks, self.softcap)


def cache(lengths, **sizes):
    return BiasedCache(select_and_attend, lengths, device=DEVICE, **sizes)


ALL = {"softcap": 1.5, "sinks": True}

CASES = {
    "cap, group 1": {"softcap": 1.0, "group": 1},
    "cap, exact": {"softcap": 1.0, "group": 4, "geometry": replace(SMALL, lse="exact")},
    "bias for all heads": {"bias": (1, 1), "heads": 2},
    "bias by head, window, holes": {"bias": (1, 2), "heads": 2, "group": 3, "window": 66, "holes": 0.3},
    "sinks": {"sinks": True, "group": 3, "heads": 2},
    "all, dense": {**ALL, "bias": (1, 1), "dense_len": 2**31 - 1},
    "all, tokens": {**ALL, "bias": (1, 1), "group": 4, "holes": 0.3, "geometry": TOKENS},
    "all, tokens shared by 16": {**ALL, "bias": (1, 1), "geometry": replace(TOKENS, query_block=16)},
    "all, shared by 16": {**ALL, "bias": (1, 1), "geometry": replace(SMALL, query_block=16)},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_steps_match_the_formula(sizes):
    cache([125], **{"heads": 1, **sizes}).grow(5, 1)


@pytest.mark.parametrize("geometry", [SMALL, TOKENS], ids=["pooled", "tokens"])
def test_rows_on_different_sides_of_dense_len(geometry):
    sizes = {"starts": [0, 17, 3], "dense_len": 66, "heads": 1, "holes": 0.4, "geometry": geometry}
    cache([62, 80, 130], bias=(3, 1), **ALL, **sizes).grow(3, 1)


def test_what_no_query_sees_has_no_capped_score():
    q, k, expected = blocks_before_the_window()
    geometry, length = replace(TOKENS, selected_blocks=3), k.shape[2]
    rows = DecodeRows(torch.tensor([length], dtype=torch.int32, device=DEVICE), None)
    q, k = q.to(DEVICE), k.to(DEVICE)
    fields = {"geometry": geometry, "scale": 1.0, "window": WINDOW, "softcap": CAP}
    blocks = decode_select_tokens(DecodeStep(q, k, rows, dense_len=0, **fields), IndexState.of(new_state(k, geometry)))
    assert set(blocks.flatten().tolist()) == expected
    wanted = reference.select_blocks(q, k, offset=length - 1, **fields)
    assert set(wanted[0, 0, 0].nonzero()[:, 0].tolist()) == expected


def test_queries_before_the_first_key_have_the_sink_alone():
    steps = cache([0, 40], starts=[0, 40], heads=1, **ALL)
    q = steps.append(7)
    steps.lengths = [0, 47]
    out, lse = steps.attend(q)
    assert not out[0].any()
    assert torch.equal(lse[0], steps.terms["sinks"][:, None].expand_as(lse[0]))
    expected, expected_lse = steps.expected(q, 1)
    torch.testing.assert_close(out[1:].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[1:].double(), expected_lse, atol=1e-5, rtol=1e-5)


arrange(globals())
