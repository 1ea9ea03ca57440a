"""Proving what a mask computes: symbolic values, an interpreter over graph nodes, and normal forms."""

from infllm_pass.graph.buffers import HeldTensors
from infllm_pass.graph.facts import GraphFacts
from infllm_pass.masks.normal_form import (
    BATCH,
    HEAD,
    KEY,
    HeadFunction,
    KeyBias,
    KeyCondition,
    KeyTerms,
    Leaf,
    MaskPredicate,
    MaskRole,
    MaskTerm,
    Segments,
    UnprovenMask,
    axes_of,
    home_of,
    without_shift,
)
from infllm_pass.masks.proof import prove_mask, prove_terms, readable

__all__ = [
    "BATCH",
    "HEAD",
    "KEY",
    "GraphFacts",
    "HeadFunction",
    "HeldTensors",
    "KeyBias",
    "KeyCondition",
    "KeyTerms",
    "Leaf",
    "MaskPredicate",
    "MaskRole",
    "MaskTerm",
    "Segments",
    "UnprovenMask",
    "axes_of",
    "home_of",
    "prove_mask",
    "prove_terms",
    "readable",
    "without_shift",
]
