"""What the TensorRT plugin does when it is enqueued: raw device pointers on a stream of somebody else."""

import pytest
import torch

from infllm_pass import SparseAttentionConfig
from infllm_pass.lowering.export import fused_op
from infllm_pass.lowering.export.onnx.op_spec import AttentionNode
from infllm_pass.lowering.export.tensorrt.plugin import DeviceMemory, run_on_stream
from infllm_pass.lowering.ops.attention_args import geometry_text

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = SparseAttentionConfig(
    kernel_size=32, kernel_stride=16, block_size=64, window_size=128, topk=4, dense_len=1024, scorer="pooled"
)
SIZES = {"geometry": CONFIG.geometry, "scale": 64**-0.5, "dense_len": CONFIG.dense_len}


def memory(tensor):
    return DeviceMemory(tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tensor.device.index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [700, 3001])
def test_enqueued_on_a_side_stream(dtype, length):
    q, k, v = (torch.randn(2, heads, length, 64, device="cuda", dtype=dtype) for heads in (6, 2, 2))
    key_mask = torch.ones(2, length, dtype=torch.bool, device="cuda")
    key_mask[0, :90] = False
    offset = torch.zeros(1, dtype=torch.int64, device="cuda")
    terms = {
        "key_bias": torch.randn(2, 2, length, device="cuda"),
        "sinks": torch.randn(6, device="cuda"),
    }
    stream = torch.cuda.Stream()
    cases = (
        (AttentionNode(**SIZES), {}, {}),
        (AttentionNode(**SIZES, masked=True, placed=True), {"key_mask": key_mask, "offset": offset}, {"offset": 0}),
        (AttentionNode(**SIZES, softcap=5.0, biased=True, sunk=True), terms, {"softcap": 5.0}),
    )
    for node, given, fields in cases:
        out = torch.full_like(q, float("nan"))
        torch.cuda.synchronize()
        inputs = [memory(x) for x in (q, k, v, *(given[name] for name in node.inputs[3:]))]
        run_on_stream(node, inputs, memory(out), stream.cuda_stream)
        stream.synchronize()
        arguments = {"key_mask": None, "key_bias": None, "sinks": None, "offsets": None, "offset": None, "window": None}
        arguments |= {"scale": node.scale, "softcap": 0.0, "dense_len": node.dense_len}
        arguments |= {"geometry": geometry_text(node.geometry)} | given | fields
        assert torch.equal(out, fused_op.switchable_attention(q, k, v, **arguments))
