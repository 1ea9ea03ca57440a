"""Schema of the ONNX operator ``infllm::InfLLMV2Attention``: name, attributes and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from infllm_pass.kernels.geometry import BlockGeometry, format_channels, parse_channels

from ...ops.attention_args import geometry_of

DOMAIN = "infllm"
NAME = "InfLLMV2Attention"
VERSION = 1

NO_CHANNELS = "none"
"""The attribute ``channels`` of pooled scores: parsers drop texts that are empty."""

_GEOMETRY = [field.name for field in fields(BlockGeometry) if field.name != "agnostic_blocks"]
"""Fields of the geometry that are attributes: a selection by importance has no node."""


@dataclass(frozen=True)
class AttentionNode:
    """What one node of the operator computes.

    Attributes:
        geometry: which blocks are selected.
        scale: softmax scale.
        dense_len: length from which a sequence is sparse.
        window: sliding window in keys; 0: none.
        masked: whether the node has the input ``key_mask``.
        placed: whether the node has the input ``offset``; without it the queries are the last of the keys.
        softcap: cap of the scaled scores; 0.0: none.
        biased: whether the node has the input ``key_bias``.
        sunk: whether the node has the input ``sinks``.
    """

    geometry: BlockGeometry
    scale: float
    dense_len: int
    window: int = 0
    masked: bool = False
    placed: bool = False
    softcap: float = 0.0
    biased: bool = False
    sunk: bool = False

    @classmethod
    def from_call(cls, given: Mapping[str, Any], *, placed: bool) -> AttentionNode:
        """The node for the arguments, by name, of a call of ``infllm::switchable_attention``."""
        return cls(
            geometry_of(given["geometry"]),
            scale=given["scale"],
            dense_len=given["dense_len"],
            window=given["window"] or 0,
            masked=given["key_mask"] is not None,
            placed=placed,
            softcap=given["softcap"],
            biased=given["key_bias"] is not None,
            sunk=given["sinks"] is not None,
        )

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> AttentionNode:
        """The node with these attributes by name, as `attributes` gives them; others are ignored."""
        sizes = {name: attributes[name] for name in _GEOMETRY}
        channels = sizes["channels"]
        return cls(
            BlockGeometry(**sizes | {"channels": () if channels == NO_CHANNELS else parse_channels(channels)}),
            scale=attributes["scale"],
            dense_len=attributes["dense_len"],
            window=attributes["window"],
            masked=bool(attributes["has_key_mask"]),
            placed=bool(attributes["has_offset"]),
            softcap=attributes.get("softcap", 0.0),  # files of earlier versions have none of these
            biased=bool(attributes.get("has_key_bias", 0)),
            sunk=bool(attributes.get("has_sinks", 0)),
        )

    @property
    def attributes(self) -> dict[str, int | float | str]:
        """The node's attributes, with those by which TensorRT finds a plugin."""
        return {
            **{name: getattr(self.geometry, name) for name in _GEOMETRY},
            "channels": format_channels(self.geometry.channels) or NO_CHANNELS,
            "dense_len": self.dense_len,
            "window": self.window,
            "has_key_mask": int(self.masked),
            "has_offset": int(self.placed),
            "has_key_bias": int(self.biased),
            "has_sinks": int(self.sunk),
            "scale": float(self.scale),
            "softcap": float(self.softcap),
            "plugin_namespace": DOMAIN,
            "plugin_version": str(VERSION),
        }

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the node's inputs. There are no gaps, which TensorRT's parser does not take."""
        given = {"key_mask": self.masked, "offset": self.placed, "key_bias": self.biased, "sinks": self.sunk}
        return ("q", "k", "v", *(name for name, present in given.items() if present))
