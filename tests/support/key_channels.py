"""Reading the rotary embedding of a model's keys as the pass does, and measuring it on the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from infllm_pass.graph.subgraphs import all_graphs, held_tensors
from infllm_pass.sites import AttentionSite, find_sites
from infllm_pass.sites.layouts import Layouts
from infllm_pass.sites.rotary import Rotary, RotaryReader
from infllm_pass.sites.site import Operand


@dataclass(frozen=True)
class KeyChannels:
    """The channels of one site's keys.

    Attributes:
        rotary: what is read of their rotary embedding, or why none is.
        keys: the keys ``[B, Hkv, L, D]`` of a row of equal tokens; None for a site in a nested graph.
    """

    rotary: Rotary | str
    keys: Tensor | None

    @property
    def text(self) -> str:
        """What was read, for the record: the pairs stand in the order in which token scores take them."""
        found = self.rotary
        if isinstance(found, str):
            return found
        pairs = " ".join(f"{low}+{high}" for low, high in found.pairs)
        plain = f"; not rotated: {_runs(found.unrotated)}" if found.unrotated else ""
        order = f" ({found.order})" if found.order else ""
        return f"{found.pairing}: {pairs}{plain}{order}"


def _runs(channels: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for channel in channels:
        if runs and runs[-1][-1] == channel - 1:
            runs[-1].append(channel)
        else:
            runs.append([channel])
    return ", ".join(f"{run[0]}-{run[-1]}" for run in runs)


class Observer:
    """A Dynamo backend that reads every site's keys, and runs the graph as it is."""

    def __init__(self) -> None:
        self.found: list[KeyChannels] = []

    def __call__(self, module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        read: list[tuple[AttentionSite, Rotary | str, bool]] = []
        for view in all_graphs(module, held_tensors(module, example_inputs)):
            layouts = Layouts(view.facts)
            reader = RotaryReader(layouts)
            for site in find_sites(view.facts, layouts):
                if isinstance(site, AttentionSite):
                    head_dim = int(site.shape(site.key_heads)[3])
                    read.append((site, reader.read(site, head_dim), view.module is module))

        def run(*args: Any) -> Any:
            values = _Values(module)
            result = values.run(*args)
            for site, rotary, outermost in read:
                self.found.append(KeyChannels(rotary, values.of(site.key_heads) if outermost else None))
            return result

        return run


class _Values(fx.Interpreter):
    """Runs a graph and keeps what its nodes hold, by their names."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def of(self, operand: Operand) -> Tensor:
        """A tensor of a site, ``[B, H, L, D]``."""
        value: Tensor = self.env[operand.node].detach()
        for name, numbers in operand.steps:
            if name == "unflatten":
                value = value.unflatten(numbers[0], (-1, numbers[1]))
            elif name == "flatten":
                value = value.flatten(*numbers)
            elif name in ("permute", "squeeze"):
                value = getattr(value, name)(numbers)
            elif name == "unsqueeze":
                value = value.unsqueeze(*numbers)
        return value


def measured(keys: Tensor, rotary: Rotary) -> list[float]:
    """The angle by which each pair turns from the first position to the second, in the order of the pairs.

    Raises:
        AssertionError: a pair does not turn, evenly and keeping its length, or another channel moves.
    """
    row = keys[0].double()  # [Hkv, L, D]
    scale = float(row.abs().max())
    still = row[..., list(rotary.unrotated)]
    assert float((still - still[:, :1]).abs().amax() if still.numel() else 0.0) < 1e-4 * scale
    angles = []
    for low, high in rotary.pairs:
        vectors = torch.complex(row[..., low], row[..., high])  # [Hkv, L]
        assert float((vectors.abs() - vectors[:, :1].abs()).abs().max()) < 1e-4 * scale
        head = int(vectors[:, 0].abs().argmax())
        steps = vectors[head, 1:] / vectors[head, :-1]
        assert float((steps - steps[0]).abs().max()) < 1e-3
        angles.append(abs(math.atan2(float(steps[0].imag), float(steps[0].real))))
    return angles
