"""Generation over static caches on a CUDA device: CUDA graphs, no host synchronisation, states that last."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.errors import UncountedCacheWarning
from infllm_pass.frontend import api
from infllm_pass.kv_cache.store import CacheState
from tests.support.common import llama, oracle_attention, relative_error

transformers = pytest.importorskip("transformers")

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIGHT = SparseAttentionConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, init_blocks=1, dense_len=64, scorer="pooled"
)
"""Four blocks of sixteen: above 64 keys the selection leaves keys out."""

COVERING = dataclasses.replace(TIGHT, topk=40, dense_len=160)
"""Every block of a cache of 400 keys is visited, through the sparse branch from 160 keys on."""

LAYERS, KV_HEADS, DIM = 2, 2, 64
WARM_UP = 4
"""Steps that compile, run once without a CUDA graph, record it, and replay it."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    counters.clear()
    with torch.no_grad():
        yield


def small(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of four query heads a key/value head, of 64 numbers each."""
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    return llama(**sizes, num_hidden_layers=LAYERS).to(DEVICE, dtype)


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 64, (batch, length), device=DEVICE)


class Text:
    """Rows of tokens in a static cache, which a model continues.

    Args:
        model: called for prompt and steps.
        plain: the original, whose sizes count.
        batch: number of rows.
        capacity: tokens that the cache has room for.
        inputs: further inputs of every call.
    """

    def __init__(self, model: Any, plain: Any, batch: int = 1, capacity: int = 400, **inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.cache = transformers.StaticCache(config=plain.config, max_cache_len=capacity)
        weight = next(plain.parameters())
        self.cache.early_initialization(batch, KV_HEADS, DIM, weight.dtype, weight.device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)

    def read(self, prompt: Tensor, **inputs: Tensor) -> Tensor:
        """Logits ``[B, V]`` after a prompt."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.model(prompt.clone(), past_key_values=self.cache, **self.inputs, **inputs).logits[:, -1].clone()

    def step(self, token: Tensor, **inputs: Tensor) -> Tensor:
        """Logits ``[B, V]`` after one more token a row, ``[B, 1]``."""
        torch.compiler.cudagraph_mark_step_begin()
        self.token.copy_(token)
        return self.model(self.token, past_key_values=self.cache, **self.inputs, **inputs).logits[:, -1].clone()

    def continue_with(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` after each of the tokens, ``[B, T]``, fed one by one."""
        return torch.stack([self.step(tokens[:, place : place + 1]) for place in range(tokens.shape[1])], 1)


def oracle_steps(plain: Any, x: Tensor, prompt: int, config: SparseAttentionConfig) -> Tensor:
    """Logits ``[B, T, V]`` after each token past the prompt, by the float64 oracle over a growing cache."""
    wide, cache = copy.deepcopy(plain).double(), transformers.DynamicCache()
    with oracle_attention(config):
        wide(x[:, :prompt], past_key_values=cache)
        places = range(prompt, x.shape[1])
        return torch.cat([wide(x[:, place : place + 1], past_key_values=cache).logits for place in places], 1)


def sparsified(plain: Any, config: SparseAttentionConfig, mode: str | None = "reduce-overhead") -> Any:
    return infllm_pass.sparsify(torch.compile(plain, mode=mode), config, strict=True)


def states(model: Any) -> list[Any]:
    """The states of a sparsified model's caches."""
    return [state for each in api._find_handle(model).backend.store._states.values() for state in each.values()]


def recordings() -> int:
    """CUDA graphs that Inductor has recorded and would replay."""
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    pending = [node for nodes in manager.roots.values() for node in nodes] if manager is not None else []
    found = 0
    while pending:
        found += 1
        pending += [child for children in pending.pop().children.values() for child in children]
    return found


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("reduce-overhead", torch.float32), ("reduce-overhead", torch.bfloat16), ("max-autotune", torch.bfloat16)],
    ids=str,
)
def test_one_cuda_graph_serves_300_steps_and_both_sides_of_dense_len(mode, dtype):
    plain, x = small(dtype), ids(330)
    model = sparsified(plain, COVERING, mode)
    text = Text(model, plain)
    text.read(x[:, :20])
    outs = [text.continue_with(x[:, 20 : 20 + WARM_UP])]
    compiled, recorded = counters["stats"]["unique_graphs"], recordings()
    places = [tensor.data_ptr() for state in states(model) for tensor in state.inputs()]
    with no_synchronisation():
        outs.append(text.continue_with(x[:, 20 + WARM_UP :]))
    assert counters["stats"]["unique_graphs"] == compiled == 2
    assert recordings() == recorded >= 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert [tensor.data_ptr() for state in states(model) for tensor in state.inputs()] == places
    assert [state.filled.tolist() for state in states(model)] == [[330]] * LAYERS
    assert {site.cache_state for site in infllm_pass.report(model).sites} == {"recomputed", "carried"}
    exact = copy.deepcopy(plain).float()(x, use_cache=False).logits[:, 20:]
    bound = 1e-4 if dtype == torch.float32 else 2 * relative_error(plain(x, use_cache=False).logits[:, 20:], exact)
    assert relative_error(torch.cat(outs, 1), exact) <= bound


def test_steps_with_a_small_budget_are_those_of_the_oracle():
    plain, x = small(), ids(170)
    text = Text(sparsified(plain, TIGHT), plain)
    text.read(x[:, :40])
    assert relative_error(text.continue_with(x[:, 40:]), oracle_steps(plain, x, 40, TIGHT)) < 1e-4
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recordings() >= 1


def test_rows_of_a_batch_are_on_sides_of_their_own():
    """Row 0 crosses 160 keys after ten steps; row 1 begins sixty slots later and stays below."""
    config, capacity, pad = dataclasses.replace(TIGHT, dense_len=160), 200, 60
    plain, x = small(), ids(180, 2)
    valid = torch.ones(2, capacity, dtype=torch.int64, device=DEVICE)
    valid[1, :pad] = 0
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    model = sparsified(plain, config)
    text = Text(model, plain, 2, capacity, attention_mask=valid)
    text.read(x[:, :150], position_ids=positions[:, :150].clone())
    place, outs = positions[:, 150:151].clone(), []
    for slot in range(150, 180):
        outs.append(text.step(x[:, slot : slot + 1], position_ids=place))
        place.add_(1)
    out = torch.stack(outs, 1)
    assert relative_error(out[:1], oracle_steps(plain, x[:1], 150, config)) < 1e-4
    assert relative_error(out[1:], oracle_steps(plain, x[1:, pad:], 150 - pad, config)) < 1e-4
    always = dataclasses.replace(config, dense_len=0)
    assert relative_error(out[1:], oracle_steps(plain, x[1:, pad:], 150 - pad, always)) > 1e-3
    assert infllm_pass.report(model).sites[-1].cache_state == "carried"
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_generate_gives_the_tokens_of_the_dense_model(padded):
    plain, x = small(), ids(90, 2)
    mask = torch.ones_like(x)
    if padded:
        mask[1, :37] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 120, "min_new_tokens": 120, "do_sample": False}
    settings["pad_token_id"] = 0
    expected = plain.generate(x, **settings)
    model = sparsified(plain, COVERING)
    assert torch.equal(model.generate(x, **settings, cache_implementation="static"), expected)
    assert infllm_pass.report(model).sites[-1].cache_state == "carried"
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recordings() >= 1


def test_caches_can_be_swapped():
    """Another cache is recorded anew, not compiled anew, and its state goes with it."""
    plain, x = small(), ids(90, 2)
    model = sparsified(plain, TIGHT)
    texts = [Text(model, plain, capacity=128) for _ in range(2)]
    outs: list[list[Tensor]] = [[], []]
    for row, text in enumerate(texts):
        text.read(x[row : row + 1, :70])
        compiled = counters["stats"]["unique_graphs"] if row else None
        outs[row].append(text.continue_with(x[row : row + 1, 70:75]))
        assert compiled in (None, counters["stats"]["unique_graphs"])
    for begin in (75, 80, 85):
        for row, text in enumerate(texts):
            outs[row].append(text.continue_with(x[row : row + 1, begin : begin + 5]))
    for row in range(2):
        expected = oracle_steps(plain, x[row : row + 1], 70, TIGHT)
        assert relative_error(torch.cat(outs[row], 1), expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(states(model)) == 2 * LAYERS
    del text, texts[1]
    gc.collect()
    assert len(states(model)) == LAYERS


def test_a_cache_that_is_used_again_starts_over():
    plain, x = small(), ids(90, 2)
    text = Text(sparsified(plain, TIGHT), plain, capacity=128)
    for row in range(2):
        text.cache.reset()
        text.read(x[row : row + 1, :70])
        out = text.continue_with(x[row : row + 1, 70:])
        assert relative_error(out, oracle_steps(plain, x[row : row + 1], 70, TIGHT)) < 1e-4
    assert recordings() >= 1


def test_a_cuda_graph_of_somebody_else_is_right_at_every_replay():
    plain, x = small(), ids(90, 2)
    text = Text(sparsified(plain, TIGHT, None), plain, capacity=128)
    text.read(x[:1, :70])
    text.continue_with(x[:1, 70:73])
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UncountedCacheWarning, match="replay"), torch.cuda.graph(graph):
        out = text.model(text.token, past_key_values=text.cache).logits
    for row in range(2):
        text.cache.reset()
        text.read(x[row : row + 1, :70])
        steps = []
        for place in range(70, 90):
            text.token.copy_(x[row : row + 1, place : place + 1])
            graph.replay()
            steps.append(out.clone())
        expected = oracle_steps(plain, x[row : row + 1], 70, TIGHT)
        assert relative_error(torch.cat(steps, 1), expected) < 1e-4


def test_the_dense_side_decodes_densely_in_a_cuda_graph():
    plain, x = small(), ids(90)
    text = Text(infllm_pass.dense(sparsified(plain, TIGHT)), plain, capacity=128)
    text.read(x[:, :70])
    out = text.continue_with(x[:, 70:])
    assert relative_error(out, plain(x, use_cache=False).logits[:, 70:]) < 1e-4
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recordings() >= 1


def test_steps_over_a_growing_cache():
    """Their compressed keys are carried from step to step, by graphs that serve all lengths."""
    plain, x = small(), ids(90)
    model, cache = sparsified(plain, TIGHT, None), transformers.DynamicCache()
    model(x[:, :50].clone(), past_key_values=cache)
    places = range(50, 90)
    outs = [model(x[:, place : place + 1].clone(), past_key_values=cache).logits for place in places]
    assert relative_error(torch.cat(outs, 1), oracle_steps(plain, x, 50, TIGHT)) < 1e-4
    last = infllm_pass.report(model).sites[-1]
    assert (last.branch, last.kernels, last.cache_state) == ("sparse", "triton", "carried")
    assert counters["stats"]["unique_graphs"] <= 5


def test_memory_of_a_state_is_not_given_away_while_another_stream_uses_it():
    shapes = [(1, 2, slots, 64) for slots in (9001, 3001)]
    state = CacheState(
        [torch.zeros(shape, device="cuda") for shape in shapes],
        *(torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2)),
    )
    torch.cuda.synchronize()
    taken, stream = {tensor.data_ptr() for tensor in state.tensors}, torch.cuda.Stream()
    with torch.cuda.stream(stream):
        state.use(stream)
        torch.cuda._sleep(2_000_000_000)
        state.tensors[0].add_(1)
    del state
    again = [torch.empty(shape, device="cuda") for shape in shapes]
    assert not taken & {tensor.data_ptr() for tensor in again}
    torch.cuda.synchronize()
