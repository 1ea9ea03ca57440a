"""The body of the ONNX operator, run alone by ONNX Runtime, against the float64 oracle."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper  # noqa: E402

from infllm_pass.kernels import reference  # noqa: E402
from infllm_pass.kernels.geometry import BlockGeometry  # noqa: E402
from infllm_pass.lowering.export.onnx.body import attention_function  # noqa: E402
from infllm_pass.lowering.export.onnx.op_spec import DOMAIN, NAME, VERSION, AttentionNode  # noqa: E402
from tests.support.common import relative_error  # noqa: E402

SMALL = BlockGeometry(kernel_size=4, kernel_stride=2, block_size=8, init_blocks=1, local_blocks=2, selected_blocks=5)
"""Five blocks of eight in all: above 40 tokens the selection leaves keys out."""

TOKENS = replace(SMALL, scorer="tokens", channels=((1, 2, 7, 15),))

DENSE_LEN = 64
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


def model(node: AttentionNode, *, dtype=torch.float32, opset=18):
    """A model of one node with all sizes dynamic."""
    kind = TYPES[dtype]
    types = {
        "q": (kind, ["b", "hq", "lq", "d"]),
        "k": (kind, ["b", "hkv", "lk", "d"]),
        "v": (kind, ["b", "hkv", "lk", "dv"]),
        "key_mask": (TensorProto.BOOL, ["b", "lk"]),
        "offset": (TensorProto.INT64, ["rows"]),
        "key_bias": (TensorProto.FLOAT, ["bias_b", "bias_h", "lk"]),
        "sinks": (TensorProto.FLOAT, ["hq"]),
    }
    inputs = [helper.make_tensor_value_info(name, *types[name]) for name in node.inputs]
    output = helper.make_tensor_value_info("out", kind, ["b", "hq", "lq", "dv"])
    call = helper.make_node(NAME, node.inputs, ["out"], domain=DOMAIN, **node.attributes)
    built = helper.make_model(
        helper.make_graph([call], "attention", inputs, [output]),
        functions=[onnx_ir.to_proto(attention_function(node, opset))],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(built, full_check=True)
    onnx.shape_inference.infer_shapes(built, check_type=True, strict_mode=True, data_prop=True)
    return built


def session(built, **options):
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(built.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def run(runtime, q, k, v, key_mask=None, offset=None, key_bias=None, sinks=None):
    feeds = {"q": q, "k": k, "v": v, "key_mask": key_mask, "offset": offset, "key_bias": key_bias, "sinks": sinks}
    return torch.from_numpy(runtime.run(None, {name: x.numpy() for name, x in feeds.items() if x is not None})[0])


def oracle(node, q, k, v, key_mask=None, offset=None, key_bias=None, sinks=None):
    common = {
        "geometry": node.geometry,
        "scale": node.scale,
        "offset": k.shape[2] - q.shape[2] if offset is None else 0,
        "offsets": None if offset is None else torch.tensor([int(offset)]),
        "key_mask": key_mask,
        "dense_len": node.dense_len,
        "window": node.window or None,
        "softcap": node.softcap,
    }
    selected = reference.select_blocks(q, k, **common)
    return reference.attention(q, k, v, selected, **common, key_bias=key_bias, sinks=sinks)[0]


def tensors(batch, heads, length_q, length_k, dim=16, dim_v=12, dtype=torch.float32):
    heads_q, heads_kv = heads
    shapes = (heads_q, length_q, dim), (heads_kv, length_k, dim), (heads_kv, length_k, dim_v)
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def real_queries(key_mask, length_q, offset):
    """Queries that stand in their row's sequence, ``[B, 1, Lq, 1]``; what the others give is free."""
    first, end = reference.sequence_bounds(key_mask)
    place = offset + torch.arange(length_q)
    return ((place >= first[:, None]) & (place < end[:, None]))[:, None, :, None]


VARIANTS = {
    "plain": (SMALL, {}),
    "exact-lse": (replace(SMALL, lse="exact"), {}),
    "tiles-of-four": (replace(SMALL, query_block=4), {}),
    "window": (SMALL, {"window": 30}),
    "long-kernels": (replace(SMALL, kernel_size=8), {}),
    "kernels-that-do-not-overlap": (replace(SMALL, kernel_size=2), {}),
    "always-sparse": (SMALL, {"dense_len": 0}),
    "tokens": (TOKENS, {}),
    "tokens, all-channels, window": (replace(TOKENS, channels=(tuple(range(16)),)), {"window": 30}),
    "tokens, tiles-of-four, int8": (replace(TOKENS, query_block=4, score_dtype="int8"), {"dense_len": 0}),
    "tokens, fp8": (replace(TOKENS, score_dtype="fp8", block_size=12), {}),
}
LENGTHS = (1, 5, 37, 63, 64, 131, 300)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_on_both_sides_of_dense_len(variant, opset):
    geometry, options = VARIANTS[variant]
    node = AttentionNode(geometry, scale=0.3, **{"dense_len": DENSE_LEN, **options})
    runtime = session(model(node, opset=opset))
    for heads, length in itertools.product([(2, 2), (6, 2), (4, 1)], LENGTHS):
        q, k, v = tensors(2, heads, length, length)
        assert relative_error(run(runtime, q, k, v), oracle(node, q, k, v)) <= 1e-5, (heads, length)


TERMS = {
    "cap": (SMALL, {"softcap": 0.7}, None, False),
    "bias of rows and heads": (SMALL, {}, (2, 2), False),
    "bias of keys, window": (SMALL, {"window": 30}, (1, 1), False),
    "sinks": (replace(SMALL, lse="exact"), {}, None, True),
    "all, tokens": (TOKENS, {"softcap": 0.7}, (1, 2), True),
    "all, tiles-of-four": (replace(SMALL, query_block=4), {"softcap": 0.7}, (2, 1), True),
}


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "key-mask"])
@pytest.mark.parametrize("case", TERMS)
def test_score_terms(case, masked):
    geometry, options, bias, sunk = TERMS[case]
    node = AttentionNode(
        geometry, scale=0.3, dense_len=DENSE_LEN, masked=masked, biased=bias is not None, sunk=sunk, **options
    )
    runtime = session(model(node))
    for heads, length in (((6, 2), 37), ((6, 2), 131), ((2, 2), 150)):
        q, k, v = tensors(2, heads, length, length)
        key_mask = None
        if masked:
            key_mask = torch.ones(2, length, dtype=torch.bool)
            key_mask[0, :13] = False
            key_mask[1, 20:23] = False
        terms = {}
        if bias is not None:
            terms["key_bias"] = torch.randn(*bias, length) * 2
            terms["key_bias"][..., 5::7] = -torch.inf
        if sunk:
            terms["sinks"] = torch.randn(heads[0]) * 2
            terms["sinks"][1] = -torch.inf
        out = run(runtime, q, k, v, key_mask, **terms)
        assert torch.isfinite(out).all()
        real = torch.tensor(True) if key_mask is None else real_queries(key_mask, length, 0)
        assert relative_error(out * real, oracle(node, q, k, v, key_mask, **terms) * real) <= 1e-5, (heads, length)
        plain = oracle(replace(node, softcap=0.0), q, k, v, key_mask)
        assert relative_error(out * real, plain * real) > 1e-2


def test_a_row_with_nothing_but_its_sink_gives_zero():
    node = AttentionNode(SMALL, scale=0.3, dense_len=DENSE_LEN, sunk=True)
    q, k, v = tensors(1, (2, 2), 30, 20)
    out = run(session(model(node)), q, k, v, sinks=torch.randn(2))
    assert torch.equal(out[:, :, :10], torch.zeros(1, 2, 10, 12))


def test_the_switch_is_at_dense_len():
    node = AttentionNode(SMALL, scale=0.3, dense_len=DENSE_LEN)
    runtime = session(model(node))
    dense = replace(node, dense_len=10**6)
    for length, sparse in ((DENSE_LEN - 1, False), (DENSE_LEN, True)):
        q, k, v = tensors(1, (4, 2), length, length)
        error = relative_error(run(runtime, q, k, v), oracle(dense, q, k, v))
        assert (error > 1e-2) == sparse


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "key-mask"])
def test_chunks_and_decode_steps(variant, masked):
    geometry, options = VARIANTS[variant]
    node = AttentionNode(geometry, scale=0.3, masked=masked, placed=True, **{"dense_len": DENSE_LEN, **options})
    runtime = session(model(node))
    for length_q, length_k, offset in ((1, 200, 199), (45, 211, 166), (50, 200, 97), (37, 37, 0), (1, 40, 39)):
        q, k, v = tensors(2, (6, 2), length_q, length_k)
        key_mask = None
        real = torch.tensor(True)
        if masked:
            key_mask = torch.ones(2, length_k, dtype=torch.bool)
            key_mask[0, :13] = False
            key_mask[1, 20:23] = False
            real = real_queries(key_mask, length_q, offset)
        where = torch.tensor([offset])
        out = run(runtime, q, k, v, key_mask, where)
        assert relative_error(out * real, oracle(node, q, k, v, key_mask, offset) * real) <= 1e-5, (length_q, length_k)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_rows_take_their_own_side(variant):
    geometry, options = VARIANTS[variant]
    node = AttentionNode(geometry, scale=0.3, masked=True, **{"dense_len": DENSE_LEN, **options})
    runtime = session(model(node))
    for length in (70, 133, 260):
        q, k, v = tensors(5, (6, 2), length, length)
        key_mask = torch.ones(5, length, dtype=torch.bool)
        key_mask[0, :30] = False  # left padding; shorter than dense_len at 70
        key_mask[1, length - 9 :] = False
        key_mask[2, 40:47] = False  # a hole
        key_mask[3] = False  # no valid key at all
        out = run(runtime, q, k, v, key_mask)
        assert torch.isfinite(out).all()
        real = real_queries(key_mask, length, 0)
        assert relative_error(out * real, oracle(node, q, k, v, key_mask) * real) <= 1e-5


def test_every_head_has_channels_of_its_own():
    geometry = replace(TOKENS, channels=((0, 3, 4), (1, 2, 15)))
    for kept in ("key", "int8"):
        node = AttentionNode(replace(geometry, score_dtype=kept), scale=0.3, dense_len=0)
        q, k, v = tensors(2, (6, 2), 150, 150)
        got = run(session(model(node)), q, k, v)
        assert relative_error(got, oracle(node, q, k, v)) <= 1e-5
        swapped = replace(node, geometry=replace(node.geometry, channels=geometry.channels[::-1]))
        assert relative_error(got, oracle(swapped, q, k, v)) > 1e-2


def test_every_row_has_its_own_offset():
    node = AttentionNode(replace(SMALL, query_block=2), scale=0.3, dense_len=DENSE_LEN, placed=True)
    runtime = session(model(node))
    q, k, v = tensors(3, (4, 2), 41, 150)
    offsets = torch.tensor([0, 57, 109])
    out = run(runtime, q, k, v, offset=offsets)
    expected = torch.cat([oracle(node, *(x[row, None] for x in (q, k, v)), offset=offsets[row]) for row in range(3)])
    assert relative_error(out, expected) <= 1e-5


def test_queries_before_the_first_key_give_zero():
    node = AttentionNode(SMALL, scale=0.3, dense_len=DENSE_LEN)
    q, k, v = tensors(1, (2, 2), 30, 20)
    out = run(session(model(node)), q, k, v)
    assert torch.equal(out[:, :, :10], torch.zeros(1, 2, 10, 12))
    assert relative_error(out, oracle(node, q, k, v)) <= 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("geometry", [SMALL, TOKENS], ids=["pooled", "tokens"])
def test_selected_blocks_are_those_of_the_oracle(dtype, geometry):
    """Values that name their block turn the output into the set of blocks that a query visits."""
    length = 331
    node = AttentionNode(geometry, scale=0.3, dense_len=DENSE_LEN)
    blocks = SMALL.num_blocks(length)
    q, k, _ = tensors(2, (6, 2), length, length, dtype=dtype)
    k = k / 3  # flat attention, so that no visited block has a weight of 0
    names = torch.eye(blocks)[torch.arange(length) // SMALL.block_size]
    v = names.expand(2, 2, -1, -1).to(dtype).contiguous()
    visited = run(session(model(node, dtype=dtype)), q, k, v).reshape(2, 2, 3, length, blocks).amax(2) > 0
    expected = reference.select_blocks(q, k, geometry=geometry, scale=node.scale, offset=0)
    decided = decided_queries(q, k, node)
    assert decided.float().mean() > 0.9
    assert torch.equal(visited & decided[..., None], expected & decided[..., None])
    assert expected.sum(-1).amax() < blocks


def decided_queries(q, k, node):
    """Queries whose lowest taken score is clear of the next one by more than rounding, ``[B, Hkv, Lq]``."""
    g = node.geometry
    rows = []
    for row in range(q.shape[0]):
        scores = reference.block_scores(q[row], k[row], geometry=g, scale=node.scale, offset=0)
        own = torch.arange(q.shape[2])[:, None] // g.block_size
        block = torch.arange(scores.shape[-1])
        free = (block >= g.init_blocks) & (block < own - g.local_blocks)
        ranked = scores.masked_fill(~free, -torch.inf).sort(-1, descending=True).values
        count = g.selected_blocks - g.init_blocks - g.local_blocks - 1
        taken, left = ranked[..., count - 1], ranked[..., count]
        # Neighbouring blocks share a compressed key: equal scores go to the lower block, and are decided.
        rows.append((taken == left) | (left == -torch.inf) | (taken - left > 1e-3 * taken))
    return torch.stack(rows)


def test_half_precision():
    node = AttentionNode(SMALL, scale=0.3, dense_len=DENSE_LEN)
    runtime = session(model(node, dtype=torch.float16))
    for length in (37, 300):
        q, k, v = tensors(2, (6, 2), length, length, dtype=torch.float16)
        out = run(runtime, q, k, v)
        assert out.dtype == torch.float16
        assert relative_error(out, oracle(node, q, k, v)) <= 1e-3


def test_scores_beyond_the_range_of_half_precision():
    node = AttentionNode(SMALL, scale=1.0, dense_len=0)
    q, k, v = tensors(1, (2, 1), 100, 100, dtype=torch.float16)
    out = run(session(model(node, dtype=torch.float16)), q * 100, k * 100, v)  # scores of 1e5
    assert torch.isfinite(out).all()
    assert out.abs().amax() > 0


@pytest.mark.parametrize(
    "scorer", [{}, {"scorer": "tokens", "channels": (tuple(range(16)),)}], ids=["pooled", "tokens"]
)
def test_no_tensor_is_quadratic(tmp_path, scorer):
    """Sizes of everything that ONNX Runtime computes at 4096 tokens, inside loops and branches too."""
    length = 4096
    node = AttentionNode(BlockGeometry(local_blocks=8, selected_blocks=16, **scorer), scale=0.125, dense_len=0)
    runtime = session(model(node), enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    q, k, v = tensors(1, (4, 2), length, length, 32, 32)
    run(runtime, q, k, v)
    with open(runtime.end_profiling()) as stream:
        events = json.load(stream)
    sizes = [int(event["args"]["output_size"]) for event in events if "output_size" in event.get("args", {})]
    assert len(sizes) > 1000
    assert max(sizes) < length * length  # bytes: less than a quarter of float32 scores of one head


def test_a_node_says_what_it_computes():
    node = AttentionNode(SMALL, scale=0.25, dense_len=DENSE_LEN, window=30)
    built = model(node)
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in built.graph.node[0].attribute}
    assert found["scale"] == 0.25
    assert found["window"] == 30
    assert found["selected_blocks"] == 5
    assert found["lse"] == b"coarse"
    assert (found["plugin_namespace"], found["plugin_version"]) == (b"infllm", b"1")
    operators = {inner.op_type for inner in walk(built.functions[0].node)}
    assert {"If", "Loop", "TopK"} <= operators
    assert {inner.domain for inner in walk(built.functions[0].node)} == {""}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_body_holds_for_every_dtype_and_repeats_no_name(variant):
    geometry, options = VARIANTS[variant]
    node = AttentionNode(geometry, scale=0.3, masked=True, placed=True, **{"dense_len": DENSE_LEN, **options})
    body = onnx_ir.to_proto(attention_function(node, 18))
    nodes = list(walk(body.node))
    graphs = [attribute.g for inner in nodes for attribute in inner.attribute if attribute.HasField("g")]
    assert not any(scope.value_info for scope in (body, *graphs))  # types would be those of one dtype
    names = [name for inner in nodes for name in inner.output]
    assert len(set(names)) == len(names)
    assert not any(inner.metadata_props for inner in nodes)
    assert sum(inner.op_type == "CastLike" for inner in nodes) <= 3  # no constant's type is left to run time


def walk(nodes):
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from walk(attribute.g.node)
