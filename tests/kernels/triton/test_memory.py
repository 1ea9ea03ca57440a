"""No kernel reads or writes beyond the tensors that it is given, whatever the numbers in them are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.triton import launch
from infllm_pass.kernels.triton.configs import ScatteredConfig, override
from infllm_pass.kernels.triton.prefill.compress import compress_keys
from infllm_pass.kernels.triton.prefill.pooled import select_tiles
from infllm_pass.kernels.triton.tile_schedule import plan_tiles
from infllm_pass.kernels.triton.tile_tables import TileShape
from infllm_pass.lowering.ops import checks, prefill
from infllm_pass.lowering.ops.attention_args import AttentionCall, DecodeCall
from infllm_pass.lowering.ops.decode import decode_attention, new_state
from tests.support.triton_device import DEVICE, INTERPRETED, arrange

if INTERPRETED:
    from tests.support.triton_memory import within_tensors

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="addresses are seen under the interpreter")

SMALL = BlockGeometry(8, 4, 16, init_blocks=1, local_blocks=1, selected_blocks=4)
TOKENS = replace(SMALL, scorer="tokens", channels=((*range(4, 8), *range(12, 16)),))
SCORERS = {
    "pooled": {"_compress_kernel", "_select_pooled_kernel"},
    "tokens": {"_index_keys_kernel", "_select_tokens_kernel"},
}
KERNELS = {"_sequences_kernel", "_panels_kernel", "_attention_forward_kernel"}
GRADIENTS = {"_output_delta_kernel", "_query_gradient_kernel", "_key_gradients_kernel", "_invert_kernel"}


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    monkeypatch.setattr(checks, "_refusal", lambda *_: None)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def mask(length: int = 101) -> torch.Tensor:
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :13] = False
    valid[1, 40:] = False
    return valid


CALLS = {
    "plain": {},
    "padded": {"key_mask": mask()},
    "window": {"window": 30},
    "offsets": {"offsets": torch.tensor([-5, 60])},
    "offsets far away": {"offsets": torch.tensor([-(2**40), 2**31 - 1])},
    "packed": {"cu_seqlens_k": int32(0, 70, 101, 101, 150, 202)},
    "no first block": {"geometry": replace(SMALL, init_blocks=0)},
    "exact": {"geometry": replace(SMALL, lse="exact")},
    "many windows": {"geometry": replace(SMALL, kernel_size=2, kernel_stride=1)},
    "tokens": {"geometry": TOKENS},
    "tokens, padded": {"geometry": TOKENS, "key_mask": mask()},
    "tokens, packed, int8": {
        "geometry": replace(TOKENS, score_dtype="int8"),
        "cu_seqlens_k": int32(0, 70, 101, 101, 150, 202),
    },
    "tokens, window, float8": {"geometry": replace(TOKENS, score_dtype="fp8", query_block=16), "window": 30},
    "tokens, offsets": {"geometry": TOKENS, "offsets": torch.tensor([-(2**40), 2**31 - 1])},
    "tokens, blocks of 128": {"geometry": replace(TOKENS, block_size=128, local_blocks=0, selected_blocks=2)},
    "tokens, a table of channels": {"geometry": replace(TOKENS, channels=(tuple(range(0, 16, 2)),))},
}


def attend(q, k, v, geometry=SMALL, dense_len=0, **call):
    given = AttentionCall(0.25, dense_len, geometry, **call).arguments
    selection = prefill.select_blocks(q, k, prefill.compress_keys(q, k, *given), *given)
    return prefill.block_attention(q, k, v, selection, *given)


def run(call, batch=2, length=101, heads=(2, 1)):
    """Forward and backward on tensors that end where their memory does."""
    q, k, v = (torch.randn(batch, h, length, 16, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    with within_tensors() as launched:
        out = attend(q, k, v, **call)[0]
        gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert set(launched) >= KERNELS | GRADIENTS | SCORERS[call.get("geometry", SMALL).scorer]
    assert all(bool(x.isfinite().all()) for x in (out, *gradients))
    return launched


@pytest.mark.parametrize("case", CALLS)
def test_prompts_stay_within_their_tensors(case):
    run(CALLS[case])


def test_gathering_stays_within_its_tensors():
    """What is fetched ahead at the end of a chunk's lists, too."""
    always = ScatteredConfig(threshold=-1.0, pool_bytes=1 << 14)
    with override(scattered=always, scattered_gradient=always):
        for call in ({}, {"cu_seqlens_k": int32(0, 70, 101, 101, 150, 202)}):
            launched = run(call | {"geometry": replace(SMALL, selected_blocks=6)}, heads=(4, 1))
            assert {"_scattered_kernel", "_scattered_gradient_kernel"} <= set(launched)


BAD = {
    "descending": [0, 90, 30, 101, 60, 202],
    "negative": [-50, 20, -3, 101, 202],
    "beyond the keys": [0, 101, 202, 5000, 100000],
    "crossing rows": [0, 30, 150, 202],
    "overlapping": [0, 202, 0, 202, 0, 202, 0, 202],
    "extreme": [-(2**31), 2**31 - 1, -1, 2**31 - 1],
    "none": [0],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bounds_lead_no_kernel_astray(case, monkeypatch):
    monkeypatch.setattr(checks, "_may_read", lambda *_: False)
    run({"cu_seqlens_k": int32(*BAD[case])})
    run({"cu_seqlens_k": int32(*BAD[case]), "geometry": TOKENS})
    bounds = int32(*BAD[case])
    run({"cu_seqlens_q": bounds, "cu_seqlens_k": bounds.flip(0)}, batch=1)


def test_bounds_of_many_sequences(monkeypatch):
    """More than one step of the table; what one step found holds for the next."""
    monkeypatch.setattr(checks, "_may_read", lambda *_: False)
    bounds = torch.arange(0, 301).remainder(70).to(torch.int32)
    run({"cu_seqlens_k": bounds}, batch=1)


STEPS = {"pooled": {"decode_compress_kernel", "_decode_score_kernel"}, "tokens": {"decode_tokens_kernel"}}


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(
    "geometry", [SMALL, TOKENS, replace(TOKENS, score_dtype="int8")], ids=["pooled", "tokens", "int8"]
)
def test_decoding_stays_within_its_tensors(geometry, queries):
    geometry = replace(geometry, local_blocks=2, selected_blocks=5)
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, queries), (2, 120), (2, 120)))
    state = new_state(k, geometry)
    for lengths, starts in (([110, 70], [3, 0]), ([1000, -5], [-7, 2000])):
        call = DecodeCall(torch.tensor(lengths), 0.25, 80, geometry, torch.tensor(starts))
        with within_tensors() as launched:
            decode_attention(q, k, v, state, *call.arguments)
        assert STEPS[geometry.scorer] <= set(launched)


def test_copies_of_compressed_keys_give_the_same_selection():
    """What is read around the slots is memory of the same tensors, and makes no difference."""
    q, k = torch.randn(1, 2, 101, 16), torch.randn(1, 1, 101, 16)
    plan = plan_tiles(TileShape.choose(2), batch=1, length_q=101, length_k=101, block_size=16, device=DEVICE)
    keys = compress_keys(k, plan, geometry=SMALL)
    numbers = {"geometry": SMALL, "scale": 0.25, "dense_len": 0, "length_k": 101}
    expected = select_tiles(q, keys, plan, **numbers)
    copies = replace(keys, fine=torch.full_like(keys.fine, torch.nan), coarse=torch.full_like(keys.coarse, torch.nan))
    for copy, windows in zip(copies.windows(), keys.windows(), strict=True):
        copy.copy_(windows)
    with within_tensors():
        found = select_tiles(q, copies, plan, **numbers)
    assert torch.equal(found.counts, expected.counts)
    listed = torch.arange(expected.blocks.shape[2]) < expected.counts[..., None]
    assert torch.equal(found.blocks[listed], expected.blocks[listed])


def test_kernels_are_launched_under_the_device_of_their_tensors(monkeypatch):
    """Whichever operator launches them."""
    entered, launched = [], []

    class Guard:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.pop()

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*arguments, **named):
                launched.append((self.kernel.fn.__name__, list(entered)))
                return self.kernel[grid](*arguments, **named)

            return run

    original = launch._OnDevice.__init__
    monkeypatch.setattr(launch, "device_guard", Guard)
    monkeypatch.setattr(launch._OnDevice, "__init__", lambda self, kernel: original(self, Kernel(kernel)))
    run({})
    geometry = replace(SMALL, local_blocks=2, selected_blocks=5)
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, 1), (2, 120), (2, 120)))
    call = DecodeCall(torch.tensor([110]), 0.25, 80, geometry)
    decode_attention(q, k, v, new_state(k, geometry), *call.arguments)
    assert {name for name, _ in launched} >= KERNELS | GRADIENTS | {"decode_compress_kernel"}
    assert all(devices == [DEVICE] for _, devices in launched)
    assert not entered


arrange(globals())
