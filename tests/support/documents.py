"""Documents without files, whose tokens say where they stand."""

from __future__ import annotations

import torch


def counted_documents(*lengths, vocabulary=256, end=None):
    """Documents of these lengths; token `i` of all is `i` modulo the vocabulary, and the last of each may be `end`."""
    from infllm_pass.adaptation.documents import Documents

    ids = torch.arange(sum(lengths), dtype=torch.int32) % vocabulary
    stops = torch.tensor(lengths).cumsum(0)
    if end is not None:
        ids[stops - 1] = end
    return Documents(ids, stops - torch.tensor(lengths), tuple(f"document {n}" for n in range(len(lengths))))
