"""What is true of the models whose attention stays dense: the ground on which the pass's reasons are judged."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Cause(Enum):
    """Why attention is not made sparse, and the reasons that say so truly."""

    BIAS = "a bias that depends on position is added to its scores", ("ADDITIVE_BIAS", "PARTIAL_MATCH")
    BROKEN_GRAPH = (
        "Dynamo splits its graph: the mask, or the weights it returns, cross the split",
        ("ADDITIVE_BIAS", "UNPROVEN_MASK", "RETURNED_WEIGHTS"),
    )
    CHUNKS = "it attends within chunks of fixed length", ("UNPROVEN_MASK",)
    DYNAMIC_MASK = "it keeps the keys of the largest weights that each query sees", ("UNPROVEN_MASK",)
    HEADS_OF_512 = "its heads of global attention have 512 features", ("HEAD_DIM",)
    INDEXER = (
        "it attends to keys that an indexer of its own picks for each query",
        ("ADDITIVE_BIAS", "UNPROVEN_MASK"),
    )
    LAYERS_ATTEND = "it attends to the outputs of earlier layers", ("BIDIRECTIONAL", "CROSS_ATTENTION")
    MIXED_SCORES = "the scores of its heads are mixed before they are masked", ("ADDITIVE_BIAS", "PARTIAL_MATCH")
    MULTIPLIED_MASK = "its scores are multiplied with the mask", ("SCALE_IS_DATA",)
    PATCHES = "its patches attend to their own bytes", ("UNPROVEN_MASK",)
    SINK_OF_QUERIES = "its softmax has a sink, computed for each query", ("SINK",)
    WRITTEN_MASK = "its window mask is put together by writing to it", ("ADDITIVE_BIAS",)

    def __init__(self, text: str, reasons: tuple[str, ...]) -> None:
        self.text = text
        self.reasons = reasons


CAUSES: dict[str, tuple[Cause, ...]] = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa"), (Cause.INDEXER,)),
    **dict.fromkeys(("deepseek_v4", "hy_v4"), (Cause.INDEXER,)),
    **dict.fromkeys(("cpmant", "inkling_text", "prophetnet", "xlnet"), (Cause.BIAS,)),
    **dict.fromkeys(("jetmoe", "moshi", "qwen4_exp", "qwen4_exp_text"), (Cause.BROKEN_GRAPH,)),
    **dict.fromkeys(("gemma4", "gemma4_unified"), (Cause.HEADS_OF_512, Cause.BROKEN_GRAPH)),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), (Cause.HEADS_OF_512,)),
    **dict.fromkeys(("llama4", "llama4_text"), (Cause.CHUNKS,)),
    "blt": (Cause.PATCHES,),
    "doge": (Cause.DYNAMIC_MASK,),
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text"), (Cause.LAYERS_ATTEND, Cause.SINK_OF_QUERIES)),
    "litgpt Gemma-2-2b": (Cause.WRITTEN_MASK,),
    "litgpt Mistral-7B-v0.1": (Cause.WRITTEN_MASK,),
    "openai-gpt": (Cause.MULTIPLIED_MASK,),
    "x-transformers alibi": (Cause.BIAS,),
    "x-transformers relative position bias": (Cause.BIAS,),
    "x-transformers talking heads": (Cause.MIXED_SCORES,),
}
"""For every architecture with attention that stays dense, what keeps it so."""


def causes_of(architecture: str) -> tuple[Cause, ...]:
    """What keeps attention of an architecture dense."""
    return CAUSES.get(architecture, ())


def unexplained(decided: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sites that stay dense, or that the matcher missed, without a true cause.

    Args:
        decided: decisions by family and architecture, as recorded.
    """
    found = []
    for entries in decided.values():
        for architecture, implementations in entries.items():
            for implementation, kinds in implementations.items() if "unbuilt" not in implementations else ():
                for kind, decision in kinds.items():
                    causes = causes_of(architecture)
                    allowed = {"SWITCHABLE"}.union(*(cause.reasons for cause in causes))
                    wrong = sorted(set(decision["reasons"]) - allowed)
                    if decision["calls"] > decision["sites"]:
                        wrong.append(f"{decision['calls'] - decision['sites']} not found")
                    if wrong:
                        found.append(f"{architecture}/{implementation} {kind}: {', '.join(wrong)}")
    return found
