"""Each private API that ``infllm_pass/compat`` wraps has the form that is relied on, in the versions installed."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import logging as stdlib_logging
import pickle
import shutil
import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, fx, nn
from torch.nn.parallel import DistributedDataParallel

from infllm_pass.compat import (
    aten,
    checkpointing,
    ddp,
    dynamo,
    inductor,
    logging,
    module_state,
    shapes,
    tensors,
    torch_tensorrt,
    transformers,
    trees,
)
from infllm_pass.compat import fx as graphs
from tests.support import ROOT

COMPAT = ROOT / "infllm_pass" / "compat"
CHECKS: dict[str, Callable[[], None]] = {}


def checks(*names: str):
    """Register a check of functions of compat, by ``module.name``."""

    def register(function):
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return register


def public_names() -> set[str]:
    """What the modules of compat offer: functions, and what ``__all__`` lists besides."""
    found = set()
    for path in COMPAT.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.add(f"{path.stem}.{node.name}")
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= {f"{path.stem}.{name}" for name in ast.literal_eval(node.value)}
    return found


def traced(function, *args, look=lambda module: module, **options):
    """The graph that Dynamo makes of a call, or what `look` sees there while it is compiled."""
    seen = []

    def backend(module, inputs):
        seen.append(look(module))
        return module.forward

    torch.compile(function, backend=backend, **options)(*args)
    return seen[0]


def placeholders(module):
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def symbolic_size():
    module = traced(lambda x: x + x.shape[0], torch.ones(5), dynamic=True)
    return next(value for node in placeholders(module) if isinstance(value := node.meta["example_value"], torch.SymInt))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return x * self.factor


# checkpointing


def checkpointed(body, **options):
    """The graph of a function that calls another one checkpointed."""
    return traced(lambda x: torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False, **options).sum(), inputs())


def inputs():
    return torch.linspace(0.0, 1.0, 5, requires_grad=True)


def exp_is_saved():
    """Contexts that a user wrote, in a form that AOTAutograd's cache takes."""
    return torch.utils.checkpoint.create_selective_checkpoint_contexts([torch.ops.aten.exp.default])


exp_is_saved.cache_hash = "written"


@checks("checkpointing.checkpointed_bodies", "checkpointing.save_results")
def checkpointing_results():
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd import autograd_cache

    for options, saved in (({}, {"sigmoid"}), ({"context_fn": exp_is_saved}, {"sigmoid", "exp"})):
        module = checkpointed(lambda x: x.sigmoid().exp().tanh(), **options)
        (body,) = checkpointing.checkpointed_bodies(module)
        checkpointing.save_results(body, frozenset([torch.ops.aten.sigmoid.default]))
        if not options:
            pickle.dumps(body.meta)  # a graph that does not pickle is compiled anew in every process
        (known,) = autograd_cache._collect_context_fn_hashes(module)
        assert "sigmoid" in known
        assert ("written" in known) == bool(options)
        graphs = []

        def keep(graph, _inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        x = inputs()
        module = aot_autograd(fw_compiler=keep, bw_compiler=keep)(module, [x])
        module(x)[0].backward()
        again = {node.target.__name__.partition(".")[0] for node in graphs[1].graph.nodes if callable(node.target)}
        assert {"sigmoid", "exp"} - again == saved


@checks("checkpointing.traces_writes")
def traces_writes():
    module = checkpointed(lambda x: x.sin().mul_(2).exp())
    checkpointing.save_results(checkpointing.checkpointed_bodies(module)[0], frozenset([torch.ops.aten.sin.default]))
    if checkpointing.traces_writes():
        from torch._dynamo.backends.debugging import aot_eager

        x = inputs()
        aot_eager(module, [x])(x)[0].backward()
        assert torch.allclose(x.grad, 2 * x.cos() * (2 * x.sin()).exp())


@checks("checkpointing.saves_quietly")
def saves_quietly():
    from torch._higher_order_ops import wrap

    for options, told in (({}, 0), ({"context_fn": exp_is_saved}, 1)):
        module = checkpointed(lambda x: x.sin().exp(), **options)
        checkpointing.save_results(checkpointing.checkpointed_bodies(module)[0], frozenset())
        heard = []
        handler = stdlib_logging.Handler()
        handler.emit = heard.append
        wrap.log.addHandler(handler)
        wrap.warning_once.cache_clear()
        with checkpointing.saves_quietly(module):
            module(inputs())
        wrap.log.removeHandler(handler)
        assert len(heard) == told
        assert wrap.log.filters == []


# tensors


@checks("tensors.storage_id")
def storage_id():
    x = torch.ones(4)
    with tensors.FakeTensorMode():
        fake = torch.ones(4)
        assert tensors.storage_id(fake) == tensors.storage_id(fake[1:]) != tensors.storage_id(torch.ones(4))
    assert tensors.storage_id(x) == tensors.storage_id(x.view(2, 2)) != tensors.storage_id(x.clone())


@checks("tensors.version_of")
def version_of():
    x = torch.ones(4)
    before = tensors.version_of(x)
    x[1:].add_(1)
    assert tensors.version_of(x) == before + 1


@checks("tensors.have_tangents")
def tangents():
    x = torch.ones(4)
    assert not tensors.have_tangents([x])
    with torch.autograd.forward_ad.dual_level():
        assert not tensors.have_tangents([x, 3])
        assert tensors.have_tangents([x, torch.autograd.forward_ad.make_dual(x, x)])


@checks("tensors.base_of")
def base_of():
    x = torch.ones(4)
    assert tensors.base_of(x) is x
    assert tensors.base_of(x[1:][1:]) is x


@checks("tensors.unwrap_functorch")
def unwrap_functorch():
    x, seen = torch.ones(3, 2), []

    def inner(row):
        seen.append((type(row), tensors.storage_id(tensors.unwrap_functorch(row))))
        return row

    torch.vmap(torch.vmap(inner))(x)
    assert seen[0][1] == tensors.storage_id(x)
    assert tensors.unwrap_functorch(x) is x


@checks("tensors.without_modes", "tensors.FakeTensorMode", "tensors.fake_mode_of", "tensors.detect_fake_mode")
@checks("tensors.FakeTensor", "tensors.current_mode")
def modes():
    assert tensors.current_mode() is None
    with tensors.FakeTensorMode() as mode:
        fake = torch.ones(2)
        assert isinstance(fake, tensors.FakeTensor)
        assert tensors.current_mode() is mode
        with tensors.without_modes():
            assert float(torch.ones(2).sum()) == 2.0
    assert tensors.fake_mode_of(fake) is mode is tensors.detect_fake_mode([fake])
    assert tensors.fake_mode_of(torch.ones(2)) is None is tensors.detect_fake_mode([torch.ones(2)])


@checks("tensors.TorchDispatchMode")
def dispatch_mode():
    seen = []

    class Recorder(tensors.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2).add(1)
    assert torch.ops.aten.add.Tensor in seen


@checks("tensors.FunctionalTensor", "tensors.FunctionalTensorMode")
def functional_tensors():
    seen = []

    @torch.library.triton_op("infllm_test::traced", mutates_args=())
    def traced_operator(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(x))
        return x.clone()

    def rule(mode, operator, types, args, kwargs):
        seen.append(type(mode))
        return mode.__torch_dispatch__(operator, types, args, kwargs)

    library = torch.library.Library("infllm_test", "FRAGMENT")
    library.define("ruled(Tensor x) -> Tensor")
    library.impl("ruled", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_torch_dispatch("infllm_test::ruled", tensors.FunctionalTensorMode, rule, lib=library)
    torch.compile(lambda x: torch.ops.infllm_test.ruled(x) + 1, backend="aot_eager")(torch.ones(2))
    assert tensors.FunctionalTensorMode in seen
    torch.compile(lambda x: traced_operator(x) + 1, backend="aot_eager")(torch.ones(2))
    assert tensors.FunctionalTensor in seen, seen


# shapes


@checks("shapes.expression_of", "shapes.hint_of", "shapes.number_hint")
def symbols():
    size = symbolic_size()
    assert shapes.expression_of(size).is_Symbol
    assert shapes.hint_of(size) == shapes.number_hint(size) == 5


@checks("shapes.free_unbacked_symbols", "shapes.statically_known_true", "shapes.is_concrete_int")
def knowledge():
    size = symbolic_size()
    assert not shapes.free_unbacked_symbols(size)
    assert shapes.is_concrete_int(3)
    assert not shapes.is_concrete_int(size)
    assert shapes.statically_known_true(size >= 0)
    assert not shapes.statically_known_true(size >= 100)


@checks("shapes.declared_sizes")
def declared():
    seen = []

    def lengths(module, _inputs):
        length = next(node.meta["example_value"] for node in module.graph.nodes if node.op.startswith("call")).shape[0]
        seen.append((shapes.declared_sizes(length), length.node.expr))
        return module.forward

    x = torch.ones(5, 7)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    torch.compile(lambda x: x + 1, backend=lengths)(x)
    ((declared, length),) = seen
    assert declared == {length}


@checks("shapes.GuardOnDataDependentSymNode")
def data_dependent():
    def grown(x):
        return x.repeat(x[0].item())

    def comparing(module, _inputs):
        unbacked = [node.meta["example_value"] for node in module.graph.nodes if node.op == "call_method"]
        with pytest.raises(shapes.GuardOnDataDependentSymNode):
            bool(unbacked[-1].shape[0] > 77)
        return module.forward

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert torch.compile(grown, backend=comparing)(torch.tensor([3, 1])).shape == (6,)


@checks("shapes.ConstraintViolationError", "dynamo.UserError")
def refused_exports():
    class Fixed(nn.Module):
        def forward(self, x):
            return x + torch.ones(4)

    with pytest.raises((shapes.ConstraintViolationError, dynamo.UserError)):
        torch.export.export(Fixed(), (torch.ones(4),), dynamic_shapes=({0: torch.export.Dim("n", max=9)},))


@checks("dynamo.RestartAnalysis")
def traced_once_more():
    graphs = []
    raised = torch._dynamo.exc.TensorifyScalarRestartAnalysis
    assert issubclass(raised, dynamo.RestartAnalysis)

    def backend(module, _example):
        graphs.append(module)
        if len(graphs) == 1:
            raise raised
        return module.forward

    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).sum() == 4
    assert len(graphs) == 2


# fx


@checks("fx.is_erased", "fx.rename")
def nodes():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graphs.rename(x, "z")
    assert x.name == "z"
    assert not graphs.is_erased(y)
    graph.erase_node(y)
    assert graphs.is_erased(y)


@checks("fx.make_fx")
def make_fx():
    module = graphs.make_fx(lambda x: F.relu(x) + 1, pre_dispatch=True)(torch.ones(2))
    assert torch.ops.aten.add.Tensor in [node.target for node in module.graph.nodes]


# trees


@checks("trees.reorder_kwargs", "trees.tree_leaves", "trees.tree_structure", "trees.treespec_loads")
def structures():
    from torch.utils._pytree import treespec_dumps

    spec = trees.tree_structure(((1,), {"a": 2, "b": [3, 4]}))
    assert trees.treespec_loads(treespec_dumps(spec)) == spec
    assert list(trees.reorder_kwargs({"b": [3, 4], "a": 2}, spec)) == ["a", "b"]
    assert trees.tree_leaves(((1,), {"a": 2})) == [1, 2]


# aten


@checks("aten.ATTENTION_BUILTIN", "aten.PAD_BUILTIN", "aten.SCALAR_TENSOR", "aten.SET_GRAD_ENABLED")
def functions_of_dynamo():
    def calls(x, number):
        with torch.no_grad():
            x = x + torch.tensor(number)
        return F.pad(F.scaled_dot_product_attention(x, x, x), (0, 1))

    module = traced(calls, torch.ones(1, 1, 4, 8), 2.5, dynamic=True)
    targets = [node.target for node in module.graph.nodes]
    for target in (aten.ATTENTION_BUILTIN, aten.PAD_BUILTIN, aten.SCALAR_TENSOR, aten.SET_GRAD_ENABLED):
        assert target in targets, f"{target} is not among {targets}"


@checks("aten.ENCODER_LAYER")
def fused_encoder_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    with torch.no_grad():
        module = traced(layer, torch.ones(1, 3, 8))
    assert aten.ENCODER_LAYER in [node.target for node in module.graph.nodes]


@checks("aten.ADD_BATCH_DIM", "aten.REMOVE_BATCH_DIM")
def functions_of_vmap():
    module = traced(torch.vmap(lambda x: x + 1), torch.ones(3))
    targets = [node.target for node in module.graph.nodes]
    assert aten.ADD_BATCH_DIM in targets, targets
    assert aten.REMOVE_BATCH_DIM in targets, targets


@checks("aten.operator_name", "aten.returns_values", "aten.is_mutable", "aten.OpOverload")
def schemas():
    overload = torch.ops.aten.add_.Tensor
    assert isinstance(overload, aten.OpOverload)
    assert aten.operator_name(overload) == "add_"
    assert aten.returns_values(overload)
    assert not aten.returns_values(torch.ops.aten._assert_async.msg)
    assert aten.is_mutable(overload)
    assert not aten.is_mutable(torch.ops.aten.add.Tensor)
    assert not aten.is_mutable(torch.relu)


@checks("aten.registered_name")
def registered_names():
    assert aten.registered_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"
    assert aten.registered_name(torch.ops.aten.add) == "aten.add"
    wrapped = torch.ops.higher_order.tag_activation_checkpoint
    assert aten.registered_name(wrapped) == "higher_order.tag_activation_checkpoint"
    assert aten.registered_name(torch.add) is None


@checks("aten.written_values")
def written():
    assert aten.written_values(torch.ops.aten.add_.Tensor, ("x", "y"), {}) == ["x", None]
    assert aten.written_values(torch.ops.aten.add.out, ("x", "y"), {"out": "z"}) == ["z"]


@checks("aten.keeps_operators")
def exporting():
    seen = []

    @torch.library.triton_op("infllm_test::exported", mutates_args=())
    def exported(x: torch.Tensor) -> torch.Tensor:
        seen.append(aten.keeps_operators())
        return x.clone()

    class Calls(nn.Module):
        def forward(self, x):
            return exported(x) + 1

    program = torch.export.export(Calls(), (torch.ones(2),))
    assert torch.ops.infllm_test.exported.default in [node.target for node in program.graph.nodes]
    torch.compile(Calls(), backend="aot_eager")(torch.ones(2))
    assert False in seen


# dynamo


@checks("dynamo.OptimizedModule", "dynamo.uncompiled", "dynamo.compile_context", "dynamo.repeats", "dynamo.backend_of")
def wrappers():
    def plain(x):
        return x + 1

    def backend(module, inputs):
        return module.forward

    module = nn.Linear(2, 2)
    for original in (plain, module):
        assert dynamo.compile_context(original) is None
        assert dynamo.uncompiled(original) is original
        compiled = torch.compile(original, backend=backend)
        context = dynamo.compile_context(compiled)
        assert dynamo.uncompiled(compiled) is original
        assert dynamo.repeats(context)
        assert dynamo.backend_of(context).compiler_fn is backend
    assert isinstance(torch.compile(module), dynamo.OptimizedModule)
    assert not dynamo.repeats(dynamo.compile_context(torch.compile(plain, disable=True)) or object())


@checks("dynamo.repeated_arguments", "dynamo.recompile_limit")
def arguments():
    def keep(entries):
        return [True for _ in entries]

    options = {"fullgraph": True, "dynamic": True}
    known = torch.compile.__kwdefaults__ or {}
    if "recompile_limit" in known:
        options["recompile_limit"] = 3
    compiled = torch.compile(lambda x: x + 1, options={"guard_filter_fn": keep}, **options)
    found = dynamo.repeated_arguments(dynamo.compile_context(compiled))
    assert found == {**options, "options": {"guard_filter_fn": keep}}
    for name in ("shapes_spec", "dynamic_shapes"):
        if name in known:
            shaped = torch.compile(lambda x: x + 1, **{name: {"x": {0: torch.export.Dim.DYNAMIC}}})
            assert name in dynamo.repeated_arguments(dynamo.compile_context(shaped))
    assert dynamo.recompile_limit() > 0


@checks("dynamo.is_disabled")
def marks():
    assert dynamo.is_disabled(torch.compiler.disable(lambda x: x))
    assert not dynamo.is_disabled(marks)


@checks("dynamo.compiled_call", "dynamo.is_compiled", "dynamo.without_compiled_call", "dynamo.compile_plain")
def modules_compiled_by_themselves():
    def in_place(module):
        module.compile(backend="eager")

    def by_forward(module):
        module.forward = torch.compile(module.forward, backend="eager")

    def kept(graphs, graph, _inputs):
        graphs.append(graph)
        return graph.forward

    for way in (in_place, by_forward):
        module, graphs = nn.Linear(2, 2), []
        assert dynamo.compiled_call(module) is None
        assert not dynamo.is_compiled(module)
        assert dynamo.without_compiled_call(module) is module
        way(module)
        assert dynamo.compile_context(dynamo.compiled_call(module)) is not None
        assert dynamo.is_compiled(module)
        plain = dynamo.without_compiled_call(module)
        assert plain.weight is module.weight
        assert plain._compiled_call_impl is None
        assert dynamo.compile_context(plain.forward) is None
        compiled = dynamo.compile_plain(module, backend=functools.partial(kept, graphs))
        compiled(torch.ones(1, 2))
        assert len(graphs) == 1, "its own compilation ran instead"
        assert compiled._orig_mod is module
    assert dynamo.is_compiled(torch.compile(nn.Linear(2, 2)))


@checks("dynamo.stance", "dynamo.is_off", "dynamo.in_dispatch_mode")
def what_turns_dynamo_off():
    from torch.utils.flop_counter import FlopCounterMode

    assert dynamo.stance() == "default"
    with torch.compiler.set_stance("force_eager"):
        assert dynamo.stance() == "force_eager"
    assert not dynamo.is_off()
    with torch._dynamo.config.patch(disable=True):
        assert dynamo.is_off()
    assert not dynamo.in_dispatch_mode()
    with FlopCounterMode(display=False):
        assert dynamo.in_dispatch_mode()


@checks("dynamo.hits_of_recompile_limit")
def recompilations_past_the_limit():
    before = dynamo.hits_of_recompile_limit()
    with torch._dynamo.config.patch(recompile_limit=1):
        doubled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
        doubled(torch.ones(3))
        assert dynamo.hits_of_recompile_limit() == before
        doubled(torch.ones(4))
    assert dynamo.hits_of_recompile_limit() == before + 1


@checks("module_state.drop_compile_prefix", "module_state.add_compile_prefix", "module_state.asked_for_by_checkpoint")
def names_of_a_compiled_state():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    plain, asked = nn.BatchNorm1d(2), []
    compiled = torch.compile(plain, backend="eager")
    state = compiled.state_dict()
    module_state.drop_compile_prefix(state, "")
    assert state.keys() == plain.state_dict().keys()
    assert state._metadata == {"": {"version": 2}} or state._metadata[""] == plain.state_dict()._metadata[""]
    module_state.add_compile_prefix(state, "")
    assert state.keys() == compiled.state_dict().keys()
    compiled.register_state_dict_post_hook(lambda *_: asked.append(module_state.asked_for_by_checkpoint()))
    compiled.state_dict()
    get_model_state_dict(compiled)
    assert asked == [False, True]


@checks("dynamo.bound_backend")
def bound():
    assert dynamo.bound_backend("inductor").config == {}
    settings = dynamo.bound_backend("inductor", "reduce-overhead", {"max_autotune": True}).config
    assert settings["triton.cudagraphs"]
    assert settings["max_autotune"]
    module = traced(lambda x: x + 1, torch.ones(2))
    assert dynamo.bound_backend("eager")(module, [torch.ones(2)])(torch.ones(2))[0].tolist() == [2.0, 2.0]


@checks("dynamo.input_example", "dynamo.is_held_by_module", "dynamo.source_name")
def noted_on_inputs():
    module = Scaled()

    def look(graph):
        return {
            dynamo.source_name(node): (dynamo.is_held_by_module(node), dynamo.input_example(node))
            for node in placeholders(graph)
        }

    seen = traced(module, torch.ones(2), look=look)
    assert seen.pop("L['x']")[0] is False
    ((name, (held, example)),) = seen.items()
    assert "factor" in name
    assert held
    assert example is module.factor
    untraced = fx.Graph().placeholder("x")
    assert dynamo.input_example(untraced) is dynamo.source_name(untraced) is None


@checks("dynamo.add_input", "dynamo.add_static_input", "dynamo.copy_source")
def static_inputs():
    x = torch.ones(3)
    torch._dynamo.mark_static_address(x, guard=False)
    (marked,) = placeholders(traced(lambda x: x + 1, x))
    added = fx.Graph().placeholder("x")
    dynamo.add_input(added, x)
    assert added.meta == {"example_value": x}
    dynamo.add_static_input(added, x)
    assert marked.meta["tensor_dict"].items() >= added.meta["tensor_dict"].items()
    dynamo.copy_source(marked, added)
    assert added._dynamo_source is marked._dynamo_source is not None


@checks("dynamo.graph_breaks", "dynamo.latest_break")
def breaks():
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    before = dynamo.graph_breaks()
    assert dynamo.latest_break(before) == ""
    torch.compile(broken, backend="eager")(torch.ones(2))
    assert dynamo.graph_breaks() == before + 1
    line = broken.__code__.co_firstlineno + 1
    assert dynamo.latest_break(before) == f"{__file__}:{line}: Call to `torch._dynamo.graph_break()`"


@checks("ddp.split_at_buckets", "ddp.whole_graphs")
def buckets():
    with ddp.whole_graphs():
        assert torch._dynamo.config.optimize_ddp is True  # there is no process group
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert ddp.split_at_buckets(stand_in) is stand_in
        with ddp.whole_graphs():
            assert torch._dynamo.config.optimize_ddp == "no_optimization"
            assert ddp.split_at_buckets(stand_in) is stand_in
            parallel = DistributedDataParallel(torch.nn.Linear(2, 2))
            with parallel._inside_ddp_forward():
                split = ddp.split_at_buckets(stand_in)
            assert split.__self__.backend_compile_fn is stand_in
            assert split.__self__.bucket_bytes_cap == parallel.bucket_bytes_cap
        assert torch._dynamo.config.optimize_ddp is True
    finally:
        distributed.destroy_process_group()


def stand_in(module, _inputs):
    return module.forward


@checks("dynamo.compile_seconds")
def compile_seconds():
    before = dynamo.compile_seconds()
    torch.compile(lambda x: x * 3, backend="eager")(torch.ones(2))
    assert dynamo.compile_seconds() > before


# logging


@checks("logging.register_log")
def registered_log():
    logging.register_log("infllm_test", "infllm_pass.test")
    logger = stdlib_logging.getLogger("infllm_pass.test")
    try:
        torch._logging.set_logs(modules={"infllm_test": stdlib_logging.DEBUG})
        assert logger.level == stdlib_logging.DEBUG
    finally:
        torch._logging.set_logs()
    assert logger.level == stdlib_logging.NOTSET


@checks("logging.is_tracing", "logging.trace_artifact")
def structured_trace():
    records, trace = [], stdlib_logging.getLogger("torch.__trace")
    handler = stdlib_logging.Handler()
    handler.emit = records.append
    for other in (before := list(trace.handlers)):
        trace.removeHandler(other)
    try:
        logging.trace_artifact("unread", "json", lambda: 1 / 0)
        assert not logging.is_tracing()
        trace.addHandler(handler)
        assert logging.is_tracing()
        logging.trace_artifact("infllm_test", "json", lambda: {"sites": 3})
    finally:
        trace.removeHandler(handler)
        for other in before:
            trace.addHandler(other)
    (record,) = records
    assert record.metadata["artifact"] == {"name": "infllm_test", "encoding": "json"}
    assert json.loads(record.payload) == {"sites": 3}


@checks("logging.timed")
def timings():
    with logging.timed("infllm_test"):
        pass
    assert "infllm_test" in torch._dynamo.utils.compile_times()


@checks("logging.counter")
def counters():
    logging.counter("infllm_test")["graphs"] += 2
    assert torch._dynamo.utils.counters.pop("infllm_test") == {"graphs": 2}


# inductor


@checks("inductor.compiles_ahead_of_time", "inductor.records_cuda_graphs")
def compilation_that_runs():
    from torch._inductor import config
    from torch._inductor.virtualized import V

    assert not inductor.compiles_ahead_of_time()
    with V.set_aot_compilation(True):
        assert inductor.compiles_ahead_of_time()
    assert not inductor.records_cuda_graphs()
    with config.patch({"triton.cudagraphs": True}):
        assert inductor.records_cuda_graphs()


@checks("inductor.find_cpp_compiler", "inductor.compiled_cpp", "inductor.cpp_errors")
def cpp():
    assert shutil.which(inductor.find_cpp_compiler())
    library = inductor.compiled_cpp('extern "C" int answer() { return 42; }')
    assert library.answer() == 42
    with pytest.raises(inductor.cpp_errors()):
        inductor.compiled_cpp('extern "C" int answer() { return }')


@checks("inductor.compile_package", "inductor.package_errors", "inductor.load_package")
def packages():
    assert all(issubclass(error, Exception) for error in inductor.package_errors())
    assert callable(torch._inductor.aoti_compile_and_package)
    with pytest.raises((RuntimeError, OSError)):
        inductor.load_package(str(COMPAT / "missing.pt2"))


@checks("inductor.kernel_readers")
def kernel_readers():
    module, names = inductor.kernel_readers()
    assert len(names) == 1
    assert len(getattr(module, names[0]).__code__.co_varnames) >= 3


@checks("inductor_ir.ir", "inductor_ir.register_lowering", "inductor_ir.DTYPE_TO_CPP", "inductor_ir.to_dtype")
def classes_of_inductor():
    from infllm_pass.compat.inductor_ir import DTYPE_TO_CPP, ir, register_lowering, to_dtype
    from infllm_pass.lowering.inductor import cpp_extern

    assert DTYPE_TO_CPP[torch.float32] == "float"
    for name in ("ExternKernel", "ExternKernelOut", "FixedLayout", "TensorBox", "IRNode"):
        assert isinstance(getattr(ir, name), type)
    assert callable(register_lowering)
    assert list(inspect.signature(to_dtype).parameters)[:2] == ["x", "dtype"]
    assert issubclass(cpp_extern.SwitchableAttention, ir.ExternKernelOut)


# packages that are not installed everywhere


@checks("torch_tensorrt.converter_registry", "torch_tensorrt.add_lowering_pass")
def torch_tensorrt_registers():
    if importlib.util.find_spec("torch_tensorrt") is None or not torch.cuda.is_available():
        pytest.skip("torch-tensorrt imports with a GPU only")
    registry = torch_tensorrt.converter_registry()
    assert callable(registry.dynamo_tensorrt_converter)
    assert len(registry.DYNAMO_ATEN_CONVERTERS)
    torch_tensorrt.add_lowering_pass(lambda module, _: module)


@checks("transformers.cache_among")
def cache_among():
    assert transformers.cache_among({"cache": 1, "x": 2}) == ("cache", 1)
    assert transformers.cache_among({"past_key_values": 1, "cache": None}) == ("past_key_values", 1)
    assert transformers.cache_among({"x": 2})[1] is None


@checks("transformers.cache_name", "transformers.generation_hooks", "transformers.supports_sdpa")
def models():
    hf = pytest.importorskip("transformers")
    kind = hf.LlamaForCausalLM
    assert transformers.cache_name(kind) in transformers.CACHE_NAMES
    assert transformers.supports_sdpa(kind)
    assert not transformers.supports_sdpa(nn.Linear)
    called = []

    def hook(model, method, *args, **kwargs):
        called.append(method.func.__name__)
        return method(*args, **kwargs)

    hooks = transformers.generation_hooks(kind, grow=hook, prepare=hook)
    assert set(hooks) == {"_update_model_kwargs_for_generation", "_prepare_static_cache"}
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
    )
    model = type("Hooked", (kind,), hooks)(config).eval()
    model.generate(
        torch.ones(1, 3, dtype=torch.int64), max_new_tokens=3, do_sample=False, cache_implementation="static"
    )
    assert set(called) == set(hooks), f"generate called {set(called)} alone"


@checks("transformers.unpacked")
def plain_weights():
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
    )
    model = hf.LlamaForCausalLM(config)
    assert transformers.unpacked(model) is model
    model.hf_quantizer, model.is_quantized, model.quantization_method = object(), True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    plain = transformers.unpacked(model)
    assert plain.hf_quantizer is None
    assert not getattr(plain, "is_quantized", False)
    assert not hasattr(plain.config, "quantization_config")


@checks("transformers.checkpoint_hooks", "transformers.stay_on_one_gpu")
def trainers_checkpoints():
    hf = pytest.importorskip("transformers")
    called = []

    @transformers.checkpoint_hooks
    class Hooked(hf.Trainer):
        def write_checkpoint(self, write):
            called.append("write")
            write()

        def save_trained(self, folder):
            called.append("save")
            folder.mkdir(parents=True, exist_ok=True)

        def load_trained(self, folder):
            called.append(f"load {folder.name}")

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return {"loss": self.layer(x).square().mean()}

    rows = [{"x": torch.ones(2)}] * 4
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_steps": 1, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 1}
        arguments = hf.TrainingArguments(folder, use_cpu=True, max_steps=1, **options)
        transformers.stay_on_one_gpu(arguments)
        assert arguments.n_gpu <= 1
        Hooked(Line(), arguments, train_dataset=rows).train()
        arguments = hf.TrainingArguments(folder, use_cpu=True, max_steps=2, **options)
        Hooked(Line(), arguments, train_dataset=rows).train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    assert called[:2] == ["write", "save"]
    assert "load checkpoint-1" in called
    several = type("Arguments", (), {"_n_gpu": 2, "n_gpu": property(lambda self: self._n_gpu)})()
    transformers.stay_on_one_gpu(several)
    assert several.n_gpu == 1
    assert "_n_gpu" in inspect.getsource(hf.TrainingArguments.n_gpu.fget)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_form(name):
    try:
        CHECKS[name]()
    except Exception as error:
        raise AssertionError(
            f"infllm_pass.compat.{name} relies on a private API that has another form in torch {torch.__version__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def test_every_function_has_a_check():
    assert set(CHECKS) == public_names()
