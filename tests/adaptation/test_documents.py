"""Documents: every token of every file, in order, and what is refused."""

import gzip
import lzma
import re

import pytest
import torch

from infllm_pass.adaptation import documents as documents_module
from infllm_pass.adaptation.documents import read_documents
from infllm_pass.errors import AdaptationError, ConfigError
from tests.support.tokenizers import byte_tokenizer

pytest.importorskip("transformers")

END = 256


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def text_of(tokenizer, ids):
    return tokenizer.decode(ids.tolist())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first text, ünïcode")
    (tmp_path / "b" / "inner.md").write_text("second")
    (tmp_path / "b" / "packed.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "c.md.xz").write_bytes(lzma.compress(b"fourth"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "other.gz").write_bytes(b"not read")
    return tmp_path


def test_a_folder_is_read_in_the_order_of_names_with_an_end_after_each_text(folder, tokenizer):
    found = read_documents(folder, tokenizer)
    names = [name.removeprefix(f"{folder}/") for name in found.names]
    assert names == ["a.txt", "b/inner.md", "b/packed.txt.gz", "c.md.xz"]
    texts = [text_of(tokenizer, found.document(number)) for number in range(len(found))]
    assert texts == [f"{text}<end>" for text in ("first text, ünïcode", "second", "third", "fourth")]
    assert found.ids.dtype == torch.int32
    assert found.starts.dtype == torch.int64
    assert found.span(len(found) - 1)[1] == len(found.ids)
    assert found.held_out is None


@pytest.mark.parametrize("characters", [1, 20])
def test_batches_change_nothing(folder, tokenizer, monkeypatch, characters):
    whole = read_documents([folder], tokenizer)
    monkeypatch.setattr(documents_module, "BATCH_CHARACTERS", characters)
    told = []
    apart = read_documents([folder], tokenizer, tell=lambda *what: told.append(what))
    assert torch.equal(whole.ids, apart.ids)
    assert torch.equal(whole.starts, apart.starts)
    assert [what for what, _, _ in told][:2] == ["reading a.txt", "reading inner.md"]
    assert all(0 <= done < total == told[0][2] for _, done, total in told)


def test_a_tokenizer_in_python_gives_the_same(folder, tokenizer):
    class Slow:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, *args, **options):
            return tokenizer(*args, **options)

    assert torch.equal(read_documents(folder, Slow()).ids, read_documents(folder, tokenizer).ids)


def test_what_a_tokenizer_did_before_does_not_stay(folder):
    used = byte_tokenizer(pad_token="<end>")
    used(["some text", "text"], truncation=True, max_length=5, padding="max_length")
    assert torch.equal(read_documents(folder, used).ids, read_documents(folder, byte_tokenizer()).ids)


def test_a_file_named_twice_is_read_once_and_may_have_any_name(folder, tokenizer):
    (folder / "notes").write_text("notes")
    found = read_documents([folder / "notes", folder / "a.txt", folder], tokenizer)
    assert [name.rsplit("/", 1)[1] for name in found.names] == [
        "notes",
        "a.txt",
        "inner.md",
        "packed.txt.gz",
        "c.md.xz",
    ]


def test_a_tokenizer_without_an_end_adds_none(folder):
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert text_of(plain, read_documents(folder / "c.md.xz", plain).ids) == "fourth"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_held_out_is_the_share_asked_for_and_is_not_trained_on(tmp_path, tokenizer, share):
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text(str(number) * (50 + 10 * number))
    whole = read_documents(tmp_path, tokenizer)
    left = read_documents(tmp_path, tokenizer, hold_out=share)
    held = left.held_out
    assert len(held.ids) == round(share * len(whole.ids))
    assert len(left) + len(held) <= len(whole) + 1
    by_name = {name: [] for name in whole.names}
    for part in (left, held):
        for number, name in enumerate(part.names):
            by_name[name] += part.document(number).tolist()
    for number, name in enumerate(whole.names):
        assert by_name[name] == whole.document(number).tolist()
    assert set(read_documents(tmp_path, tokenizer, hold_out=share).held_out.names) == set(held.names)


def test_one_document_is_held_out_at_its_end(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("a" * 79)
    found = read_documents(tmp_path, tokenizer, hold_out=0.25)
    assert (len(found.ids), len(found.held_out.ids)) == (60, 20)
    assert found.held_out.ids[-1] == END


def refused(paths, tokenizer, message, kind=AdaptationError, **options):
    with pytest.raises(kind, match=re.escape(message)):
        read_documents(paths, tokenizer, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"\xff\xfe\xfd", "bad.txt cannot be read as UTF-8 text"),
        ("bad.txt.gz", b"no gzip", "bad.txt.gz cannot be read"),
        ("cut.txt.gz", gzip.compress(b"whole text" * 50, mtime=0)[:-12], "cut.txt.gz cannot be read"),
        ("bad.md.xz", b"no xz", "bad.md.xz cannot be read"),
        ("tar.txt", b"name\0\0\0", "unpack archives first"),
        ("white.txt", b"\n \t", "1 file(s) hold nothing but white space"),
        ("none.rst", b"text", "holds no text: files must end in .txt or .md"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_what_is_no_text_is_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, tokenizer, message)


def test_paths_and_settings_that_do_not_do_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("zzz")
    refused(tmp_path / "absent.txt", tokenizer, "absent.txt does not exist")
    refused([], tokenizer, "name at least one file")
    refused(tmp_path, tokenizer, "hold_out=1.0", ConfigError, hold_out=1.0)
    refused(tmp_path, tokenizer, "leaves nothing to hold out", hold_out=0.01)
    refused(tmp_path, tokenizer, "leaves nothing to train on", hold_out=0.99)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("zzz")
    largest = max(tokenizer("z").input_ids[0], END)
    assert len(read_documents(tmp_path, tokenizer, vocabulary=largest + 1).ids) == 4
    refused(tmp_path, tokenizer, f"token id {largest} in", vocabulary=largest)
