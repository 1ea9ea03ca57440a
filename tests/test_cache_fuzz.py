"""A bounded run of `cache_fuzz`."""

from __future__ import annotations

import infllm_pass

from .cache_fuzz import fuzz


def test_sequences_of_operations_give_what_recomputation_gives():
    sites = infllm_pass.report(fuzz(60).model).sites
    assert {site.cache_state for site in sites} == {"carried", "recomputed"}
