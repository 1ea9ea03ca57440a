"""Prefill: compressed keys, block selection and attention forward."""
