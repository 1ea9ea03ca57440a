"""The evaluation of small models: what is equal, what is known, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import infllm_pass
from infllm_pass.calibration.record import key_of
from infllm_pass.errors import (
    CalibrationError,
    ConfigError,
    EvaluationError,
    NoAttentionSiteError,
    UnsupportedModelError,
)
from infllm_pass.evaluation import TaskSettings, Text, default_config
from infllm_pass.evaluation.density import density, mean_density
from infllm_pass.evaluation.results import ALL_TEXTS, DENSE
from infllm_pass.evaluation.samples import Answer, Sample
from infllm_pass.evaluation.scoring import SEGMENTS, Scorer, answer_score, scored_places
from tests.support.common import SMALL
from tests.support.tokenizers import byte_llama, byte_tokenizer

pytest.importorskip("transformers")

LENGTH = 1536
COVERING = replace(SMALL, dense_len=0, topk=LENGTH // SMALL.block_size, scorer="pooled")
SPARSE = replace(SMALL, dense_len=0, scorer="pooled")
QUICK = TaskSettings(lengths=(LENGTH,), depths=(0.2, 0.8))


@pytest.fixture(scope="module")
def model():
    return byte_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def found(model, tokenizer):
    return infllm_pass.evaluate(model, tokenizer, [COVERING, SPARSE], settings=QUICK)


def by_side(rows):
    return {side: [row for row in rows if row.side == side] for side in dict.fromkeys(row.side for row in rows)}


def test_a_budget_that_covers_the_text_gives_the_figures_of_dense(found):
    dense, covering, _ = by_side(found.perplexity).values()
    for plain, sparse in zip(dense, covering, strict=True):
        assert sparse.perplexity == pytest.approx(plain.perplexity, rel=1e-5)
        assert sparse.by_position == pytest.approx(plain.by_position, rel=1e-5)
        assert (plain.density, sparse.density) == (1.0, 1.0)
        assert abs(sparse.change) < 1e-5
    for rows in (found.tasks, found.depths):
        dense, covering, _ = by_side(rows).values()
        assert [row.exact for row in dense] == [row.exact for row in covering]
        assert [row.nll for row in covering] == pytest.approx([row.nll for row in dense], rel=1e-5)


def test_a_small_budget_gives_others(found):
    dense, _, sparse = by_side(found.perplexity).values()
    assert all(abs(row.change) > 1e-3 for row in sparse)
    assert all(row.density < 0.1 for row in sparse)
    for plain, row in zip(dense, sparse, strict=True):
        assert row.change == pytest.approx(row.perplexity / plain.perplexity - 1)
        assert row.interval[0] <= row.change <= row.interval[1]


def test_the_row_of_all_texts_is_their_geometric_mean(found):
    for rows in by_side(found.perplexity).values():
        logs = [math.log(row.perplexity) for row in rows if row.text != ALL_TEXTS]
        (mean,) = [row.perplexity for row in rows if row.text == ALL_TEXTS]
        assert mean == pytest.approx(math.exp(sum(logs) / 3))


def test_every_answer_counts_once(found):
    counts = {row.task: row.answers for row in found.tasks}
    assert counts == {
        "needle_single": 2,
        "needle_multikey": 2,
        "needle_multivalue": 4,
        "needle_multiquery": 8,
        "variable_tracking": 5,
        "chained_lookups": 5,
        "common_words": 10,
        "frequent_words": 3,
    }
    for row in found.tasks:
        at_depths = [each.answers for each in found.depths if (each.task, each.side) == (row.task, row.side)]
        assert sum(at_depths) == (0 if row.task.endswith("_words") else row.answers)


def test_figures_are_plain_data_and_tables_show_them(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert [side["side"] for side in data["sides"]] == [DENSE, "pooled topk=192", "pooled topk=3"]
    assert data["sides"][2]["config"]["topk"] == 3
    assert data["sides"][2]["sites"][0] == data["sides"][2]["sites"][1] > 0
    assert {len(each["mean_nll"]) for each in data["segments"]} == {SEGMENTS}
    assert {sum(each["scored"]) for each in data["segments"]} == {LENGTH - 1}
    figures = len(found.perplexity) + 2 * (len(found.tasks) + len(found.depths)) + len(found.locality)
    assert len(found.to_rows()) == figures
    assert len({tuple(row) for row in found.to_rows()}) == 1
    shown = str(found)
    for word in ("needle_multiquery", "pooled topk=3", "docstrings", "100 %"):
        assert word in shown


def test_losses_are_those_of_the_model(model, tokenizer, found):
    (text,) = [text for text in infllm_pass.evaluation.standard_texts() if text.name == "code"]
    ids = torch.tensor([tokenizer(text.content).input_ids[:LENGTH]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    row = next(row for row in found.perplexity if (row.text, row.side) == ("code", DENSE))
    assert row.whole == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert row.perplexity == pytest.approx(float(losses[LENGTH // 2 - 1 :].mean().exp()), rel=1e-4)


class Copying(torch.nn.Module):
    """Stands for a model: it finds the tokens of a text in the order that it is told."""

    def __init__(self, said):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.said = said

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], 260)
        logits[0, torch.arange(input_ids.shape[1] - 1), torch.tensor(self.said[1:])] = 5.0
        return type("Output", (), {"logits": logits})


def test_an_answer_is_right_if_each_of_its_tokens_is_the_likeliest():
    ids = tuple(range(20))
    said = list(ids)
    said[12] = 77
    model = Copying(said)
    sample = Sample("made", 0, ids, (Answer("a", 5, 8), Answer("b", 11, 14), Answer("c", 16, 17, None, (30, 16))))
    right, wrong, one_of = Scorer(model, model).answers(sample)
    assert (right.exact, wrong.exact, one_of.exact) == (True, False, True)
    hit = -math.log(math.exp(5) / (math.exp(5) + 259))
    miss = hit + 5
    assert right.nll == pytest.approx(hit, rel=1e-5)
    assert wrong.nll == pytest.approx((2 * hit + miss) / 3, rel=1e-5)
    assert one_of.nll == pytest.approx(-math.log((math.exp(5) + 1) / (math.exp(5) + 259)), rel=1e-5)


def test_another_answer_that_is_right_counts():
    chances = torch.log_softmax(torch.eye(4)[2:3] * 9, -1)
    answer = Answer("a", 0, 1, None, (1, 2))
    assert answer_score(answer, [1], chances).exact
    assert not answer_score(replace(answer, choices=(1, 3)), [1], chances).exact


def test_teacher_forcing_says_what_greedy_decoding_does(model, tokenizer):
    """An answer made of what the model generates is right, and one with another token is not."""
    prompt = tuple(tokenizer("The quick brown fox jumps over the lazy dog. " * 8).input_ids)
    with torch.no_grad():
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    said = out[0, len(prompt) :].tolist()
    other = [*said[:3], (said[3] + 1) % 256]
    for answer, exact in ((said, True), (other, False)):
        sample = Sample("made", 0, (*prompt, *answer), (Answer("", len(prompt), len(prompt) + 4),))
        assert Scorer(model, model).answers(sample)[0].exact is exact


def test_generated_text_is_searched_for_the_answers(model, tokenizer):
    settings = replace(QUICK, tasks=("needle_multiquery",))
    found = infllm_pass.evaluate(model, tokenizer, COVERING, settings=settings, generate=True)
    assert [row.generated for row in found.tasks] == [0.0, 0.0]
    prompt = tuple(tokenizer("one two three " * 30).input_ids)
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(out[0, len(prompt) :])
    sample = Sample("made", 0, (*prompt, 1, 2), (Answer(text[:3], len(prompt), len(prompt) + 2), Answer("~~~~", 0, 1)))
    assert Scorer(model, model).generated(sample, tokenizer.decode) == [True, False]


def test_a_sparsified_model_is_compared_with_its_original(model, tokenizer, found):
    calls = []

    def observed(site):
        calls.append(site)
        return {}

    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SPARSE, site_config=observed)
    settings = replace(QUICK, tasks=("needle_single",))
    got = infllm_pass.evaluate(sparse, tokenizer, settings=settings)
    assert calls
    expected = {row.side: row.nll for row in found.tasks if row.task == "needle_single"}
    assert {row.side: row.nll for row in got.tasks} == {
        DENSE: pytest.approx(expected[DENSE]),
        "pooled": pytest.approx(expected["pooled topk=3"], rel=1e-5),
    }
    with pytest.raises(ConfigError, match="configs"):
        infllm_pass.evaluate(sparse, tokenizer, SPARSE, settings=settings)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_configurations_than_one_model_may_have_graphs(model, tokenizer):
    """Every side is compared with dense, on versions of torch too where all of a model's graphs count together."""
    settings = TaskSettings(tasks=("perplexity",), lengths=(256,))
    text = [Text("short", "a text of words and words. " * 40)]
    sides = [replace(SPARSE, topk=topk) for topk in (2, 3, 4)]
    found = infllm_pass.evaluate(model, tokenizer, sides, settings=settings, texts=text, locality=False)
    run = found.to_dict()["sides"][1:]
    assert [side["sites"][0] for side in run] == [len(model.model.layers)] * len(sides)
    assert len({row.perplexity for row in found.perplexity}) > 2


def test_a_dense_len_that_the_device_decides(model, tokenizer):
    """A plain model is evaluated sparse, a sparsified one as it is: dense at lengths below its break-even."""
    settings = replace(QUICK, tasks=("needle_single",))
    auto = replace(SPARSE, dense_len="auto")
    plain = infllm_pass.evaluate(model, tokenizer, auto, settings=settings)
    assert [row.density for row in plain.tasks] == [1.0, pytest.approx(5 / 191, rel=0.02)]
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), auto)
    dense, own = infllm_pass.evaluate(sparse, tokenizer, settings=settings).tasks
    branches = {branch for graph in infllm_pass.report(sparse).graphs for branch in graph.branches}
    assert (own.density == 1.0) == (branches == {"dense"})
    assert (own.nll == pytest.approx(dense.nll, rel=1e-5)) == (branches == {"dense"})


def test_sites_with_configurations_of_their_own_count_as_they_are(model, tokenizer):
    settings = replace(QUICK, tasks=("needle_single",))

    def chosen(site):
        return None if "layers.0" in key_of(site)[0] else {"topk": 91}

    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), SPARSE, site_config=chosen)
    _, row = infllm_pass.evaluate(sparse, tokenizer, settings=settings).tasks
    assert row.density == pytest.approx((1 + 93 / 192) / 2, rel=0.02)


def test_a_calibration_is_compared_with_its_absence(model, tokenizer):
    settings = replace(QUICK, tasks=("needle_single",))
    config = replace(SPARSE, scorer="tokens", score_dims=16)
    wide = byte_llama(hidden_size=128)
    text = torch.randint(0, 256, (1, 512))
    measured = infllm_pass.calibrate(wide, text, config=config, progress=False)
    found = infllm_pass.evaluate(wide, tokenizer, [config, SPARSE], settings=settings, calibration=measured)
    assert [row.side for row in found.tasks] == [DENSE, "tokens score_dims=16", "pooled score_dims=None", CALIBRATED]
    plain, calibrated = found.tasks[1], found.tasks[3]
    assert plain.density == calibrated.density
    assert plain.nll != pytest.approx(calibrated.nll, rel=1e-6)
    other = replace(config, score_dims=None)
    with pytest.raises(CalibrationError, match="calibrate this model"):
        infllm_pass.evaluate(model, tokenizer, other, settings=settings, calibration=measured)
    with pytest.raises(ConfigError, match="calibration"):
        infllm_pass.evaluate(wide, tokenizer, SPARSE, settings=settings, calibration=measured)


CALIBRATED = "tokens score_dims=16 calibrated"


def test_a_model_in_training_is_evaluated_without_dropout_and_left_as_it_was(tokenizer, found):
    model = byte_llama(attention_dropout=0.5).train()
    settings = replace(QUICK, tasks=("needle_single",))
    got = infllm_pass.evaluate(model, tokenizer, SPARSE, settings=settings)
    expected = {row.side: row.nll for row in found.tasks if row.task == "needle_single"}
    assert [row.nll for row in got.tasks] == pytest.approx([expected[DENSE], expected["pooled topk=3"]], rel=1e-5)
    assert all(module.training for module in model.modules())


def test_progress_is_told(model, tokenizer):
    told = []
    settings = replace(QUICK, tasks=("needle_single", "perplexity"))
    texts = [Text("own", "all the words of a text. " * 200)]
    infllm_pass.evaluate(
        model, tokenizer, COVERING, settings=settings, texts=texts, tell=lambda *each: told.append(each)
    )
    assert [(done, total) for _, done, total in told] == [(number, 7) for number in range(7)]


class Refusing(torch.nn.Module):
    """Stands for a model that must not be run."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        raise AssertionError("it was run")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"settings": replace(QUICK, lengths=(8192,))}, EvaluationError, "has 4096 positions: ask for at most 4096"),
        ({"texts": [Text("short", "too short")]}, EvaluationError, "the text 'short' has 9 tokens"),
        ({"texts": []}, EvaluationError, "no text"),
        ({"settings": replace(QUICK, digits=1000, lengths=(512,))}, EvaluationError, "needle_single needs"),
        ({"configs": [SPARSE, SPARSE]}, ConfigError, "configurations that differ"),
        ({"configs": []}, ConfigError, "at least one configuration"),
        ({"configs": {"topk": 0}}, ConfigError, "topk=0"),
        ({"configs": {"scorer": "tokens", "score_dims": 64}}, ConfigError, "score_dims=64"),
        ({"generate": True}, UnsupportedModelError, "no generate"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, tokenizer, changes, error, message):
    arguments = {"configs": SPARSE, "settings": QUICK, **changes}
    with pytest.raises(error, match=message):
        infllm_pass.evaluate(Refusing(model.config), tokenizer, **arguments)


def test_a_function_is_refused(tokenizer):
    with pytest.raises(UnsupportedModelError, match="causal language model"):
        infllm_pass.evaluate(lambda ids: ids, tokenizer)


def test_a_model_without_attention_that_can_be_sparse_is_refused(tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=260, state_size=4)
    settings = replace(QUICK, tasks=("needle_single",))
    with pytest.raises(NoAttentionSiteError):
        infllm_pass.evaluate(MambaForCausalLM(config).eval(), tokenizer, SPARSE, settings=settings)


def test_density_counts_visited_blocks():
    config = replace(SMALL, dense_len=0)  # five blocks of eight
    assert density(None, 0, 64) == 1.0
    assert density(config, 0, 40) == 1.0
    assert density(config, 72, 80) == 0.5
    assert density(config, 40, 56) == pytest.approx((5 / 6 + 5 / 7) / 2)
    assert mean_density({config: 3, None: 1}, 72, 80) == 0.625
    assert density(replace(config, dense_len=81), 72, 80) == 1.0


@pytest.mark.parametrize("length", [1024, 4096, 8192, 32768])
def test_the_default_visits_a_fifth_of_the_blocks(length):
    config = default_config(length)
    assert config.dense_len == 0
    assert 0.18 < config.selected_blocks / config.geometry.num_blocks(length) < 0.32
    assert density(config, length - 1, length) < 0.32


def test_long_texts_with_large_vocabularies_are_scored_in_runs():
    assert torch.equal(scored_places(1000, 260), torch.arange(999))
    places = scored_places(131_072, 128_256)
    assert len(places) * 128_256 <= 2**29
    assert int(places.max()) < 131_071
    assert (torch.bincount((places + 1) * SEGMENTS // 131_072, minlength=SEGMENTS) > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scorer", ["pooled", "tokens"])
def test_a_gpu_gives_the_figures_of_dense_where_the_budget_covers(tokenizer, scorer):
    model = byte_llama(hidden_size=256).cuda().bfloat16()
    settings = replace(QUICK, tasks=("perplexity", "needle_multiquery"), lengths=(2048,))
    configs = [{"scorer": scorer, "window_size": 128, "topk": topk, "dense_len": 0} for topk in (40, 3)]
    found = infllm_pass.evaluate(model, tokenizer, configs, settings=settings)
    assert found.facts["device"] == torch.cuda.get_device_name()
    dense, covering, sparse = ([row.perplexity for row in rows] for rows in by_side(found.perplexity).values())
    assert covering == pytest.approx(dense, rel=0.05)
    assert sparse != pytest.approx(dense, rel=1e-3)
