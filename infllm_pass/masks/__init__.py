"""Proving what a mask computes: symbolic values, an interpreter over graph nodes, and normal forms."""

from infllm_pass.masks.predicate import KeyCondition, MaskPredicate, UnprovenMask, prove_mask
from infllm_pass.masks.values import GraphFacts

__all__ = ["GraphFacts", "KeyCondition", "MaskPredicate", "UnprovenMask", "prove_mask"]
