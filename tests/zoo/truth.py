"""What is true of the models whose attention stays dense: the ground on which the pass's reasons are judged."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Cause(Enum):
    """Why attention is not made sparse, and the reasons that say so truly."""

    BIAS = "a bias that depends on position is added to its scores", ("ADDITIVE_BIAS",)
    MIXED_SCORES = "the scores of its heads are mixed before they are masked", ("ADDITIVE_BIAS", "PARTIAL_MATCH")
    CACHED = "its keys are a buffer with room for more than the tokens seen", ("PARTIAL_KEYS",)
    CAP = "its scores are capped by a tanh", ("SOFT_CAP",)
    CHUNKS = "it attends within chunks of fixed length", ("UNPROVEN_MASK",)
    DYNAMIC_MASK = "it masks keys by weights computed from the values", ("ADDITIVE_BIAS",)
    HEADS_OF_512 = "its heads of global attention have 512 features", ("HEAD_DIM",)
    INDEXER = "it attends to keys that an indexer of its own picks for each query", ("UNPROVEN_MASK",)
    PATCHES = "its patches attend to their own bytes", ("UNPROVEN_MASK",)
    SINK = "its softmax has a sink, a column without a key", ("SINK",)
    WRITTEN_MASK = "its window mask is put together by writing to it", ("ADDITIVE_BIAS",)

    def __init__(self, text: str, reasons: tuple[str, ...]) -> None:
        self.text = text
        self.reasons = reasons


CAUSES: dict[str, Cause] = {
    "axk2": Cause.INDEXER,
    "bloom": Cause.BIAS,
    "blt": Cause.PATCHES,
    "deepseek_v32": Cause.INDEXER,
    "doge": Cause.DYNAMIC_MASK,
    "dots3_note": Cause.INDEXER,
    "dots3_note_text": Cause.INDEXER,
    "gemma4": Cause.HEADS_OF_512,
    "gemma4_text": Cause.HEADS_OF_512,
    "gemma4_unified": Cause.HEADS_OF_512,
    "gemma4_unified_text": Cause.HEADS_OF_512,
    "glm_moe_dsa": Cause.INDEXER,
    "gpt-fast style": Cause.CACHED,
    "inkling_text": Cause.BIAS,
    "litgpt Gemma-2-2b": Cause.CAP,
    "litgpt Mistral-7B-v0.1": Cause.WRITTEN_MASK,
    "llama4": Cause.CHUNKS,
    "llama4_text": Cause.CHUNKS,
    "torchtune gemma2": Cause.CAP,
    "x-transformers alibi": Cause.BIAS,
    "x-transformers relative position bias": Cause.BIAS,
    "x-transformers soft-clamped scores": Cause.CAP,
    "x-transformers talking heads": Cause.MIXED_SCORES,
}
"""For every architecture with attention that stays dense, what keeps it so."""


def cause_of(architecture: str) -> Cause | None:
    """What keeps attention of an architecture dense; None where nothing should."""
    return CAUSES.get(architecture)


def unexplained(decided: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sites that stay dense, or that the matcher missed, without a true cause.

    Args:
        decided: decisions by family and architecture, as recorded.
    """
    found = []
    for entries in decided.values():
        for architecture, implementations in entries.items():
            cause = cause_of(architecture)
            allowed = {"SWITCHABLE", *(cause.reasons if cause is not None else ())}
            for implementation, kinds in implementations.items() if "unbuilt" not in implementations else ():
                for kind, decision in kinds.items():
                    wrong = sorted(set(decision["reasons"]) - allowed)
                    if decision["calls"] > decision["sites"]:
                        wrong.append(f"{decision['calls'] - decision['sites']} not found")
                    if wrong:
                        found.append(f"{architecture}/{implementation} {kind}: {', '.join(wrong)}")
    return found
