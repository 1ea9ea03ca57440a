"""The operator in ATen operators and loops, run as it is, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infllm_pass.kernels import reference
from infllm_pass.lowering import traced
from infllm_pass.lowering.operators import selection_arguments

from .conftest import SMALL, relative_error

VARIANTS = {
    "coarse": SMALL,
    "exact": replace(SMALL, lse="exact"),
    "shared": replace(SMALL, query_block=4),
    "wide windows": replace(SMALL, kernel_size=8),
    "always": replace(SMALL, kernel_size=2, topk=5, init_blocks=2, dense_len=0),
}


def both(config, q, k, v, *, key_mask=None, offsets=None, offset=None, window=None):
    """What the traced form gives, and the reference's."""
    call = (q, k, v, key_mask, offsets, offset, window, 0.7, config.dense_len)
    got = traced.switchable_attention(*call, *selection_arguments(config.geometry))
    first = k.shape[2] - q.shape[2] if offset is None else offset
    common = {
        "geometry": config.geometry,
        "scale": 0.7,
        "offset": 0 if offsets is not None else first,
        "key_mask": key_mask,
        "offsets": offsets,
        "window": window,
        "dense_len": config.dense_len,
    }
    selected = reference.select_blocks(q, k, **common)
    return got, reference.attention(q, k, v, selected, **common)[0]


def tensors(length_q, length_k, dtype=torch.float32):
    q = torch.randn(2, 6, length_q, 8, dtype=dtype)
    return q, torch.randn(2, 2, length_k, 8, dtype=dtype), torch.randn(2, 2, length_k, 12, dtype=dtype)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (63, 63), (1, 150), (37, 200), (433, 433)])
def test_lengths(name, length_q, length_k):
    got, expected = both(VARIANTS[name], *tensors(length_q, length_k))
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("name", ["coarse", "shared"])
@pytest.mark.parametrize("window", [None, 43])
def test_padding_and_windows(name, window):
    key_mask = torch.rand(2, 200) > 0.2
    key_mask[0, :150] = False  # shorter than dense_len
    got, expected = both(VARIANTS[name], *tensors(200, 200), key_mask=key_mask, window=window)
    valid = expected.ne(0).any(-1)
    assert relative_error(got[valid], expected[valid]) <= 1e-5
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("starts", [[0], [150], [20, 149], [-3, 40]])
@pytest.mark.parametrize("length_q", [1, 5])
def test_caches_with_spare_capacity(starts, length_q):
    q, k, v = tensors(length_q, 170)
    got, expected = both(SMALL, q, k, v, offsets=torch.tensor(starts))
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    got, expected = both(SMALL, *tensors(130, 130, dtype))
    assert got.dtype == dtype
    assert relative_error(got, expected) <= 1e-2


class LargestTensor(TorchDispatchMode):
    """The largest tensor that is made, in bytes, inside loops too."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.higher_order.while_loop:
            going_on, body, carried, more = args
            with self:
                while going_on(*carried, *more):
                    carried = body(*carried, *more)
            return carried
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_is_quadratic():
    length = 8192
    config = replace(SMALL, kernel_size=32, kernel_stride=16, block_size=64, window_size=512, topk=8, dense_len=0)
    q, k, v = (torch.randn(1, heads, length, 16) for heads in (2, 1, 1))
    call = (q, k, v, None, None, None, None, 0.25, 0)
    with LargestTensor() as largest:
        traced.switchable_attention(*call, *selection_arguments(config.geometry))
    assert 2**20 < largest.bytes < length * length  # a quarter of float32 scores of one head
