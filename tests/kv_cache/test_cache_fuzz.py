"""A bounded run of `cache_fuzz`."""

from __future__ import annotations

import pytest

import infllm_pass
from tests.support.cache_fuzz import fuzz


@pytest.mark.parametrize(("growing", "sequences"), [(False, 60), (True, 30)], ids=["static", "growing"])
@pytest.mark.parametrize(
    "settings",
    [{"scorer": "pooled"}, {"scorer": "tokens"}, {"scorer": "tokens", "score_dtype": "int8", "query_block": 4}],
    ids=["pooled", "tokens", "int8, shared by 4"],
)
def test_sequences_of_operations_give_what_recomputation_gives(growing, sequences, settings):
    sites = infllm_pass.report(fuzz(sequences, growing=growing, **settings).model).sites
    assert {site.cache_state for site in sites} >= {"carried", "recomputed"}
