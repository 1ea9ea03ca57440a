"""Scripts that make a failure of the pass happen again: small, whole, and failing in the same place."""

from __future__ import annotations

import builtins
import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import infllm_pass
from infllm_pass.compat.logging import counter
from infllm_pass.errors import InternalError, InternalErrorWarning
from infllm_pass.graph.buffers import closed_form
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.rules.registry import RULES
from infllm_pass.rewrite.replay import Example
from infllm_pass.rewrite.source_text import Unwritable, literal, reference
from tests.support.common import SMALL, llama, tokens

SHOWN = "It did when this file was written."

PROVOKED = """
import runpy, sys
from infllm_pass.graph.op_table import Kind
from infllm_pass.masks.rules.registry import RULES

def fail(interpreter, example, **arguments):
    raise ZeroDivisionError("injected")

if sys.argv[2] == "provoked":
    RULES[Kind.LE] = fail
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def fail(interpreter, example, **arguments):
    raise ZeroDivisionError("injected")


@contextlib.contextmanager
def failing(*kinds):
    """Rules of the prover that fail instead of answering."""
    before = dict(RULES)
    try:
        RULES.update(dict.fromkeys(kinds, fail))
        yield
    finally:
        RULES.update(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INFLLM_DEBUG_DUMP", str(tmp_path / "dump"))
    return tmp_path / "dump"


def compiled(model, *inputs, dynamic=None, **options):
    """Call a model whose graphs fail, and return the text of the warning, its report and its result."""
    torch.compiler.reset()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager", dynamic=dynamic), SMALL, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = sparse(*inputs)
    texts = [str(each.message) for each in caught if each.category is InternalErrorWarning]
    return "\n".join(texts), infllm_pass.report(sparse), result


def masked(q, k, v, scale=0.7):
    """A causal flag, then a causal mask that is built in the graph."""
    x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = F.layer_norm(x, x.shape[-1:])
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(x, k, v, attn_mask=i[None, :] <= i[:, None], scale=scale)


def qkv(length=100):
    return tuple(torch.randn(1, 2, length, 8) for _ in range(3))


def scripts(folder):
    return sorted(folder.iterdir())


def run(script, provoked, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(PROVOKED)
    command = [sys.executable, str(driver), str(script), "provoked" if provoked else "as it is"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=dict(os.environ))


def test_a_failure_leaves_a_script_that_fails_in_the_same_place(folder, tmp_path):
    with failing(Kind.LE):
        text, report, _ = compiled(masked, *qkv(), dynamic=True)
    (script,) = scripts(folder)
    assert str(script) in text
    assert [row.reproducer for row in report.sites] == ["", str(script)]
    source = script.read_text()
    assert SHOWN in source
    assert "layer_norm" not in source  # nothing that the failing site does not need
    assert "Example((1, 2, 100, 8), torch.float32)" in source  # the symbols are the sizes of the call
    again = run(script, True, tmp_path)
    assert again.returncode == 1
    assert "InternalError" in again.stderr
    assert "ZeroDivisionError: injected" in again.stderr
    assert "in _apply_rule" in again.stderr
    clean = run(script, False, tmp_path)
    assert clean.returncode == 0, clean.stderr
    assert clean.stdout == "the pass did not fail\n"
    assert scripts(folder) == [script]  # a script leaves no script


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("INFLLM_DEBUG_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    with failing(Kind.LE):
        text, report, _ = compiled(masked, *qkv())
    assert "injected" in text
    assert "script" not in text
    assert [row.reproducer for row in report.sites] == ["", ""]
    assert not list(tmp_path.iterdir())


def test_without_a_failure_nothing_is_written(folder):
    _, report, _ = compiled(masked, *qkv())
    assert report.switchable == 2
    assert not folder.exists()


def test_one_script_for_one_place(folder):
    def layers(q, k, v):
        return masked(masked(q, k, v), k, v, scale=0.5)

    counter("infllm").clear()
    with failing(Kind.LE):
        _, report, _ = compiled(layers, *qkv())
    assert counter("infllm")["graphs"] == 1  # those that were tried are not counted
    (script,) = scripts(folder)
    assert [row.reproducer for row in report.sites] == ["", str(script)] * 2


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INFLLM_DEBUG_DUMP", str(tmp_path / "file"))
    with failing(Kind.LE):
        text, report, result = compiled(masked, *(inputs := qkv(30)))
    assert "none could be written" in text
    assert "none could be written" in report.sites[1].reproducer
    torch.testing.assert_close(result, masked(*inputs))


def test_strict_raises_and_leaves_the_script(folder):
    with failing(Kind.LE), pytest.raises(InternalError):
        compiled(masked, *qkv(), strict=True)
    (script,) = scripts(folder)
    assert SHOWN in script.read_text()


class Held(nn.Module):
    """Parameters, and a mask in a buffer."""

    def __init__(self, length=100):
        super().__init__()
        self.project = nn.Linear(16, 16)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril())

    def forward(self, x):
        q, k, v = (self.project(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for _ in range(3))
        hidden = torch.zeros(x.shape[1], x.shape[1]).masked_fill(~self.mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)


class Handwritten(nn.Module):
    def forward(self, x):
        q = k = v = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        i = torch.arange(x.shape[1])
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~(i[None, :] <= i[:, None]), float("-inf"))
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(x.shape)


class Checkpointed(nn.Module):
    """The site is in a graph nested in another one."""

    def __init__(self):
        super().__init__()
        self.inner = Handwritten()

    def forward(self, x):
        return checkpoint(self.inner, x * 2, use_reentrant=False)


class Written(nn.Module):
    """Keys are written to a tensor in place."""

    def forward(self, x):
        q = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        keys = torch.zeros_like(q)
        keys[:, :, 5:] = q[:, :, 5:]
        i = torch.arange(x.shape[1])
        return F.scaled_dot_product_attention(q, keys, keys, attn_mask=i[None, :] <= i[:, None])


class Vmapped(nn.Module):
    """The mask is made by a function of two indices, as libraries build them."""

    def forward(self, x):
        q = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        i = torch.arange(x.shape[1])
        rows = torch.vmap(torch.vmap(lambda a, b: b <= a, (None, 0)), (0, None))(i, i)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=rows)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Held, Kind.MASKED_FILL),
        (Handwritten, Kind.LE),
        (Checkpointed, Kind.LE),
        (Written, Kind.LE),
        (Vmapped, Kind.LE),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value.name,
)
def test_models_of_all_kinds_fail_again(folder, model, kind):
    with failing(kind):
        text, _, _ = compiled(model(), torch.randn(1, 100, 16))
    (script,) = scripts(folder)
    assert str(script) in text
    source = script.read_text()
    assert SHOWN in source
    assert "linear(" not in source
    namespace = {"__name__": "reproducer"}
    exec(compile(source, str(script), "exec"), namespace)
    assert [row.decision for row in namespace["reproduce"]().sites] == ["switchable"]


def test_a_layer_of_a_transformer_is_cut_out(folder):
    model = llama(attn_implementation="eager")
    with failing(Kind.LE):
        compiled(model, tokens(100))
    (script,) = scripts(folder)
    source = script.read_text()
    assert SHOWN in source
    print(source)
    assert source.count("g.call(") + source.count("g.method(") < 80  # its rotary embedding and mask included
    assert "embedding" not in source


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(9, 9, dtype=torch.bool).tril(),
        torch.ones(1, 1, 6, 9).tril(2),
        torch.full((4, 7), float("-inf")).triu(1),
        torch.arange(11) * 3 + 2,
        torch.arange(11).expand(2, 1, 11).contiguous(),
        torch.tensor([0, 0, 0, 1, 1, 5, 5]),
        torch.full((2, 3), 0.25),
        torch.tensor(2.5),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_held_values_come_back(tensor):
    form = closed_form(tensor)
    assert form is not None
    made = Example(tuple(tensor.shape), tensor.dtype).real(form)
    assert made.dtype == tensor.dtype
    assert torch.equal(made, tensor)


@pytest.mark.parametrize(
    "target",
    [
        torch.arange,
        torch.add,
        F.scaled_dot_product_attention,
        F.linear,
        torch.Tensor.add,
        torch.ops.aten.add.Tensor,
        torch._C._functorch._vmap_increment_nesting,
        torch.ops.higher_order.tag_activation_checkpoint,
        max,
        subprocess.run,
    ],
    ids=lambda target: getattr(target, "__name__", str(target)),  # without addresses
)
def test_targets_are_found_by_their_names(target):
    assert eval(reference(target), {"torch": torch, "subprocess": subprocess, "builtins": builtins}) is target


@pytest.mark.parametrize("value", [lambda x: x, object(), [object()]], ids=["lambda", "object", "nested"])
def test_what_no_script_can_hold_is_refused(value):
    with pytest.raises(Unwritable):
        literal(value, {})


def test_arguments_come_back():
    values = (1, 2.5, float("inf"), float("-inf"), None, ..., "a'b", (1,), [slice(None, 2, None)], {"a": torch.float16})
    values += (torch.device("cpu"), torch.strided, torch.channels_last, True)
    assert eval(literal(values, {}), {"torch": torch}) == values
