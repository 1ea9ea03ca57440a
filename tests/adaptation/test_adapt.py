"""Runs of `adapt`: losses of a plain loop, what is written, resuming, and what is refused beforehand."""

import importlib.util
import json
import shutil

import pytest
import torch

import infllm_pass
from infllm_pass.adaptation.losses import read_losses
from infllm_pass.adaptation.run_folder import COMPLETE, RunFolder
from infllm_pass.errors import (
    AdaptationError,
    ConfigError,
    EvaluationError,
    MissingDependencyError,
    UnsupportedModelError,
)
from infllm_pass.evaluation import Text, read_texts
from infllm_pass.frontend.api import sparsified_config
from tests.support import ROOT
from tests.support.adapting import LENGTHS, long_rows, small_config, small_model, write_texts

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

WEIGHTS = "weights.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "own")


@pytest.fixture
def run(files, tmp_path):
    """Runs `adapt` with the small model, in one folder unless another is named."""

    def start(folder="out", model=None, texts=files, resume=False, held_out=None, **changes):
        own, tokenizer = small_model()
        held_out = read_texts([files[0].parent / "held.txt"]) if held_out is None else held_out
        config = small_config(**changes)
        out = tmp_path / folder
        return infllm_pass.adapt(
            model or own, tokenizer, texts, out, config, held_out=held_out, resume=resume, device="cpu"
        )

    return start


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run to its end."""
    model, tokenizer = small_model()
    out = tmp_path_factory.mktemp("finished") / "out"
    held_out = read_texts([files[0].parent / "held.txt"])
    return infllm_pass.adapt(
        model, tokenizer, files, out, small_config(evaluate_every=2), held_out=held_out, device="cpu"
    )


def rows_of(files, config):
    from infllm_pass.adaptation.documents import read_documents
    from infllm_pass.adaptation.rows import TrainingRows

    tokenizer = small_model()[1]
    return TrainingRows(
        read_documents(files, tokenizer),
        config.buckets,
        tokens_per_step=config.tokens_per_step,
        steps=config.steps,
        task_share=0.0,
        tasks=config.tasks,
        tokenizer=tokenizer,
        seed=config.seed,
    )


def test_losses_are_those_of_a_plain_loop(finished, files):
    """The same rows, AdamW and learning rates without the trainer of transformers."""
    config = small_config()
    model = small_model()[0].train()
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), config.sparse_config, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, batch in enumerate(rows_of(files, config)):
        rate = finished.losses[step].learning_rate
        optimizer.param_groups[0]["lr"] = rate
        loss = sparse(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        assert finished.losses[step].loss == pytest.approx(loss.item(), rel=1e-5)
        assert finished.losses[step].length == batch["input_ids"].shape[1]
    assert {each.length for each in finished.losses} == set(LENGTHS)
    assert finished.losses[-1].loss < finished.losses[0].loss
    saved = transformers.AutoModelForCausalLM.from_pretrained(finished.model)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-5)


def test_the_saved_model_brings_its_sparse_config_and_tokenizer(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished.model)
    config = small_config().sparse_config
    assert config.dense_len == LENGTHS[0] + 1
    assert model.config.use_cache is True
    loaded = infllm_pass.sparsify(torch.compile(model, backend="eager"))
    assert sparsified_config(loaded) == config
    loaded(input_ids=torch.arange(200)[None], use_cache=False)
    assert infllm_pass.report(loaded).switchable == 1
    assert "200 >= 129" in str(infllm_pass.explain(model, torch.arange(200)[None]))
    assert (
        transformers.AutoTokenizer.from_pretrained(finished.model)("ab").input_ids == small_model()[1]("ab").input_ids
    )


def test_both_modes_are_evaluated_before_during_and_after(finished):
    out = finished.model.parent
    assert sorted(path.name for path in (out / "evaluations").iterdir()) == [f"step-00000{n}.json" for n in (0, 2, 4)]
    assert list(finished.evaluations) == [0, 2, 4]
    values = {(s, row["side"]): row["perplexity"] for s, e in finished.evaluations.items() for row in e["perplexity"]}
    assert {side for _, side in values} == {"dense", "tokens"}
    assert values[4, "dense"] < values[0, "dense"]
    assert values[4, "tokens"] < values[0, "tokens"]
    assert len(set(values.values())) == len(values)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "adaptation.json").read_text())
    assert facts["trained_tokens"] == 4 * 512
    assert [each.loss for each in read_losses(out / "losses.jsonl")] == [each.loss for each in finished.losses]


def test_each_length_is_compiled_once(run):
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run(steps=8, checkpoint_every=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == len(LENGTHS) + 1  # and the evaluation's


def test_a_dense_control_sees_the_same_rows_and_saves_no_sparse_config(run, finished):
    control = run(attention="dense")
    assert [each.length for each in control.losses] == [each.length for each in finished.losses]
    sparse = next(number for number, each in enumerate(finished.losses) if each.length == 512)
    assert control.losses[sparse].loss != finished.losses[sparse].loss
    assert not hasattr(transformers.AutoConfig.from_pretrained(control.model), "sparse_config")


def test_accumulated_steps_have_the_losses_of_whole_ones(run, files):
    """Each part is a batch of its own; what is logged is their mean."""
    two = run(accumulation=2, tokens_per_step=1024, steps=1, warmup=0, checkpoint_every=0)
    model = small_model()[0].train()
    rows = rows_of(files, small_config(steps=2))
    sparse = infllm_pass.sparsify(torch.compile(model, backend="eager"), small_config().sparse_config)
    with torch.no_grad():
        losses = [sparse(**batch, use_cache=False).loss.item() for batch in rows]
    assert two.losses[0].loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_run_goes_on_from_its_last_whole_checkpoint(run, finished, tmp_path):
    """A checkpoint that is half-written, and losses after the one before it, are no part of it."""
    run(evaluate_every=2)
    folder = tmp_path / "out"
    half = folder / "checkpoints" / "checkpoint-4"
    (half / COMPLETE).unlink()
    (half / WEIGHTS).write_bytes((half / WEIGHTS).read_bytes()[:1000])
    shutil.rmtree(folder / "model")
    again = run(resume=True, evaluate_every=2)
    assert again.losses == finished.losses
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (again.model, finished.model)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_run_s_folder_is_refused(run, files, tmp_path):
    run(steps=2, **long_rows())
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(AdaptationError, match="holds a run: resume it"):
        run(steps=2, **long_rows())
    with pytest.raises(AdaptationError, match=r"another run.*learning_rate \(was 0.001, is 0.002\)"):
        run(steps=2, **long_rows(), resume=True, learning_rate=2e-3)
    with pytest.raises(AdaptationError, match="another run; these differ: text"):
        run(steps=2, **long_rows(), resume=True, texts=files[:2])
    other, _ = small_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(AdaptationError, match="another run; these differ: model"):
        run(steps=2, **long_rows(), resume=True, model=other)
    with pytest.raises(AdaptationError, match="no run to resume"):
        run("elsewhere", resume=True)
    assert not (tmp_path / "elsewhere").exists()
    assert kept == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"buckets": "long"}, AdaptationError, "8192 positions|4096 positions"),
        ({"held_out": [Text("short", "a few words")]}, EvaluationError, "11 tokens"),
        ({"texts": []}, AdaptationError, "no text to train on"),
        ({"lora": 4}, MissingDependencyError, r"pip install 'infllm-pass\[peft\]'"),
    ],
    ids=["positions", "held out", "no text", "adapters"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(run, tmp_path, changes, error, match):
    if "lora" in changes and importlib.util.find_spec("peft") is not None:
        pytest.skip("peft is installed")
    if changes.get("buckets") == "long":
        changes = {"buckets": (infllm_pass.Bucket(8192, 1.0),), "tokens_per_step": 8192}
    with pytest.raises(error, match=match):
        run(**changes)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run, tmp_path):
    with pytest.raises(AdaptationError, match="token ids up to 256, and the model knows ids below 200"):
        run(model=small_model(vocab_size=200)[0])
    assert not (tmp_path / "out").exists()


def test_a_compiled_model_is_refused(run):
    with pytest.raises(UnsupportedModelError, match="pass the plain model"):
        infllm_pass.adapt(torch.compile(small_model()[0]), small_model()[1], [], "nowhere")


def test_a_full_disk_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(AdaptationError, match=r"writes up to 0\.06 GiB .*the disk has 0\.01"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    from infllm_pass.adaptation import trainer

    real = trainer.save_file

    def full(tensors, file):
        if "checkpoint-4" in str(file):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(AdaptationError, match=r"checkpoint-4 cannot be written .*No space left"):
        run(**long_rows())
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "out" / "model").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_rows(run, files, tmp_path):
    model, _ = small_model()
    config = small_config(**long_rows())
    rows = rows_of(files, config)
    with pytest.raises(AdaptationError, match=r"the loss of step \d is (nan|inf): its rows are in (\S+)") as caught:
        run(model=_breaking(model, rows[2]["input_ids"]), log_every=1, **long_rows())
    folder = tmp_path / "out"
    assert str(folder / "loss-of-step-3.safetensors") in str(caught.value)
    saved = safetensors.load_file(folder / "loss-of-step-3.safetensors")
    assert {name.partition(".")[0] for name in saved} == set(rows[2])
    assert all(torch.equal(saved[f"{name}.0"], rows[2][name]) for name in rows[2])
    facts = json.loads((folder / "loss-of-step-3.json").read_text())
    assert (facts["step"], facts["length"]) == (3, rows[2]["input_ids"].shape[1])
    assert (folder / "checkpoints" / "checkpoint-2" / COMPLETE).is_file()


def _breaking(model, ids):
    """The model, with a loss that is NaN for one batch."""
    forward = model.forward

    class Breaking(type(model)):
        def forward(self, input_ids=None, **keywords):
            out = forward(input_ids=input_ids, **keywords)
            if out.loss is not None:
                same = torch.tensor(input_ids.shape == ids.shape) and (input_ids == ids.expand_as(input_ids)).all()
                out.loss = torch.where(same, torch.nan, out.loss)
            return out

    model.__class__ = Breaking
    return model


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("keep", 1), ("distill", 1.5), ("learning_rate", float("nan")), ("attention", "both")],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        small_config(**{field: value})


def test_settings_that_contradict_one_another_are_refused():
    with pytest.raises(ConfigError, match="shares that add up to 1"):
        small_config(buckets=(infllm_pass.Bucket(128, 0.4),))
    with pytest.raises(ConfigError, match="multiple of every length"):
        small_config(tokens_per_step=600)
    with pytest.raises(ConfigError, match="its own teacher"):
        small_config(attention="dense", distill=0.5)
    with pytest.raises(ConfigError, match="nothing would be sparse"):
        small_config(sparse=small_config().sparse_config.with_dense_len(513))


def test_a_configuration_comes_back_from_json():
    config = small_config(evaluate_every=3)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_losses_cut_off_in_the_middle_of_a_line_are_read_up_to_it(tmp_path):
    file = tmp_path / "losses.jsonl"
    line = '{"step": 1, "length": 8, "learning_rate": 0.0, "loss": 2.0, "divergence": null}\n'
    file.write_text(line + '{"step": 2, "le')
    assert [each.step for each in read_losses(file)] == [1]
    assert RunFolder(tmp_path).losses == file


def test_the_example_runs(capsys):
    path = ROOT / "examples" / "adapt.py"
    spec = importlib.util.spec_from_file_location("adapt_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(steps=2)
    assert len(found.losses) == 2
    printed = capsys.readouterr().out
    assert "2 attention site(s), 2 switchable" in printed
    assert ">= 257" in printed
