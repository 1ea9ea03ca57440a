"""Rows: every token accounted for, positions and labels of pieces, shares, and that a step needs no state."""

import random
import re
from collections import Counter

import pytest
import torch

from infllm_pass.adaptation.packing import NO_LABEL, packed_rows, written_row
from infllm_pass.adaptation.rows import Bucket, TrainingRows
from infllm_pass.adaptation.tasks import TRAINING_TASKS
from infllm_pass.errors import AdaptationError, ConfigError
from tests.support.documents import counted_documents
from tests.support.tokenizers import byte_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def made(tokenizer, documents=None, **changes):
    settings = {
        "buckets": (Bucket(64, 0.6), Bucket(256, 0.4)),
        "tokens_per_step": 512,
        "steps": 50,
        "task_share": 0.0,
        "tasks": (),
        "seed": 0,
        **changes,
    }
    texts = counted_documents(500, 30, 2000, 7, 64, 300) if documents is None else documents
    return TrainingRows(texts, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize(
    ("lengths", "length", "prefix"), [([500, 30, 2000, 7, 64, 300], 64, 0), ([63, 64, 65, 1], 64, 1), ([9] * 40, 16, 3)]
)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_in_one_row_but_for_less_than_a_row(lengths, length, prefix, seed):
    documents = counted_documents(*lengths)
    spans = [documents.span(number) for number in range(len(documents))]
    rows = packed_rows(spans, length, prefix, random.Random(seed))
    seen = Counter(place for row in rows for start, stop in row for place in range(start, stop))
    assert set(seen.values()) == {1}
    written = [written_row(documents.ids, row, length, torch.full((prefix,), 300)) for row in rows]
    assert {len(each["input_ids"]) for each in written} == {length}
    assert len(documents.ids) - len(seen) < length
    for row in rows:
        for start, stop in row:
            assert any(first <= start < stop <= last for first, last in spans)
    whole = [row for row in rows if len(row) == 1 and row[0][1] - row[0][0] == length - prefix]
    least = sum((size - (length - prefix)) // (length - prefix) for size in lengths if size >= length - prefix)
    assert len(whole) >= least


def test_long_documents_are_cut_at_other_places_each_time():
    first, second = ({row[0][0] % 100 for row in packed_rows([(0, 1000)], 100, 0, random.Random(s))} for s in (1, 2))
    assert first != second


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_begin_anew_at_each_piece_whose_first_label_is_left_out(prefix):
    ids = torch.arange(100, dtype=torch.int32)
    first = torch.arange(200, 200 + prefix)
    row = written_row(ids, [(10, 13), (50, 54)], 7 + 2 * prefix + (prefix > 1), first)
    lead = first.tolist()
    extra = lead[:1] if prefix > 1 else []
    assert row["input_ids"].tolist() == [*lead, 10, 11, 12, *lead, 50, 51, 52, 53, *extra]
    assert row["position_ids"].tolist() == [*range(3 + prefix), *range(4 + prefix), *[0] * len(extra)]
    labels = row["input_ids"].clone()
    labels[row["position_ids"] == 0] = NO_LABEL
    assert torch.equal(row["labels"], labels)
    assert {tensor.dtype for tensor in row.values()} == {torch.int64}


def test_a_step_has_the_rows_of_one_bucket(tokenizer):
    rows = made(tokenizer)
    assert len(rows) == 50
    for step in range(50):
        length = rows.buckets[rows.bucket_of(step)].length
        assert {tuple(tensor.shape) for tensor in rows[step].values()} == {(512 // length, length)}
    with pytest.raises(IndexError):
        rows[50]


@pytest.mark.parametrize("seed", [0, 7])
def test_any_run_of_steps_has_the_shares_asked_for(tokenizer, seed):
    shares = (0.5, 0.3, 0.2)
    buckets = [Bucket(length, share) for length, share in zip((1024, 2048, 4096), shares, strict=True)]
    documents = counted_documents(20_000)
    tasks = tuple(TRAINING_TASKS)
    rows = made(
        tokenizer, documents, buckets=buckets, steps=600, tokens_per_step=4096, seed=seed, task_share=0.25, tasks=tasks
    )
    for start, stop in ((0, 100), (250, 350), (0, 600)):
        counts = Counter(rows.bucket_of(step) for step in range(start, stop))
        for number, share in enumerate(shares):
            assert abs(counts[number] - share * (stop - start)) <= 4
            steps = [step for step in range(start, stop) if rows.bucket_of(step) == number]
            of_tasks = [is_task for step in steps for is_task in rows._are_tasks(step)]
            assert abs(sum(of_tasks) - 0.25 * len(of_tasks)) <= 6


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_follows_from_seed_and_number_alone(tokenizer):
    options = {"buckets": (Bucket(1024, 0.5), Bucket(2048, 0.5)), "tokens_per_step": 4096, "task_share": 0.3}
    options |= {"tasks": tuple(TRAINING_TASKS), "steps": 30}
    documents = counted_documents(9000, 400, 30)
    straight = [made(tokenizer, documents, **options)[step] for step in range(30)]
    backwards = made(tokenizer, documents, **options)
    for step in reversed(range(30)):
        assert same(backwards[step], straight[step])
    longer = made(tokenizer, documents, **{**options, "steps": 45})
    assert same(longer[29], straight[29])
    other = made(tokenizer, documents, **options, seed=1)
    assert not all(one["input_ids"].equal(two["input_ids"]) for one, two in zip(other, straight, strict=True))


def test_documents_are_read_once_before_any_is_read_again(tokenizer):
    documents = counted_documents(60, 100, 37, vocabulary=1000)
    rows = made(tokenizer, documents, buckets=[Bucket(16, 1.0)], tokens_per_step=48, steps=8)
    lines = [row.tolist() for step in rows for row in step["input_ids"]]
    seen = Counter(token for line in lines for token in line)
    assert max(seen.values()) == 2
    reading = 197 // 16
    assert len(lines) == 2 * reading
    for first in (0, reading):
        once = Counter(token for line in lines[first : first + reading] for token in line)
        assert set(once.values()) == {1}
        assert len(once) == reading * 16


def test_what_the_tokenizer_puts_before_a_text_comes_before_every_piece():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", end)]
    )
    rows = made(
        tokenizer, counted_documents(500, 90), task_share=0.5, tasks=("single_needle",), buckets=[Bucket(512, 1)]
    )
    for step in rows:
        first = step["position_ids"] == 0
        assert set(step["input_ids"][first].tolist()) == {end}
        assert first[:, 0].all()


def test_a_task_is_one_piece_with_labels_throughout(tokenizer):
    documents = counted_documents(9000)
    rows = made(
        tokenizer, documents, buckets=[Bucket(1024, 1)], tokens_per_step=2048, task_share=1.0, tasks=("single_needle",)
    )
    step = rows[3]
    assert len({tuple(row.tolist()) for number in range(10) for row in rows[number]["input_ids"]}) == 20
    assert torch.equal(step["position_ids"], torch.arange(1024).expand(2, 1024))
    assert torch.equal(step["labels"][:, 1:], step["input_ids"][:, 1:])
    assert step["labels"][:, 0].tolist() == [NO_LABEL] * 2


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"buckets": ()}, ConfigError, "at least one, each of another length"),
        ({"buckets": (Bucket(64, 0.5), Bucket(64, 0.5))}, ConfigError, "each of another length"),
        ({"buckets": (Bucket(64, 0.5), Bucket(128, 0.4))}, ConfigError, "add up to 1, not to 0.9"),
        ({"tokens_per_step": 255}, ConfigError, "tokens_per_step=255"),
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"task_share": 1.5}, ConfigError, "task_share=1.5"),
        ({"task_share": 0.5}, ConfigError, "or task_share=0"),
        ({"tasks": ("needle",)}, ConfigError, "one of single_needle, multi_key_needle"),
        (
            {"buckets": [Bucket(4096, 1)], "tokens_per_step": 4096},
            AdaptationError,
            "have 2901 tokens and a row has 4096",
        ),
        ({"task_share": 0.1, "tasks": ("chained_lookups",)}, AdaptationError, "chained_lookups takes"),
    ],
)
def test_what_does_not_do_is_refused(tokenizer, changes, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        made(tokenizer, **changes)


@pytest.mark.parametrize(("length", "share"), [(1, 0.5), (64, 0.0), (64, 1.5)])
def test_buckets_out_of_range_are_refused(length, share):
    with pytest.raises(ConfigError):
        Bucket(length, share)
