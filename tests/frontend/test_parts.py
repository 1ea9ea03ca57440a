"""Code that calls parts of a sparsified model, replaces its forward, or wraps a model that generates."""

from __future__ import annotations

import copy
import functools
import itertools
import types
import warnings

import pytest
import torch
from torch import nn

import infllm_pass
from infllm_pass.errors import UncompiledCallError, UncompiledCallWarning, UncompiledGenerateWarning
from tests.support.common import SMALL, llama, oracle_attention, relative_error, tokens

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def sparsified(model, strict=True):
    return infllm_pass.sparsify(torch.compile(model, backend="eager"), SMALL, strict=strict)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


PARTS = {"model": lambda model: model.model, "base_model": lambda model: model.base_model}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("length", [50, 80])
def test_a_part_called_by_itself_is_sparse_with_the_oracle_s_gradients(name, length):
    plain, ids = llama(num_hidden_layers=1).train(), tokens(length)
    model = sparsified(plain)
    with oracle_attention(SMALL):
        hidden = plain.model(ids).last_hidden_state
        expected = hidden.detach(), gradients(plain, hidden.square().sum())
    part = PARTS[name](model)
    hidden = part(ids).last_hidden_state
    assert relative_error(hidden, expected[0]) < 1e-8
    assert relative_error(gradients(plain, hidden.square().sum()), expected[1]) < 1e-7
    (site,) = infllm_pass.report(model).sites
    assert (site.decision, site.branch) == ("switchable", "sparse" if length >= SMALL.dense_len else "dense")


def test_a_part_is_what_it_is_in_the_original():
    plain = llama(num_hidden_layers=1)
    model = sparsified(plain)
    part = model.model
    assert part == plain.model == part
    assert hash(part) == hash(plain.model)
    assert isinstance(part, type(plain.model))
    assert part.__class__ is type(plain.model)
    assert model.model is part
    assert model.lm_head is plain.lm_head
    assert part.embed_tokens is plain.model.embed_tokens
    assert part.layers is plain.model.layers
    part.mark = 3
    assert plain.model.mark == 3
    assert model.eval().model.training is plain.model.training is False
    copied = copy.deepcopy(part)
    assert type(copied) is type(plain.model)
    assert copied.embed_tokens.weight is not plain.model.embed_tokens.weight
    assert dict(part.named_parameters()).keys() == dict(plain.model.named_parameters()).keys()


def test_a_class_given_to_a_part_is_given_to_the_original():
    """As sharding does."""
    plain = llama(num_hidden_layers=1)
    part = sparsified(plain).model
    kind = type("Sharded", (type(plain.model),), {})
    part.__class__ = kind
    assert type(plain.model) is kind
    assert isinstance(part, kind)


def test_parts_follow_dense_mode():
    plain, ids = llama(num_hidden_layers=1), tokens(80)
    model = sparsified(plain)
    with torch.no_grad(), infllm_pass.dense_mode(model):
        assert relative_error(model.model(ids).last_hidden_state, plain.model(ids).last_hidden_state) < 1e-10


def loss_from_hidden_states(model, backbone="base_model"):
    """Put a forward into a model that calls its backbone and computes a loss of its own, if it is asked to."""
    forward = model.forward

    @functools.wraps(type(model).forward)
    def replaced(self, *args, own_loss=False, **kwargs):
        if not own_loss:
            return forward(*args, **kwargs)
        hidden = getattr(self, backbone)(*args, **kwargs).last_hidden_state
        return self.get_output_embeddings()(hidden).square().mean()

    model.forward = types.MethodType(replaced, model)


def test_a_replaced_forward_that_calls_the_backbone_trains_sparse():
    plain, ids = llama(num_hidden_layers=1).train(), tokens(80)
    model = sparsified(plain)
    with oracle_attention(SMALL):
        logits = plain(ids).logits
        expected = logits.detach(), gradients(plain, logits.square().mean())
    loss_from_hidden_states(model)
    assert relative_error(gradients(plain, model(ids, own_loss=True)), expected[1]) < 1e-7
    assert infllm_pass.report(model).switchable == 1
    assert relative_error(model(ids).logits, expected[0]) < 1e-8
    del model.forward
    assert relative_error(model(ids).logits, expected[0]) < 1e-8
    assert infllm_pass.report(model).uncompiled_calls == {}


@pytest.mark.parametrize("strict", [False, True])
def test_a_replaced_forward_that_goes_around_the_compiled_parts_is_noticed(strict):
    plain, ids = llama(num_hidden_layers=1), tokens(80)
    model = sparsified(plain, strict)
    model.forward = lambda ids: plain.model(ids).last_hidden_state
    if strict:
        with pytest.raises(UncompiledCallError, match="forward of the sparsified model was replaced"):
            model(ids)
    else:
        with pytest.warns(UncompiledCallWarning, match="forward of the sparsified model was replaced"):
            model(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids)
    assert infllm_pass.report(model).uncompiled_calls == {"FORWARD_REPLACED": 1 if strict else 2}


class Wrapper(nn.Module):
    """Hands ``generate`` on to the model inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.config = module.config

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.module.generate(*args, **kwargs)


class Delegating(Wrapper):
    """Hands all that it lacks on to the model inside."""

    generate = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


del Delegating.generate


class Hidden(Wrapper):
    """Keeps the model where no attribute leads to it."""

    def __init__(self, module):
        super().__init__(module)
        self.kept = [module]

    def generate(self, *args, **kwargs):
        return self.kept[0].generate(*args, **kwargs)


WRAPPERS = {
    "wrapper": Wrapper,
    "twice": lambda model: Wrapper(Wrapper(model)),
    "by __getattr__": lambda model: Wrapper(Delegating(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_a_wrapper_that_hands_generate_on_generates_sparse(wrapper):
    plain, ids = llama(num_hidden_layers=1), tokens(80).clamp(min=1)
    with oracle_attention(SMALL):
        expected = plain.generate(ids, **GREEDY)
    assert not torch.equal(plain.generate(ids, **GREEDY), expected)
    model = sparsified(WRAPPERS[wrapper](plain))
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert {site.reason for site in infllm_pass.report(model).sites} == {"SWITCHABLE"}
    assert model._infllm_handle.calls == 4


@torch.no_grad()
def test_a_wrapper_whose_model_cannot_be_reached_says_so():
    model = sparsified(Hidden(llama(num_hidden_layers=1)))
    with pytest.warns(UncompiledGenerateWarning, match="sparsify the part of it that generates"):
        model.generate(tokens(80).clamp(min=1), **GREEDY)


@pytest.fixture
def adapted():
    """A Llama with an adapter, and the function that makes what it should compute, from plain weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    settings = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(num_hidden_layers=1, pad_token_id=0), settings)
    model.add_adapter("other", settings)
    return model.double().eval()


def by_oracle(model, call):
    with oracle_attention(SMALL):
        return call(model)


@pytest.mark.parametrize("where", ["around the adapter", "inside"])
@torch.no_grad()
def test_an_adapter_switched_disabled_and_merged_generates_sparse(where, adapted):
    ids, plain = tokens(80).clamp(min=1), copy.deepcopy(adapted)
    if where == "inside":
        adapted.base_model.model = sparsified(adapted.base_model.model)
        model, rows = adapted, adapted.base_model.model
    else:
        model = rows = sparsified(adapted)

    def call(it):
        return it(input_ids=ids).logits, it.generate(input_ids=ids, **GREEDY)

    def compare():
        expected, actual = by_oracle(plain, call), call(model)
        assert relative_error(actual[0], expected[0]) < 1e-8
        assert torch.equal(actual[1], expected[1])
        return actual[0]

    seen = [compare()]
    for it in (plain, model):
        it.set_adapter("other")
    seen.append(compare())
    with plain.disable_adapter(), model.disable_adapter():
        seen.append(compare())
    for it in (plain, model):
        it.merge_adapter()
    merged = compare()
    for it in (plain, model):
        it.unmerge_adapter()
    assert relative_error(compare(), merged) < 1e-8
    assert all(relative_error(a, b) > 1e-3 for a, b in itertools.pairwise(seen))
    assert {site.reason for site in infllm_pass.report(rows).sites} == {"SWITCHABLE"}
    assert infllm_pass.report(rows).uncompiled_calls == {}


def test_an_adapter_trains_with_the_oracle_s_gradients(adapted):
    ids, plain = tokens(80), copy.deepcopy(adapted)
    model = sparsified(adapted)
    expected = by_oracle(plain, lambda it: gradients(it, it(input_ids=ids, labels=ids).loss))
    actual = gradients(adapted, model(input_ids=ids, labels=ids).loss)
    assert relative_error(actual, expected) < 1e-7


@pytest.mark.filterwarnings("ignore")
def test_trl_s_trainer_trains_sparse(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.support.tokenizers import byte_tokenizer

    plain = llama(num_hidden_layers=1, vocab_size=512, pad_token_id=0).float().train()
    rows = datasets.Dataset.from_dict({"input_ids": [tokens(length).clamp(min=1)[0].tolist() for length in (80, 70)]})
    model = sparsified(plain)
    settings = trl.SFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=byte_tokenizer()).train()
    assert {site.reason for site in infllm_pass.report(model).sites} == {"SWITCHABLE"}
    assert infllm_pass.report(model).uncompiled_calls == {}
