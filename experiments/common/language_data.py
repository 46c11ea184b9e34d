"""Texts for language models: windows of tokens, and their perplexity; sentences, and how well embeddings agree."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: What a model is called with, by the names of its arguments.
Batch = dict[str, Tensor]
#: Words of a sentence: what is shorter is a heading, what is longer may be a list.
_WORDS = range(5, 65)


def batched(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many values, the last one of what is left."""
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part


def spread(values: Any, count: int | None) -> Any:
    """So many values (rows of a tensor or of a list), at even distances; all of them for None or 0."""
    if not count or count >= len(values):
        return values
    chosen = [number * len(values) // count for number in range(count)]
    return values[torch.tensor(chosen)] if isinstance(values, Tensor) else [values[number] for number in chosen]


def tokens_of(tokenizer: Any, path: Path) -> Tensor:
    """All tokens of a text file, without any that mark its beginning or end."""
    text = path.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows(tokens: Tensor, length: int) -> Tensor:
    """Tokens as windows that do not overlap, [windows, length]; what does not fill a window is left out.

    Raises:
        ValueError: there are fewer tokens than a window has.
    """
    if len(tokens) < length:
        raise ValueError(f"a text has {len(tokens)} tokens, expected at least one window of {length}")
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.inference_mode()
def perplexity(model: nn.Module, texts: Tensor, rows: int = 2) -> float:
    """The perplexity of windows: each token but the first is predicted from those before it in its window.

    Args:
        model: predicts the next token (`transformers`' causal language models).
        texts: windows of tokens.
        rows: windows at a time: the logits of a large vocabulary need much memory.
    """
    total = 0.0
    for batch in texts.split(rows):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    mean = total / (texts.numel() - len(texts))
    return math.exp(mean) if mean < 700 else math.inf


def sentences_of(path: Path) -> list[str]:
    """The different sentences of a text file, in its order, without headings and very long ones."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parts = (part.strip() for line in lines for part in re.split(r"(?<=[.!?])\s+", line))
    return list(dict.fromkeys(part for part in parts if len(part.split()) in _WORDS))


def sentence_batches(tokenizer: Any, sentences: Sequence[str], length: int, rows: int = 32) -> list[Batch]:
    """Sentences as padded batches; those of a batch are about as long as each other, so the order changes."""
    ordered = sorted(sentences, key=len)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(part, **options)) for part in batched(ordered, rows)]


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


@torch.inference_mode()
def embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Sentences as vectors of length 1: the mean of the last hidden states over all tokens that are not padding."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch).last_hidden_state
        found.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def agreement(original: Tensor, small: Tensor) -> dict[str, float]:
    """How well embeddings of the same sentences, [sentences, width], agree with the original ones.

    Returns:
        "cosine": mean cosine of a sentence's two embeddings; "rank correlation": Spearman's, of the cosines of all
        pairs of sentences; "same neighbour": share of the sentences whose nearest neighbour is the same sentence.
    """
    before, after = (found.double() @ found.double().T for found in (original, small))
    pairs = tuple(torch.triu_indices(len(original), len(original), offset=1))
    ranks = torch.stack([_ranks(found[pairs]) for found in (before, after)])
    nearest = [found.fill_diagonal_(-math.inf).argmax(1) for found in (before, after)]
    return {
        "cosine": float((original * small).sum(1).mean()),
        "rank correlation": float(torch.corrcoef(ranks)[0, 1]),
        "same neighbour": float((nearest[0] == nearest[1]).double().mean()),
    }


def _ranks(values: Tensor) -> Tensor:
    """The ranks of values; equal ones share the mean of theirs."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[places].double()
