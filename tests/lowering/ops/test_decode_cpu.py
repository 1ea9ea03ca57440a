"""The decode operator on the CPU, in C++ and in torch operators: every step equals the oracle on the whole prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._inductor import exc
from torch._inductor.codecache import CppCodeCache

from infllm_pass.errors import DeviceError, DtypeError, ShapeError, UncompiledKernelWarning
from infllm_pass.kernels.cpu import native
from infllm_pass.kernels.geometry import BlockGeometry
from infllm_pass.kernels.scorer import scorer_of
from infllm_pass.lowering.ops import decode
from infllm_pass.lowering.ops.attention_args import ARGUMENTS, DecodeCall
from tests.support.decode_support import SMALL, Cache

ODD = {
    "group 1": {"group": 1},
    "group 3": {"group": 3},
    "group 7, one head": {"group": 7, "heads": 1},
    "dims 24 and 40": {"dim": 24, "value_dim": 40},
    "dims 64 and 128": {"dim": 64, "value_dim": 128},
    "exact": {"geometry": replace(SMALL, lse="exact")},
    "blocks of 8": {"geometry": replace(SMALL, block_size=8, selected_blocks=6)},
    "long windows": {"geometry": replace(SMALL, kernel_size=32, selected_blocks=5)},
    "windows side by side": {"geometry": replace(SMALL, kernel_size=4)},
    "windows that reach ahead": {"geometry": replace(SMALL, kernel_size=64)},
    "no first block": {"geometry": replace(SMALL, init_blocks=0, local_blocks=2, selected_blocks=5)},
    "sliding window": {"window": 100},
    "narrow sliding window": {"window": 5},
    "dense sliding window": {"window": 30, "dense_len": 1000},
    "shared by 16": {"geometry": replace(SMALL, query_block=16)},
    "shared by 64": {"geometry": replace(SMALL, query_block=64)},
    "equal scores": {"level": True},
    "tokens first": {"token_first": True},
    "compressed keys of a slot together": {"slot_first": True},
    "float64": {"dtype": torch.float64},
    "holes": {"holes": 0.3},
    "holes, tokens first": {"holes": 0.3, "token_first": True},
    "holes, dense": {"holes": 0.3, "dense_len": 1000},
    "holes, sliding window": {"holes": 0.8, "window": 70},
    "holes, shared by 16": {"holes": 0.3, "geometry": replace(SMALL, query_block=16)},
    "no key is seen": {"holes": 1.1},
}

TOKENS = replace(SMALL, scorer="tokens", channels=((0, 3, *range(6, 16)),))
EACH_ITS_OWN = replace(TOKENS, channels=((0, 2, 5), (1, 13, 15)))
EIGHT_BITS = {name: replace(TOKENS, score_dtype=name) for name in ("int8", "fp8")}
ODD |= {
    f"tokens, {name}": {**sizes, "geometry": replace(sizes.get("geometry", SMALL), **by)}
    for by in ({"scorer": "tokens", "channels": TOKENS.channels},)
    for name, sizes in ODD.items()
    if "windows" not in name.split(", ") and name != "exact"
}
ODD |= {
    "tokens, channels of each head": {"geometry": EACH_ITS_OWN},
    "tokens, all channels": {"geometry": replace(TOKENS, channels=(tuple(range(16)),))},
    "tokens, blocks of 24": {"geometry": replace(TOKENS, block_size=24, kernel_stride=4)},
    "tokens, group 4": {"geometry": TOKENS, "group": 4},
    "tokens, group 16": {"geometry": TOKENS, "group": 16, "heads": 1},
    "tokens, shared by 4": {"geometry": replace(EACH_ITS_OWN, query_block=4)},
}
for name, eight in EIGHT_BITS.items():
    ODD[f"tokens, {name}"] = {"geometry": eight}
    ODD[f"tokens, {name}, slots first"] = {"geometry": eight, "slot_first": True}
    ODD[f"tokens, {name}, float64"] = {"geometry": eight, "dtype": torch.float64}
    ODD[f"tokens, {name}, holes"] = {"geometry": replace(eight, query_block=16), "holes": 0.4, "token_first": True}


def operator(*arguments):
    q, k, v, *state, lengths, starts, key_mask, window, scale, dense_len, geometry = arguments
    call = DecodeCall(lengths, scale, dense_len, geometry, starts, key_mask, window)
    return decode.decode_attention(q, k, v, state, *call.arguments)


@pytest.fixture
def in_c_plus_plus(monkeypatch):
    """Whether the kernel in C++ computed, call by call."""
    calls, plain = [], native.decode_attention
    monkeypatch.setattr(native, "decode_attention", lambda *a, **k: calls.append(plain(*a, **k)) or calls[-1])
    return calls


@pytest.fixture
def in_operators(monkeypatch):
    monkeypatch.setattr(native, "decode_attention", lambda *_, **__: False)


@pytest.mark.parametrize("sizes", ODD.values(), ids=ODD)
def test_steps_equal_the_oracle(sizes, in_c_plus_plus):
    cache = Cache(operator, [120, 77], **sizes)
    cache.grow(1, 1, 5, 1, 16, 1)
    assert set(in_c_plus_plus) == {True}


@pytest.mark.usefixtures("in_operators")
@pytest.mark.parametrize("sizes", ODD.values(), ids=ODD)
def test_steps_in_torch_operators_equal_the_oracle(sizes):
    cache = Cache(operator, [120, 77], **sizes)
    cache.grow(1, 1, 5, 1, 16, 1)


@pytest.mark.parametrize("dense_len", [0, 2000, 5000])
@pytest.mark.parametrize("shared", [1, 16])
@pytest.mark.parametrize("geometry", [SMALL, TOKENS], ids=["pooled", "tokens"])
def test_what_is_cut_into_parts(dense_len, shared, geometry, in_c_plus_plus):
    """More windows, and more visited keys, than one task of the kernel in C++ takes."""
    geometry = replace(geometry, selected_blocks=60, query_block=shared)
    cache = Cache(operator, [2500, 1700], [0, 33], capacity=2600, geometry=geometry, dense_len=dense_len)
    cache.grow(1, 5, 1)
    assert set(in_c_plus_plus) == {True}


def test_features_that_are_not_adjacent(in_c_plus_plus):
    given = arguments()
    turned = [x.mT.contiguous().mT for x in given[:3]]
    state = [x.clone() for x in given[3]]
    expected = decode.decode_attention(*given)
    got = decode.decode_attention(*turned, state, *given[4:])
    torch.testing.assert_close(got, expected)
    got = decode.decode_attention(turned[0], *given[1:])
    torch.testing.assert_close(got, expected)
    assert in_c_plus_plus == [True, False, True]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (exc.InvalidCxxCompiler(), "No working C\\+\\+ compiler"),
        (exc.CppCompileError(["g++", "-x"], "out of memory"), "C\\+\\+ compile error"),
        (OSError("cannot open shared object file"), "cannot open shared object file"),
    ],
)
def test_without_a_compiler_torch_operators_run_and_say_so_once(monkeypatch, error, reason):
    def fail(_code):
        raise error

    monkeypatch.setattr(CppCodeCache, "load", fail)
    native._library.cache_clear()
    try:
        with pytest.warns(UncompiledKernelWarning, match=f"{reason}.*; install g\\+\\+") as warned:
            Cache(operator, [64]).grow(1, 1, 3)
        assert len(warned) == 1
    finally:
        native._library.cache_clear()


def test_a_cache_grows_key_by_key_from_nothing_across_dense_len():
    Cache(operator, [0, 9, 30], starts=[0, 9, 17], dense_len=50, heads=1).grow(*[1] * 80)


@pytest.mark.parametrize("geometry", [SMALL, TOKENS, *EIGHT_BITS.values()])
def test_half_precision(geometry):
    for dtype in (torch.bfloat16, torch.float16):
        Cache(operator, [64], geometry=geometry, dtype=dtype).grow(1, 1, 3, bound=1e-2)


def test_queries_before_the_first_key_give_nothing():
    cache = Cache(operator, [0, 3, 40], starts=[0, 3, 40])
    q = cache.append(7)
    cache.lengths = [0, 5, 47]
    cache.check(q)


@pytest.mark.parametrize("geometry", [SMALL, TOKENS, EIGHT_BITS["int8"]], ids=["pooled", "tokens", "int8"])
def test_state_is_the_same_however_it_came_about(geometry):
    cache = Cache(operator, [0, 20], starts=[0, 7], geometry=geometry)
    for _ in range(100):
        cache.attend(cache.append(1))
    grown = [tensor.clone() for tensor in cache.state]
    cache.forget()
    cache.check(torch.randn(2, 4, 1, 16))
    for mine, before in zip(cache.state, grown, strict=True):
        torch.testing.assert_close(mine, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("again", [1, 3, 30])
@pytest.mark.parametrize("geometry", [SMALL, TOKENS], ids=["pooled", "tokens"])
def test_a_cache_that_was_cut_back_is_noticed(again, geometry):
    cache = Cache(operator, [100, 90], geometry=geometry)
    cache.grow(1)
    cache.crop(25)
    cache.grow(again, 1)


@pytest.mark.parametrize("geometry", [SMALL, TOKENS, EIGHT_BITS["fp8"]], ids=["pooled", "tokens", "fp8"])
def test_random_operations(geometry):
    torch.manual_seed(3)
    for _ in range(10):
        starts = torch.randint(0, 30, (3,)).tolist()
        lengths = [start + int(torch.randint(0, 90, ())) for start in starts]
        cache = Cache(operator, lengths, starts, geometry, dense_len=70)
        for _ in range(8):
            if torch.rand(()) < 0.2:
                cache.crop(int(torch.randint(1, 40, ())))
            elif torch.rand(()) < 0.2:
                cache.forget()
            if max(cache.lengths) < 140:
                cache.grow(int(torch.randint(1, 10, ())))


def arguments(**changes):
    geometry = changes.pop("geometry", SMALL)
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 8)
    names = (*(each.name for each in scorer_of(geometry).state(geometry, 64, 16, k.dtype)), "filled")
    state = dict(zip(names, decode.new_state(k, geometry), strict=True))
    state |= {name: changes.pop(name) for name in names if name in changes}
    given = {"q": q, "k": k, "v": v, "state": list(state.values())}
    call = {"lengths": torch.tensor([60, 50]), "scale": 0.25, "dense_len": 0, "geometry": geometry}
    call |= {name: changes.pop(name) for name in ARGUMENTS if name in changes and name not in given}
    assert not set(changes) - set(given)
    return (*(given | changes).values(), *DecodeCall(**call).arguments)


BAD = {
    "rank": ({"q": torch.zeros(2, 4, 16)}, ShapeError, "q has shape"),
    "dtype": ({"v": torch.zeros(2, 2, 64, 8).half()}, DtypeError, "q is torch.float32 and v is torch.float16"),
    "more queries than slots": ({"q": torch.zeros(2, 4, 65, 16)}, ShapeError, "raise the cache's capacity"),
    "no query": ({"q": torch.zeros(2, 4, 0, 16)}, ShapeError, "at least one token"),
    "short k1": ({"k1": torch.zeros(2, 2, 14, 16)}, ShapeError, "k1 has shape .*at least 15, .*make a new state"),
    "short k2": ({"k2": torch.zeros(2, 2, 2, 16)}, ShapeError, "k2 has shape .*at least 3"),
    "k1 of another batch": ({"k1": torch.zeros(3, 2, 15, 16)}, ShapeError, "k1 has shape"),
    "k1 dtype": ({"k1": torch.zeros(2, 2, 15, 16).half()}, DtypeError, "k1 is torch.float16 and k torch.float32"),
    "k1 device": ({"k1": torch.zeros(2, 2, 15, 16, device="meta")}, DeviceError, "k1 is on meta"),
    "k1 strides": ({"k1": torch.zeros(2, 2, 16, 15).transpose(2, 3)}, ShapeError, "k1 has strides"),
    "filled dtype": ({"filled": torch.zeros(2).long()}, DtypeError, "filled is torch.int64: expected torch.int32"),
    "filled shape": ({"filled": torch.zeros(1).int()}, ShapeError, r"filled has shape \(1,\).*one number a row, \[2\]"),
    "filled strides": ({"filled": torch.zeros(4).int()[::2]}, ShapeError, "filled has stride 2"),
    "lengths dtype": ({"lengths": torch.zeros(2)}, DtypeError, "lengths is torch.float32"),
    "lengths shape": ({"lengths": torch.tensor(3)}, ShapeError, r"lengths has shape \(\): expected one number, \[1\]"),
    "lengths of three": ({"lengths": torch.zeros(3).int()}, ShapeError, r"one a row, \[2\]"),
    "lengths device": ({"lengths": torch.zeros(2, device="meta").int()}, DeviceError, "lengths is on meta"),
    "starts shape": ({"starts": torch.zeros(2, 1).int()}, ShapeError, "starts has shape"),
    "key_mask dtype": ({"key_mask": torch.ones(2, 64)}, DtypeError, "key_mask is torch.float32: expected torch.bool"),
    "key_mask shape": ({"key_mask": torch.ones(2, 63).bool()}, ShapeError, r"key_mask has shape .* = \[2, 64\]"),
    "key_mask device": (
        {"key_mask": torch.ones(2, 64, device="meta").bool()},
        DeviceError,
        "key_mask is on meta and q on cpu",
    ),
    "window": ({"window": 0}, ShapeError, "window=0"),
    "short ki": (
        {"geometry": TOKENS, "ki": torch.zeros(2, 2, 63, 12)},
        ShapeError,
        "ki has shape .*, 12\\] with n at least 64, .*make a new state",
    ),
    "ki of other channels": ({"geometry": TOKENS, "ki": torch.zeros(2, 2, 64, 13)}, ShapeError, "ki has shape"),
    "ki dtype": (
        {"geometry": EIGHT_BITS["int8"], "ki": torch.zeros(2, 2, 64, 12)},
        DtypeError,
        "ki is torch.float32 and k torch.float32: make the state for",
    ),
    "scales in half": (
        {"geometry": EIGHT_BITS["fp8"], "ki_scale": torch.zeros(2, 2, 64).half()},
        DtypeError,
        "ki_scale is torch.float16",
    ),
    "a channel too many": (
        {"geometry": replace(TOKENS, channels=((3, 16),))},
        ShapeError,
        "channels are 3-3\\+16-16: expected different numbers in ascending order, below head_dim 16",
    ),
    "three sets of channels": (
        {"geometry": replace(TOKENS, channels=((3,), (4,), (5,)))},
        ShapeError,
        "expected one set, or one for each of the 2 key/value heads",
    ),
    "no channels": ({"geometry": replace(TOKENS, channels=())}, ShapeError, "channels are none: expected one set"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_before_anything_is_written(case):
    changes, error, message = BAD[case]
    given = arguments(**changes)
    for state in given[3]:
        state.copy_(torch.full(state.shape, 7.0))
    with pytest.raises(error, match=message):
        decode.decode_attention(*given)
    assert all(bool((state.float() == 7).all()) for state in given[3] if state.device.type == "cpu")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("geometry", [SMALL, TOKENS, EIGHT_BITS["int8"]], ids=["pooled", "tokens", "int8"])
def test_opcheck(padded, geometry):
    changes = {"starts": torch.tensor([0, 9]), "key_mask": torch.rand(2, 64) < 0.8} if padded else {}
    changes["geometry"] = geometry
    torch.library.opcheck(decode.decode_attention.default, arguments(**changes))


def test_a_compiled_step_writes_the_state():
    def step(q, k, v, lengths, *state):
        return decode.decode_attention(q, k, v, list(state), *DecodeCall(lengths, 0.25, 0, SMALL).arguments)

    q, k, v, state, lengths = arguments()[:5]
    for each in state:
        each.zero_()
    given = (q, k, v, lengths, *state)
    expected = [tensor.clone() for tensor in given]
    result = step(*expected)
    versions = [each._version for each in state]
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    for mine, other in zip((*actual, *state), (*result, *expected[4:]), strict=True):
        assert torch.equal(mine, other)
    assert state[2].tolist() == [60, 50]
    assert all(each._version > before for each, before in zip(state, versions, strict=True))


def test_the_default_geometry_at_length():
    cache = Cache(operator, [8300], geometry=BlockGeometry(), capacity=8400, group=3, dim=64, value_dim=64, scale=0.125)
    cache.grow(1, 2, bound=2e-5)
