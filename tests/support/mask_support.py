"""Proofs about masks as tensors again, to compare them with the masks themselves."""

from __future__ import annotations

import sympy
import torch

from infllm_pass.graph.subgraphs import all_graphs, held_tensors
from infllm_pass.masks import KeyCondition, MaskPredicate, MaskRole, MaskTerm, prove_terms
from infllm_pass.masks.codegen import Site, build
from infllm_pass.masks.interpreter import Interpreter


def call(target, *args, **kwargs):
    """Calls a function, or a tensor method for a name."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def key_mask(condition: KeyCondition, tensors, batch: int, length: int, sizes=None) -> torch.Tensor:
    """A key condition as ``[B, Lk]``; `tensors` gives the real tensor of each leaf's node, `sizes` of each symbol."""
    leaves = {name: tensors[node] for name, _, node in condition.leaves}

    def size(symbol):
        return leaves[symbol.name] if symbol.name in leaves else sizes[symbol]

    def leaf(name):
        return leaves[name], leaves[name].shape

    site = Site(call, leaf, size, batch, length, (batch, length), torch.device("cpu"))
    return torch.as_tensor(build(condition.expression, site)).expand(batch, length)


def mask_of(proof: MaskPredicate, tensors, shape, sizes=None) -> torch.Tensor:
    """What a proof says a mask is, bool ``[B, 1, Lq, Lk]``."""
    batch, length_q, length_k = shape
    query, key = torch.arange(length_q)[:, None], torch.arange(length_k)[None, :]
    mask = torch.ones(batch, 1, length_q, length_k, dtype=torch.bool)
    values = dict(sizes or {})

    def number(expr):
        return int(sympy.sympify(expr).xreplace(values))

    if proof.causal_offset is not None:
        limit = query + number(proof.causal_offset)
        mask &= key <= limit
        if proof.window is not None:
            mask &= key > limit - number(proof.window)
    for condition in proof.key_terms.mask:
        mask &= key_mask(condition, tensors, batch, length_k, sizes)[:, None, None, :]
    if proof.segments is not None:
        ids = tensors[proof.segments.node]
        ids = ids.reshape(-1, ids.shape[-1]).expand(batch, -1)
        runs = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], 1).cumsum(1)
        place = (query[:, 0] + number(proof.segments.offset)).clamp(0, ids.shape[1] - 1)
        mask &= (runs[:, place][:, :, None] == runs[:, None, :length_k])[:, None]
    return mask


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module):
        super().__init__(module)
        self.values = {}

    def run_node(self, node):
        self.values[node] = super().run_node(node)
        return self.values[node]


def captured(function, *inputs, dynamic=None, **kwargs):
    """The graph that Dynamo hands to a backend, and the values of its inputs."""
    seen = []

    def backend(module, example_inputs):
        module.meta["held"] = held_tensors(module, example_inputs)  # Dynamo drops the inputs' sources later
        seen.append((module, list(example_inputs)))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs, **kwargs)
    ((module, values),) = seen
    return module, [value.node.hint if isinstance(value, torch.SymInt) else value for value in values]


def prove_output(module):
    """The proof of the tensors that a graph returns, taken as masks of one site, and the graph's facts."""
    facts = all_graphs(module, module.meta["held"])[0].facts
    output = next(node for node in module.graph.nodes if node.op == "output")
    terms = []
    for node in output.args[0]:
        boolean = node.meta["example_value"].dtype == torch.bool
        terms.append(MaskTerm(node, MaskRole.KEEP if boolean else MaskRole.ADDED))
    return prove_terms(Interpreter(facts), tuple(terms)), facts


def check_proof(proof, module, inputs) -> None:
    """Compare a proof with the masks that the graph computes for real inputs."""
    recorder = _Recorder(module)
    masks = recorder.run(*inputs)
    sizes = {}
    for node, value in recorder.values.items():
        example = node.meta.get("example_value")
        if isinstance(example, torch.SymInt):
            sizes[example.node.expr] = int(value)
        elif isinstance(example, torch.Tensor) and node.op == "placeholder":
            pairs = zip(example.shape, value.shape, strict=True)
            sizes.update({a.node.expr: b for a, b in pairs if isinstance(a, torch.SymInt)})
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for mask in masks:
        visible = visible & (mask if mask.dtype == torch.bool else mask == 0)
    batch, _, length_q, length_k = visible.shape
    expected = mask_of(proof, recorder.values, (batch, length_q, length_k), sizes)
    assert torch.equal(visible, expected.expand_as(visible)), proof


def node_values(module, inputs) -> dict:
    """What every node of a graph holds for real inputs."""
    recorder = _Recorder(module)
    recorder.run(*inputs)
    return recorder.values
