"""Text as calibration data: documents, rows, padding, and what is refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tinytext import WORDS, words

import nac_gpu as nac

END, PAD = WORDS.index("</s>"), WORDS.index("<pad>")


def numbers(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_documents_are_joined_and_cut_into_full_rows() -> None:
    text = "the cat sat\n\nthe dog\nsat\n \n\non the mat"
    (batch,) = nac.text_batches(words(), text, length=4)
    joined = [*numbers("the cat sat"), *numbers("the dog sat"), *numbers("on the mat")]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [joined[:4], joined[4:8]], "the rest is dropped"
    assert batch["attention_mask"].tolist() == [[1] * 4] * 2
    (short,) = nac.text_batches(words(), text, length=100)
    assert short["input_ids"].tolist() == [joined], "unless there is no full row"
    documents = ["the cat sat", "the dog sat", "on the mat"]
    (ended,) = nac.text_batches(words(), documents, length=11)
    assert ended["input_ids"].tolist() == [[*joined[:3], END, *joined[3:6], END, *joined[6:]]]
    (plain,) = nac.text_batches(words(eos_token=None), documents, length=9)
    assert plain["input_ids"].tolist() == [joined]


def test_lines_are_documents_where_none_is_blank(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffthe cat\r\nthe dog\r\n".encode())
    for text in (path, "the cat\nthe dog", ["the cat", "the dog"], ("the cat", " ", "the dog")):
        (batch,) = nac.text_batches(words(), text)
        between = [] if isinstance(text, str | Path) else [END]
        assert batch["input_ids"].tolist() == [[*numbers("the cat"), *between, *numbers("the dog")]]
    (batch,) = nac.text_batches(words(), ["the cat\n\nthe dog"])
    assert END not in batch["input_ids"], "what is given as one document is one"


def test_rows_are_spread_over_a_longer_text() -> None:
    text = [f"{'the ' * place}cat {'sat ' * (99 - place)}" for place in range(100)]
    batches = nac.text_batches(words(eos_token=None), text, tokens=1050, length=100, batch_size=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    places = [row.index(WORDS.index("cat")) for batch in batches for row in batch["input_ids"].tolist()]
    assert all(later - earlier == 10 for earlier, later in pairwise(places))
    found = [nac.text_batches(words(), text, tokens=1050, length=100, seed=seed)[0]["input_ids"] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    (batch,) = nac.text_batches(words(), text, tokens=5, length=100)
    assert batch["input_ids"].shape == (1, 100)


def test_of_very_long_texts_only_some_documents_are_read() -> None:
    read = []

    def tokenizer(text: str) -> dict[str, list[int]]:
        read.append(text)
        return {"input_ids": [int(text)] * 1000}

    documents = [f"{number:09}" for number in range(6400)]
    (batch,) = nac.text_batches(tokenizer, documents, tokens=16, length=2)
    assert len(read) == 64
    assert batch["input_ids"][:, 0].tolist() == sorted(set(batch["input_ids"][:, 0].tolist()))
    assert batch["input_ids"].max() > 5600


def test_documents_apart_are_padded_and_masked() -> None:
    texts = ["the cat sat on the mat", "the dog", "a", "the dog sat"]
    first, second = nac.text_batches(words(specials=True), texts, length=5, batch_size=3, join=False)
    start = WORDS.index("<s>")
    assert first["input_ids"].tolist() == [
        [start, *numbers("the cat sat"), END],  # what special tokens there are is left to the tokenizer
        [start, *numbers("the dog"), END, PAD],
        [start, WORDS.index("<unk>"), END, PAD, PAD],
    ]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[start, *numbers("the dog sat"), END]]
    assert set(first) == {"input_ids", "attention_mask"}


def test_types_of_tokens_and_the_side_of_padding_are_the_tokenizers() -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = words(model_input_names=names, padding_side="left", pad_token=None)
    (batch,) = nac.text_batches(tokenizer, "the cat\nsat", join=False)
    assert batch["token_type_ids"].tolist() == [[0, 0], [0, 0]]
    assert batch["input_ids"].tolist() == [numbers("the cat"), [END, *numbers("sat")]], "any token pads where none does"
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_documents_apart_are_taken_until_there_are_enough() -> None:
    texts = ["the " * (1 + number % 7) for number in range(500)]
    batches = nac.text_batches(words(), texts, tokens=400, join=False)
    rows = [int(row.sum()) for batch in batches for row in batch["attention_mask"]]
    assert 400 <= sum(rows) < 407
    assert rows != [1 + number % 7 for number in range(len(rows))], "not only the first ones"


@pytest.mark.parametrize("join", [True, False])
def test_long_documents_bring_no_warning(join: bool) -> None:
    """Transformers warns of texts that are longer than what the model reads, but only rows are given to it."""
    tokenizer = words(model_max_length=4)
    nac.text_batches(tokenizer, "the cat " * 50, length=4, join=join)
    assert not tokenizer.deprecation_warnings, "it notes there what it has warned of"
    tokenizer("the cat " * 50)
    assert tokenizer.deprecation_warnings


@pytest.mark.parametrize("wrap", [torch.tensor, lambda ids: [ids], lambda ids: torch.tensor([ids])])
def test_any_callable_will_do(wrap: Any) -> None:
    def plain(text: str) -> dict[str, Any]:
        return {"input_ids": wrap([len(word) for word in text.split()])}

    (batch,) = nac.text_batches(plain, "one three\nfour", length=2, join=False)
    assert batch["input_ids"].tolist() == [[3, 5], [4, 0]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, "x"), {}, "tokenizer is NoneType, expected one that can be called"),
        ((words(), " \n \n"), {}, "the text is empty, expected at least one document"),
        ((words(), []), {}, "the text is empty"),
        ((words(), b"the cat"), {}, r"text is bytes, expected a str, a pathlib\.Path or a sequence of str"),
        ((words(), 3), {}, "text is int, expected"),
        ((words(), ["the", 3]), {}, "has a document of type int, expected str"),
        ((words(), "x"), {"tokens": 0}, "tokens=0, expected at least 1"),
        ((words(), "x"), {"length": -1}, "length=-1, expected at least 1"),
        ((words(), "x"), {"batch_size": True}, "batch_size=True, expected at least 1"),
        ((words(), "x"), {"length": 2.0}, r"length=2\.0, expected at least 1"),
        ((words(), "x"), {"seed": "0"}, "seed='0', expected an int"),
        ((lambda text: [1, 2], "x"), {}, "the tokenizer returns list, expected a mapping with 'input_ids'"),
        ((lambda text: {"input_ids": ["x"]}, "x"), {}, "the tokenizer returns 'x' among its tokens"),
        ((lambda text: {"input_ids": []}, "x"), {}, "the tokenizer finds no token in the text"),
        ((lambda text: {"input_ids": []}, "x"), {"join": False}, "the tokenizer finds no token in the text"),
    ],
)
def test_what_is_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        nac.text_batches(*arguments, **options)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file, expected a text in UTF-8"):
        nac.text_batches(words(), tmp_path / "none.txt")
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match=r"binary\.txt is not a text in UTF-8"):
        nac.text_batches(words(), path)
    with pytest.raises(ValueError, match=r"is the name of a file, expected a text, or pathlib\.Path"):
        nac.text_batches(words(), str(path))


def test_a_language_model_is_compressed_on_text() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).eval()
    batches = nac.text_batches(words(), "the cat sat on the mat\nthe dog sat on the cat", length=4)
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    small = nac.compress(model, inputs, width=0.5, calibration=batches, refine=2)
    assert small.config.intermediate_size == 24
