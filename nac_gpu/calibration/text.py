"""Text as calibration data: batches of tokens for language models and for encoders of sentences."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, list[int]]
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")
_PLENTY = 32  # characters for each token that is wanted; of longer texts, evenly spaced documents are read


def text_batches(
    tokenizer: Callable[..., Any],
    text: str | Path | Sequence[str],
    *,
    tokens: int = 65536,
    length: int = 512,
    batch_size: int = 8,
    join: bool = True,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    r"""Calibration batches for a model that reads text.

    Documents are separated by blank lines if there are any, else each line is one. If the text has more than `tokens`
    tokens, what is used is spread over all of it.

    Args:
        tokenizer: of the model, as Hugging Face's are called: `tokenizer(text)` returns a mapping with `"input_ids"`.
        text: the text itself, the path of a file in UTF-8, or a sequence of documents.
        tokens: number of tokens to use, without padding; at least one row is made.
        length: tokens of a row.
        batch_size: rows of a batch.
        join: a text is read on from document to document, with what stands between them, and cut into rows of `length`
            tokens, as language models that predict the next token read it; the rest is dropped. The documents of a
            sequence are joined by the tokenizer's end-of-sequence token, if it has one. Otherwise each document is a
            row of its own, with special tokens, of at most `length` tokens, padded to the longest of its batch, as
            encoders of sentences read them.
        seed: decides which parts of a longer text are used.

    Returns:
        Mappings of `"input_ids"` and `"attention_mask"`, int64 [rows, tokens], and of `"token_type_ids"` for documents
        of their own, if the tokenizer makes them.

    Raises:
        ValueError: no token in the text, a number that is not positive, a file that is not UTF-8 or is named by a str.
        TypeError: the tokenizer cannot be called or returns something else, or the text is of another type.
        FileNotFoundError: no such file.

    >>> def tokenizer(text, **options):  # AutoTokenizer.from_pretrained(...), say
    ...     return {"input_ids": [ord(letter) for letter in text]}
    >>> (batch,) = nac_gpu.text_batches(tokenizer, "the cat\nthe dog", length=4)
    >>> batch["input_ids"].shape, batch["attention_mask"].shape
    (torch.Size([4, 4]), torch.Size([4, 4]))
    """
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer is {type(tokenizer).__name__}, expected one that can be called with a text, such as "
            "transformers.AutoTokenizer.from_pretrained(...)"
        )
    _check_numbers({"tokens": tokens, "length": length, "batch_size": batch_size}, seed)
    documents, generator, read = _documents(text), torch.Generator().manual_seed(seed), Reading(tokenizer)
    if join:
        between = None if not isinstance(text, str | Path) else "\n\n" if _spaced(text) else "\n"
        some = _thinned(documents, _PLENTY * tokens, _PLENTY * length)
        rows = _cut(read.joined(some, between), tokens, length, generator)
    else:
        rows = read.apart(documents, tokens, length, generator)
    if not rows:
        raise ValueError("the tokenizer finds no token in the text, expected a text in the model's language")
    parts = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
    return [read.padded(part) for part in parts]


def _check_numbers(positive: Mapping[str, int], seed: int) -> None:
    for name, value in positive.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}, expected at least 1 (an int)")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r}, expected an int")


def _documents(text: str | Path | Sequence[str]) -> list[str]:
    """The documents of a text, without those that are blank."""
    if isinstance(text, str):
        if "\n" not in text and os.path.isfile(text):
            raise ValueError(f"text={text!r} is the name of a file, expected a text, or pathlib.Path({text!r})")
        found: Sequence[str] = _split(text)
    elif isinstance(text, Path):
        found = _split(_read(text))
    elif isinstance(text, Sequence) and not isinstance(text, bytes | bytearray):
        found = text
        wrong = next((document for document in found if not isinstance(document, str)), None)
        if wrong is not None:
            raise TypeError(f"the text has a document of type {type(wrong).__name__}, expected str")
    else:
        raise TypeError(f"text is {type(text).__name__}, expected a str, a pathlib.Path or a sequence of str")
    documents = [document for document in found if document.strip()]
    if not documents:
        raise ValueError("the text is empty, expected at least one document")
    return documents


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected a text in UTF-8")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def _split(text: str) -> list[str]:
    text = text.replace("\r\n", "\n").strip()
    return [part.strip() for part in (_BLANK_LINES.split(text) if _BLANK_LINES.search(text) else text.split("\n"))]


def _spaced(text: str | Path) -> bool:
    """Whether documents are separated by blank lines."""
    found = _read(text) if isinstance(text, Path) else text
    return _BLANK_LINES.search(found.replace("\r\n", "\n").strip()) is not None


def _thinned(documents: list[str], characters: int, run: int) -> list[str]:
    """Evenly spaced runs of documents that follow each other, with about so many characters in all, and in a run."""
    step = sum(map(len, documents)) // characters
    runs: list[list[str]] = [[]]
    for document in documents:
        if sum(map(len, runs[-1])) >= run:
            runs.append([])
        runs[-1].append(document)
    return [document for part in runs[:: max(1, step)] for document in part]


def _cut(ids: list[int], tokens: int, length: int, generator: torch.Generator) -> list[Row]:
    """Full rows, evenly spaced if there are too many; what there is if it fills none."""
    there, wanted = len(ids) // length, max(1, tokens // length)
    if not there:
        return [{"input_ids": ids}] if ids else []
    if there <= wanted:
        places = list(range(there))
    else:
        shift = torch.rand((), generator=generator, dtype=torch.float64).item()
        places = [min(there - 1, int((number + shift) * there / wanted)) for number in range(wanted)]
    return [{"input_ids": ids[place * length : (place + 1) * length]} for place in places]


class Reading:
    """How a tokenizer reads documents.

    Args:
        tokenizer: as Hugging Face's; keywords that it does not take are left out.
    """

    def __init__(self, tokenizer: Callable[..., Any]) -> None:
        self._tokenizer = tokenizer
        try:
            parameters = inspect.signature(tokenizer).parameters.values()
        except (TypeError, ValueError):  # without a signature, as of C code
            parameters = ()
        self._takes = {parameter.name for parameter in parameters}
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def joined(self, documents: Sequence[str], between: str | None) -> list[int]:
        """The tokens of all documents, with this text between them; with the end-of-sequence token if it is None."""
        end = getattr(self._tokenizer, "eos_token_id", None)
        ids: list[int] = []
        for document in documents:
            found = self._read(document + (between or ""), add_special_tokens=False)["input_ids"]
            ids += [end] if between is None and ids and found and end is not None else []
            ids += found
        return ids

    def apart(self, documents: Sequence[str], tokens: int, length: int, generator: torch.Generator) -> list[Row]:
        """A row for each document, in their order; drawn at random if there are too many."""
        order = torch.randperm(len(documents), generator=generator).tolist()
        rows: dict[int, Row] = {}
        count = 0
        for place in order:
            if count >= tokens:
                break
            read = self._read(documents[int(place)], truncation=True, max_length=length)
            row = {name: values[:length] for name, values in read.items() if name != "attention_mask"}
            if row["input_ids"]:
                rows[place] = row
                count += len(row["input_ids"])
        return [rows[place] for place in sorted(rows)]

    def padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as a batch, padded to the longest of them."""
        longest = max(len(row["input_ids"]) for row in rows)
        left = getattr(self._tokenizer, "padding_side", "right") == "left"
        masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        batch = {}
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if all(name in row for row in masked):
                fill = self._fill(name)
                gaps = [[fill] * (longest - len(row[name])) for row in masked]
                pairs = zip(masked, gaps, strict=True)
                batch[name] = torch.tensor([gap + row[name] if left else row[name] + gap for row, gap in pairs])
        return batch

    def _fill(self, name: str) -> int:
        """What stands in the gaps of a tensor: the padding token, or any other, since the mask hides it."""
        if name == "attention_mask":
            return 0
        names = ("pad_token_id", "eos_token_id") if name == "input_ids" else ("pad_token_type_id",)
        found = (getattr(self._tokenizer, attribute, None) for attribute in names)
        return next((value for value in found if value is not None), 0)

    def _read(self, document: str, **options: Any) -> Row:
        """The tokenizer's lists for a document.

        Raises:
            TypeError: it returns something else.
        """
        options["verbose"] = False  # a joined text may be longer than what the model reads at once
        known = {name: value for name, value in options.items() if self._takes_all or name in self._takes}
        read = self._tokenizer(document, **known)
        if not isinstance(read, Mapping) or "input_ids" not in read:
            raise TypeError(
                f"the tokenizer returns {type(read).__name__}, expected a mapping with 'input_ids', as the tokenizers "
                "of transformers return"
            )
        return {name: list(_numbers(read[name])) for name in ("input_ids", "token_type_ids") if name in read}


def _numbers(values: Any) -> Iterator[int]:
    """The numbers in a list, which may be a tensor or inside of another list.

    Raises:
        TypeError: there is something else than numbers.
    """
    for value in values:
        if isinstance(value, str):
            raise TypeError(f"the tokenizer returns {value!r} among its tokens, expected their numbers")
        if isinstance(value, int) or getattr(value, "ndim", 1) == 0:
            yield int(value)
        else:
            yield from _numbers(value)
