"""The C++ kernel of packages for the CPU, built as Inductor builds it, against the float64 reference."""

import ctypes
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infllm_pass.kernels import reference
from infllm_pass.kernels.cpu import native
from infllm_pass.lowering.inductor import cpp_extern
from tests.support.common import SMALL, TOKENS, relative_error

VARIANTS = {
    "coarse": SMALL,
    "exact": replace(SMALL, lse="exact"),
    "shared": replace(SMALL, query_block=4),
    "wide windows": replace(SMALL, kernel_size=8),
    "always": replace(SMALL, kernel_size=2, topk=5, init_blocks=2, dense_len=0),
    "odd blocks": replace(SMALL, kernel_size=6, kernel_stride=3, block_size=21, window_size=21, topk=2, query_block=3),
}

VARIANTS |= {
    "tokens": TOKENS,
    "tokens, shared, int8": replace(TOKENS, query_block=4, score_dtype="int8"),
    "tokens, odd blocks, fp8": replace(VARIANTS["odd blocks"], scorer="tokens", score_dtype="fp8"),
}
CHANNELS = ((0, 2, 3, 7), (1, 4, 5, 6))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def kernels():
    """The kernel for each pair of a dtype and one of offsets."""
    return built([(dtype, index) for dtype in native.DTYPES for index in cpp_extern.INDEX_DTYPES])


def built(types, missing=()):
    """The kernels for pairs of dtypes, as Inductor compiles them, for a processor without some instructions."""
    from torch._inductor.codecache import CppCodeCache

    wrapper = Wrapper()
    names = {each: cpp_extern.kernel_name(wrapper, *each) for each in types}
    guard = "#ifndef INFLLM_SWITCHABLE_ATTENTION_H\n"
    source = "\n".join(wrapper.src_to_kernel)
    assert guard in source
    library = CppCodeCache.load(source.replace(guard, "".join(f"#undef {name}\n" for name in missing) + guard))
    return {each: getattr(library, name) for each, name in names.items()}


class Wrapper:
    """What the kernel needs of Inductor's writer of code."""

    def __init__(self):
        self.src_to_kernel = {}

    def define_kernel(self, name, source, *, gpu, cpp_definition):
        assert name in source
        assert not gpu
        assert cpp_definition.rstrip(";\n") in source


def geometry_of(config, q):
    """The geometry; token scores read half of the channels, each of two heads its own."""
    return config.geometry_for(q.shape[3], CHANNELS)


def run(kernels, config, q, k, v, *, key_mask=None, offsets=None, offset=None, window=None, terms=None):
    """The kernel's result for tensors; where nothing is written it holds NaN."""
    first = (0 if offsets is not None else k.shape[2] - q.shape[2]) if offset is None else offset
    numbers = cpp_extern.call_numbers(
        *(tensor.shape for tensor in (q, k, v)),
        *(tensor.stride() for tensor in (q, k, v)),
        first,
        cpp_extern.fixed_numbers(window, config.dense_len, geometry_of(config, q)),
    )
    sets = geometry_of(config, q).channels
    channels = torch.tensor(sets, dtype=torch.int32)
    out = torch.full((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), torch.nan, dtype=q.dtype)
    index = torch.int64 if offsets is None else offsets.dtype
    terms = terms or {}
    bias, sinks = terms.get("key_bias"), terms.get("sinks")
    strides = [0, 0]
    if bias is not None:
        strides = [bias.stride(dim) if bias.shape[dim] > 1 else 0 for dim in (0, 1)]
    kernels[q.dtype, index](
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_double(0.7),
        ctypes.c_double(terms.get("softcap", 0.0)),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (q, k, v, key_mask, offsets)),
        ctypes.c_int64(0 if offsets is None else offsets.shape[0]),
        ctypes.c_void_p(channels.data_ptr() if sets else None),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        (ctypes.c_int64 * 2)(*strides),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (sinks, out)),
    )
    return out.transpose(1, 2)


def expect(config, q, k, v, *, key_mask=None, offsets=None, offset=None, window=None, terms=None):
    """The reference's result."""
    first = k.shape[2] - q.shape[2] if offset is None else offset
    common = {
        "geometry": geometry_of(config, q),
        "scale": 0.7,
        "offset": 0 if offsets is not None else first,
        "key_mask": key_mask,
        "offsets": offsets,
        "window": window,
        "dense_len": config.dense_len,
        **(terms or {}),
    }
    selected = reference.select_blocks(q, k, **common)
    return reference.attention(q, k, v, selected, **common)[0]


def tensors(length_q, length_k, dtype=torch.float32, dim=8, dim_v=12):
    q = torch.randn(2, 6, length_q, dim, dtype=dtype)
    return q, torch.randn(2, 2, length_k, dim, dtype=dtype), torch.randn(2, 2, length_k, dim_v, dtype=dtype)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (63, 63), (1, 150), (37, 200), (433, 433), (900, 901)])
def test_lengths(kernels, name, length_q, length_k):
    q, k, v = tensors(length_q, length_k)
    assert relative_error(run(kernels, VARIANTS[name], q, k, v), expect(VARIANTS[name], q, k, v)) <= 1e-5


@pytest.mark.parametrize("missing", [["__AVX512F__"], ["__AVX512F__", "__FMA__", "__AVX__"]], ids=["AVX2", "SSE"])
def test_narrower_vectors(missing):
    kernels = built([(torch.float32, torch.int64)], missing)
    for name, config in VARIANTS.items():
        q, k, v = tensors(433, 433, dim_v=65)
        error = relative_error(run(kernels, config, q, k, v), expect(config, q, k, v))
        assert error <= 1e-5, name
        terms = TERMS["all"](433)
        error = relative_error(run(kernels, config, q, k, v, terms=terms), expect(config, q, k, v, terms=terms))
        assert error <= 1e-5, f"{name} with terms"


def _all_terms(length):
    bias = torch.randn(1, 2, length)
    bias[..., 5::9] = -torch.inf
    return {"softcap": 1.5, "key_bias": bias, "sinks": torch.randn(6)}


TERMS = {
    "cap": lambda _: {"softcap": 0.9},
    "bias of rows": lambda length: {"key_bias": torch.randn(2, 1, length)},
    "sinks": lambda _: {"sinks": torch.tensor([2.0, -1.0, 0.0, -torch.inf, 30.0, -200.0])},
    "all": _all_terms,
}


@pytest.mark.parametrize("name", ["coarse", "shared", "odd blocks", "tokens"])
@pytest.mark.parametrize("terms", TERMS)
def test_score_terms(kernels, terms, name):
    """One row of the batch is dense; a window, holes in the mask, and free slots of a cache."""
    key_mask = torch.rand(2, 200) > 0.2
    key_mask[0, :150] = False
    q, k, v = tensors(200, 200)
    own = TERMS[terms](200)
    for place in ({"key_mask": key_mask, "window": 90}, {"offsets": torch.tensor([0, -60])}):
        expected = expect(VARIANTS[name], q, k, v, terms=own, **place)
        assert relative_error(run(kernels, VARIANTS[name], q, k, v, terms=own, **place), expected) <= 1e-5
        plain = run(kernels, VARIANTS[name], q, k, v, **place)
        assert relative_error(plain, expected) > 1e-2


@pytest.mark.parametrize(("cap", "scale"), [(50.0, 1.0), (3.0, 3.0), (2.0, 300.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_caps_are_exact_near_zero_and_far_from_it(kernels, dtype, cap, scale):
    """Two keys of one query: the weight of a key says what its logit was."""
    logits = scale * torch.linspace(-1, 1, 65, dtype=torch.float64)
    q, k = torch.zeros(65, 1, 2, 1, dtype=dtype), torch.zeros(65, 1, 2, 1, dtype=dtype)
    q[:], k[:, 0, 1, 0] = 1.0, (logits / 0.7).to(dtype)
    v = torch.zeros_like(k)
    v[:, 0, 1] = 1.0
    got = run(kernels, SMALL, q, k, v, terms={"softcap": cap})[:, 0, 1, 0].double()
    wanted = cap * torch.tanh(0.7 * k[:, 0, 1, 0].double() / cap)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.logit(got), wanted, rtol=0, atol=10 * eps)


@pytest.mark.parametrize("group", [1, 7, 16])
@pytest.mark.parametrize(("dim", "dim_v"), [(1, 1), (65, 64), (100, 256)])
def test_heads(kernels, group, dim, dim_v):
    q = torch.randn(1, 2 * group, 190, dim) * dim**-0.5
    k, v = torch.randn(1, 2, 190, dim), torch.randn(1, 2, 190, dim_v)
    assert relative_error(run(kernels, SMALL, q, k, v), expect(SMALL, q, k, v)) <= 1e-5


@pytest.mark.parametrize("name", ["coarse", "shared", "odd blocks", "tokens", "tokens, shared, int8"])
@pytest.mark.parametrize("window", [None, 43, 90])
def test_padding_and_windows(kernels, name, window):
    key_mask = torch.rand(2, 200) > 0.2
    key_mask[0, :150] = False  # shorter than dense_len
    q, k, v = tensors(200, 200)
    expected = expect(VARIANTS[name], q, k, v, key_mask=key_mask, window=window)
    got = run(kernels, VARIANTS[name], q, k, v, key_mask=key_mask, window=window)
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize(("batch", "length_q", "length_k"), [(0, 5, 5), (2, 0, 0), (2, 0, 90), (2, 5, 0)])
def test_nothing_to_attend_to(kernels, batch, length_q, length_k):
    q, k, v = (x[:batch] for x in tensors(length_q, length_k))
    assert not run(kernels, SMALL, q, k, v, offset=0).any()


def test_rows_without_a_key(kernels):
    q, k, v = tensors(70, 70)
    key_mask = torch.zeros(2, 70, dtype=torch.bool)
    assert not run(kernels, SMALL, q, k, v, key_mask=key_mask).any()


@pytest.mark.parametrize("starts", [[0], [150], [20, 149], [-3, 40]])
@pytest.mark.parametrize("length_q", [1, 5])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_caches_with_spare_capacity(kernels, starts, length_q, index):
    q, k, v = tensors(length_q, 170)
    offsets = torch.tensor(starts, dtype=index)
    expected = expect(SMALL, q, k, v, offsets=offsets)
    free = torch.arange(170) >= offsets.expand(2)[:, None] + length_q  # [B, Lk]
    for cache in (k, v):
        cache.masked_fill_(free[:, None, :, None], torch.nan)
    assert relative_error(run(kernels, SMALL, q, k, v, offsets=offsets), expected) <= 1e-5


def test_strides(kernels):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(150, 150))
    packed = torch.cat((k, v), dim=3)
    k, v = packed[..., :8], packed[..., 8:]
    assert relative_error(run(kernels, SMALL, q, k, v), expect(SMALL, q, k, v)) <= 1e-5


@pytest.mark.parametrize("offset", [-20, 0, 30])
def test_offsets_that_are_numbers(kernels, offset):
    q, k, v = tensors(100, 130)
    expected = expect(SMALL, q, k, v, offset=offset)
    assert relative_error(run(kernels, SMALL, q, k, v, offset=offset), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernels, dtype):
    q, k, v = tensors(130, 130, dtype)
    got = run(kernels, SMALL, q, k, v)
    assert got.dtype == dtype
    assert relative_error(got, expect(SMALL, q, k, v)) <= 1e-2


def test_logits_far_apart(kernels):
    q, k, v = tensors(60, 60)  # below dense_len: scores that far apart are beyond float32
    assert relative_error(run(kernels, SMALL, 300 * q, k, v), expect(SMALL, 300 * q, k, v)) <= 1e-4


def test_the_same_for_any_number_of_threads(kernels):
    q, k, v = tensors(900, 900)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(kernels, SMALL, q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux")
def test_memory_is_linear(kernels):
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    length = 16384
    config = replace(SMALL, kernel_size=32, kernel_stride=16, block_size=64, window_size=512, topk=8, dense_len=0)
    q, k, v = (torch.randn(1, heads, length, 16) for heads in (2, 1, 1))
    run(kernels, config, q[:, :, :64], k[:, :, :64], v[:, :, :64])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    run(kernels, config, q, k, v)
    assert peak() - before < length * length // 16  # bytes: a sixteenth of a mask
