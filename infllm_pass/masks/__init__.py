"""Proving what a mask computes: symbolic values, an interpreter over graph nodes, and normal forms."""

from infllm_pass.masks.predicate import (
    KeyCondition,
    MaskPredicate,
    MaskRole,
    MaskTerm,
    UnprovenMask,
    prove_mask,
    prove_terms,
)
from infllm_pass.masks.values import GraphFacts

__all__ = [
    "GraphFacts",
    "KeyCondition",
    "MaskPredicate",
    "MaskRole",
    "MaskTerm",
    "UnprovenMask",
    "prove_mask",
    "prove_terms",
]
