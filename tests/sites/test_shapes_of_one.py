"""Sizes of one: batch, heads, group, queries and keys, told apart in every layout."""

from __future__ import annotations

import pytest
import torch

import infllm_pass
from tests.support.common import TOKENS, llama, tokens
from tests.support.shape_fuzz import CONFIG, Shape, examine, fuzz


def test_random_attentions_of_sizes_one_are_rewritten_and_equal_the_oracle():
    assert list(fuzz(12)) == []


@pytest.mark.parametrize("spelling", ["grouped", "group_as_queries", "one_token", "reshaped", "bmm"])
def test_one_token_of_a_group_over_a_growing_cache_is_a_step(spelling):
    shape = Shape(spelling, "dynamic", True, False, batch=1, kv_heads=1, group=4, queries=1, past=50, dim=8)
    assert examine(shape, CONFIG, dynamic=None) == ""


def test_generation_with_one_key_head_is_sparse_in_every_step():
    torch._dynamo.reset()
    model = llama(num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=1)
    ids = tokens(80)
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), TOKENS)
    settings = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    static, grown = (sparse.generate(ids, cache_implementation=kind, **settings) for kind in ("static", None))
    sites = infllm_pass.report(sparse).sites
    assert {site.reason for site in sites} == {"SWITCHABLE"}
    assert "carried" in {site.cache_state for site in sites if site.query_shape[2] == 1}
    assert torch.equal(static, grown)
