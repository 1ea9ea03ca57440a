"""Synthetic tasks: the answers follow from the text, and no evaluation shares their words."""

import random
import re

import pytest

from infllm_pass.adaptation import tasks
from infllm_pass.adaptation.tasks import TRAINING_TASKS, Hidden, Sampler
from infllm_pass.errors import AdaptationError
from infllm_pass.evaluation import lists, lookups, needles
from infllm_pass.evaluation.samples import Haystack, Writer
from infllm_pass.evaluation.tasks import PERPLEXITY, TASKS, TaskSettings, draw_samples
from tests.support.documents import counted_documents
from tests.support.tokenizers import byte_tokenizer

pytest.importorskip("transformers")

LENGTH = 3000
DRAWS = 30


@pytest.fixture(scope="module")
def writer():
    return Writer(byte_tokenizer())


def hidden(task, length=LENGTH):
    for seed in range(DRAWS):
        yield TRAINING_TASKS[task](length, random.Random(seed))


@pytest.mark.parametrize("length", [700, 2048, 2049])
@pytest.mark.parametrize("task", TRAINING_TASKS)
def test_a_sample_has_its_length_and_holds_all_sentences_in_their_order(writer, task, length):
    dots = writer.encode(".")[0]
    documents = counted_documents(400, 5000)
    documents.ids.fill_(dots)
    for seed in range(4):
        sample = Sampler(writer, documents).sample(task, length, random.Random(seed))
        assert len(sample) == length
        text = writer.decode(sample)
        draw = random.Random(seed)
        made = [TRAINING_TASKS[task](length // min(2**attempt, 8), draw) for attempt in range(tasks.ATTEMPTS)]
        fits = [each for each in made if text.startswith(each.opening) and text.endswith(each.closing)]
        assert fits
        places = [text.find(sentence) for sentence in fits[0].sentences]
        assert -1 not in places
        assert places == sorted(places)
        rest = text.removeprefix(fits[0].opening).removesuffix(fits[0].closing)
        for sentence in fits[0].sentences:
            rest = rest.replace(sentence, "", 1)
        assert set(rest) == {"."}


def numbers(text):
    return re.findall(r"\d{4,}", text)


@pytest.mark.parametrize("task", ["single_needle", "multi_key_needle"])
def test_numbers_are_asked_for_under_their_keys(task):
    for found in hidden(task):
        filed = {}
        for sentence in found.sentences:
            (number,) = numbers(sentence)
            (key,) = re.findall(rf"((?:{'|'.join(tasks.COLOURS)}) \w+)", sentence)
            filed[key] = number
        assert len(filed) == len(set(filed.values())) == len(found.sentences)
        assert len(filed) == (1 if task == "single_needle" else LENGTH // tasks.TOKENS_PER_NUMBER)
        keys = re.findall(rf"((?:{'|'.join(tasks.COLOURS)}) (?:{'|'.join(tasks.THINGS)}))", found.closing)
        assert [filed[key] for key in keys] == numbers(found.closing)
        assert len(keys) == min(len(filed), tasks.MOST_ASKED)


def words_of(text):
    """Made-up names and numbers, in their order."""
    return re.findall(rf"\b(?:(?:{'|'.join(tasks.SYLLABLES)}){{3}}|\d{{4,}})\b", text)


def test_copies_lead_from_the_number_to_all_names_that_are_listed():
    for found in hidden("variable_tracking"):
        holds = {}
        for sentence in found.sentences:
            name, value = words_of(sentence)
            holds[name] = holds.get(value, value)  # a step comes after the one that it copies
        for line in found.closing.strip().splitlines():
            number, *names = words_of(line)
            assert {name for name, value in holds.items() if value == number} == set(names)
            assert [name for name in holds if name in names] == names


def test_trails_lead_to_their_ends_through_any_order_of_the_text():
    backwards = 0
    ends = rf"\d{{4,}}|{'|'.join(tasks.THINGS)}"
    for found in hidden("chained_lookups"):
        leads = dict(re.findall(rf"\b({ends})\b", sentence) for sentence in found.sentences)
        assert len(leads) == len(found.sentences)
        for line in found.closing.strip().splitlines():
            here, *stops = re.findall(rf"\b({ends})\b", line)
            for stop in stops:
                here = leads[here]
                assert here == stop
            assert here in tasks.THINGS
            places = [list(leads.values()).index(stop) for stop in stops]
            backwards += places != sorted(places)
    assert backwards > DRAWS


def shingles(text, size=4):
    """All runs of so many words; numbers, made-up names and the words that are drawn count as one and the same."""
    drawn = {*tasks.COLOURS, *tasks.THINGS, *needles.KEYS, *lookups.FOUND, *(name.lower() for name in lookups.OWNERS)}
    words = ["#" if word in drawn or word.isdigit() else word for word in re.findall(r"\w+", text.lower())]
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def test_no_evaluation_shares_a_wording(writer):
    """No four words in a row, out of which at least two are no placeholder."""
    empty = Haystack("dots", "." * 9000, tuple(writer.encode("." * 9000)))
    settings = {"lengths": (LENGTH,), "depths": (0.5,), "samples": 2}
    evaluated = set()
    for task in set(TASKS) - {PERPLEXITY, "common_words", "frequent_words"}:
        for sample in draw_samples(writer, [empty], TaskSettings(tasks=(task,), **settings)):
            evaluated |= shingles(writer.decode(sample.ids))
    trained = set()
    for task in TRAINING_TASKS:
        for found in hidden(task):
            trained |= shingles(" ".join([found.opening, *found.sentences, found.closing]))
    assert min(len(evaluated), len(trained)) > 50
    assert {words for words in evaluated & trained if sum(word != "#" for word in words) > 1} == set()


def test_no_evaluation_shares_its_words_or_sizes_of_numbers():
    evaluated = {*needles.KEYS, *lookups.FOUND, *(name.lower() for name in lookups.OWNERS)}
    assert not evaluated & {*tasks.COLOURS, *tasks.THINGS}
    sizes = {TaskSettings().digits, lookups.DIGITS}
    assert not sizes & set(tasks.DIGITS)
    found = hidden("multi_key_needle")
    assert {len(number) for each in found for number in numbers(each.closing)} == set(tasks.DIGITS)
    draw = random.Random(0)
    assert not set(lists._names(200, draw)) & {name.upper() for name in tasks._different_names(200, draw)}


def test_text_is_of_one_document_where_it_is_long_enough(writer):
    documents = counted_documents(100, 2000, 80, vocabulary=3000, end=writer.tokenizer.eos_token_id)
    sampler = Sampler(writer, documents)
    texts = [sampler._text(1990, random.Random(seed)) for seed in range(200)]
    assert {text[0] for text in texts} == set(range(100, 110))  # the last one ends before the end token
    for text in texts:
        assert text == list(range(text[0], text[0] + 1990))
    joined = [*range(99), *range(100, 2099), *range(2100, 2179)] * 2
    whole = sampler._text(2100, random.Random(1))
    start = joined.index(whole[0])
    assert whole == joined[start : start + 2100]


def test_what_does_not_fit_a_row_is_refused(writer, monkeypatch):
    monkeypatch.setitem(TRAINING_TASKS, "long", lambda length, draw: Hidden("o" * 50, ("s" * 30,), "c" * 20))
    sampler = Sampler(writer, counted_documents(500))
    assert len(sampler.sample("long", 101, random.Random(0))) == 101
    sampler.check("long", 101)
    for refusing in (lambda: sampler.sample("long", 100, random.Random(0)), lambda: sampler.check("long", 100)):
        with pytest.raises(AdaptationError, match=r"takes 100 tokens beside the text .*, and a row has 100"):
            refusing()


def test_what_does_not_fit_is_drawn_again_and_smaller(writer, monkeypatch):
    def by_length(length, draw):
        return Hidden("", ("s" * (length + draw.randrange(2)),), "")

    monkeypatch.setitem(TRAINING_TASKS, "by length", by_length)
    sample = Sampler(writer, counted_documents(500)).sample("by length", 200, random.Random(0))
    assert writer.decode(sample).count("s") >= 100


@pytest.mark.parametrize("task", TRAINING_TASKS)
def test_what_is_checked_fits_whatever_is_drawn(writer, task):
    sampler = Sampler(writer, counted_documents(3000))
    shortest = next(length for length in range(100, 3000, 10) if fits(sampler, task, length))
    for seed in range(300):
        assert len(sampler.sample(task, shortest, random.Random(f"drawn {seed}"))) == shortest


def fits(sampler, task, length):
    try:
        sampler.check(task, length)
    except AdaptationError:
        return False
    return True
