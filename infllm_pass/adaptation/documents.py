"""Long text files as token ids: what a model is trained on."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_pass.errors import AdaptationError, ConfigError

Tell = Callable[[str, int, int], None]
"""Takes what is being done, how much is done, and out of how much."""

SUFFIXES = (".txt", ".md")
"""Files that are read from folders, plain or compressed."""

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}

BATCH_CHARACTERS = 16_000_000
"""Text that the tokenizer gets at once. A document keeps one core busy, and many are of a megabyte: enough of them for
sixteen cores, while the results take some 500 megabytes."""

HOLD_OUT_SEED = 0


@dataclass(frozen=True)
class Documents:
    """Documents as token ids.

    Attributes:
        ids: the tokens of all documents, one after the other, int32 ``[tokens]``.
        starts: where each document begins in `ids`, ascending, int64 ``[documents]``; the first begins at 0.
        names: the documents' names, those of their files.
        held_out: documents that are not to be trained on; None: nothing was held out.
    """

    ids: Tensor
    starts: Tensor
    names: tuple[str, ...]
    held_out: Documents | None = None

    def __len__(self) -> int:
        return len(self.names)

    def span(self, number: int) -> tuple[int, int]:
        """Where a document begins in `ids`, and where it ends."""
        last = number == len(self.names) - 1
        return int(self.starts[number]), len(self.ids) if last else int(self.starts[number + 1])

    def document(self, number: int) -> Tensor:
        """The tokens of one document, int32, without a copy."""
        start, stop = self.span(number)
        return self.ids[start:stop]


def read_documents(
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    tokenizer: Any,
    *,
    hold_out: float = 0.0,
    vocabulary: int | None = None,
    tell: Tell | None = None,
) -> Documents:
    """Read text files, each a document, as token ids.

    A document's tokens are those that the tokenizer gives its text without special tokens, and the tokenizer's
    end-of-text token where it has one. Files of white space alone are passed over.

    Args:
        paths: UTF-8 text files, plain or compressed (``.gz``, ``.xz``), and folders, of which all files ``.txt`` and
            ``.md`` are read, compressed ones too, in subfolders as well, in the order of their names.
        tokenizer: a tokenizer of transformers; fast ones use all cores.
        hold_out: share of the tokens that `Documents.held_out` gets, from 0 to less than 1. Documents are drawn, the
            same for the same files, until there are enough; of the last one only the end is held out.
        vocabulary: how many token ids the model knows; None: not checked.
        tell: called with a file's name before each file, the bytes read so far and the bytes of all.

    Raises:
        AdaptationError: a file cannot be read or is no text, there is no text at all, a token id is outside the
            vocabulary, or holding out leaves nothing on one side.
        ConfigError: `hold_out` is out of its range.
    """
    if not 0 <= hold_out < 1:
        raise ConfigError("hold_out", hold_out, "a share from 0 to less than 1")
    files = _files([paths] if isinstance(paths, (str, os.PathLike)) else paths)
    ids, starts, names = array("i"), array("q"), []
    end = tokenizer.eos_token_id
    for batch in _batches(files, tell):
        found = _token_ids(tokenizer, [text for _, text in batch])
        for (name, _), tokens in zip(batch, found, strict=True):
            if not tokens:
                raise AdaptationError(f"the tokenizer gives no tokens for {name}: it is not the model's")
            _check_vocabulary(max(max(tokens), end or 0), name, vocabulary)
            starts.append(len(ids))
            names.append(name)
            ids.extend(tokens)
            if end is not None:
                ids.append(end)
    if not names:
        raise AdaptationError(f"there is no text to train on: {len(files)} file(s) hold nothing but white space")
    # A copy of its own: tensors that are handed to other processes cannot share an array's memory.
    whole = Documents(
        torch.frombuffer(ids, dtype=torch.int32).clone(), torch.tensor(starts, dtype=torch.int64), tuple(names)
    )
    return _held_out(whole, hold_out) if hold_out else whole


def _files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths name, each once.

    Raises:
        AdaptationError: a path does not exist, a folder has no text files, or no path is given.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if _plain_name(each).endswith(SUFFIXES) and each.is_file())
            if not inside:
                raise AdaptationError(
                    f"the folder {path} holds no text: files must end in {' or '.join(SUFFIXES)}, or in these and "
                    f"{' or '.join(COMPRESSED)}"
                )
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            found[path] = None
        else:
            raise AdaptationError(f"{path} does not exist: name text files, or folders with text files in them")
    if not found:
        raise AdaptationError("there is no text to train on: name at least one file or folder")
    return list(found)


def _plain_name(path: Path) -> str:
    """A file's name without the ending that says how it is compressed."""
    return path.stem if path.suffix in COMPRESSED else path.name


def _batches(files: Sequence[Path], tell: Tell | None) -> Iterator[list[tuple[str, str]]]:
    """Names and texts of the files, some at a time; files of white space alone are left out."""
    sizes = [file.stat().st_size for file in files]
    batch: list[tuple[str, str]] = []
    characters = 0
    for number, file in enumerate(files):
        if tell is not None:
            tell(f"reading {file.name}", sum(sizes[:number]), sum(sizes))
        text = _text(file)
        if not text.strip():
            continue
        batch.append((str(file), text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
    fast.no_truncation()  # it keeps what an earlier call asked for
    fast.no_padding()
    # Without the places of tokens in the text, which take half the time.
    return [list(each.ids) for each in fast.encode_batch_fast(texts, add_special_tokens=False)]


def _text(file: Path) -> str:
    """The text of a file.

    Raises:
        AdaptationError: it cannot be read, or is no text.
    """
    unpacked = COMPRESSED.get(file.suffix, open)
    try:
        with unpacked(file, "rt", encoding="utf-8") as stream:
            text = str(stream.read())
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise AdaptationError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if "\0" in text:
        raise AdaptationError(f"{file} is no text, it holds zero bytes: unpack archives first")
    return text


def _check_vocabulary(largest: int, name: str, vocabulary: int | None) -> None:
    if vocabulary is not None and largest >= vocabulary:
        raise AdaptationError(
            f"the tokenizer gives token id {largest} in {name}, and the model knows ids below {vocabulary}: "
            "take the model's own tokenizer"
        )


def _held_out(documents: Documents, share: float) -> Documents:
    """Documents split in two: those that are left, and those held out."""
    wanted = round(share * len(documents.ids))
    order = list(range(len(documents)))
    random.Random(HOLD_OUT_SEED).shuffle(order)
    kept: dict[int, Tensor] = {}
    held: dict[int, Tensor] = {}
    for number in order:
        tokens = documents.document(number)
        taken = min(wanted, len(tokens))
        wanted -= taken
        if taken < len(tokens):
            kept[number] = tokens[: len(tokens) - taken]
        if taken:
            held[number] = tokens[len(tokens) - taken :]
    if not kept or not held:
        raise AdaptationError(
            f"hold_out={share} of {len(documents.ids)} tokens leaves nothing to "
            f"{'train on' if not kept else 'hold out'}: give more text, or another share"
        )
    other = _joined(held, documents.names)
    left = _joined(kept, documents.names)
    return Documents(left.ids, left.starts, left.names, other)


def _joined(parts: dict[int, Tensor], names: Sequence[str]) -> Documents:
    """Documents out of tokens by number, in the order of the numbers."""
    numbers = sorted(parts)
    lengths = torch.tensor([0, *(len(parts[number]) for number in numbers[:-1])])
    return Documents(
        torch.cat([parts[number] for number in numbers]), lengths.cumsum(0), tuple(names[number] for number in numbers)
    )
