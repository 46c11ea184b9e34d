"""How well a smaller network answers as the original does, on inputs.

What counts are the answers: logits, embeddings, predictions. Caches, states that are handed back to be handed in again,
losses, and what a model returns besides only if asked for (hidden states, attention weights) do not count: a language
model returns two tensors of every layer beside its logits. Padding does not count either. Of an encoder's last states
their mean over the positions counts, too: it is what most encoders of sentences are read by.

The answer of a language model is a distribution of the next token, so its distance is the Kullback-Leibler divergence.
All other answers are compared by their mean squared difference, relative to their variance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.network.comparing import change, mean_change
from nac_gpu.network.memory import trim
from nac_gpu.network.padding import mean_of_positions, padding_of, without_padding
from nac_gpu.network.precision import floating
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, call, evaluating

#: Values of answers that are compared: of larger ones, evenly spaced positions.
MOST = 1 << 26
_STATES = "last_hidden_state"  # of an encoder, by position
_NO_ANSWERS = ("past_key_values", "cache", "mems", "state", "loss", "hidden_states", "attentions")


@dataclass(frozen=True)
class Answers:
    """What a network answers to a batch.

    Attributes:
        values: tensors.
        words: they are logits of tokens, [positions, vocabulary].
    """

    values: tuple[Tensor, ...]
    words: bool = False


def answers(model: nn.Module, batch: ExampleInputs, most: int = MOST) -> Answers:
    """What a network answers to a batch, without padding; a part of the positions where it is very large.

    Args:
        model: in eval mode.
        batch: its inputs.
        most: values of an answer.
    """
    return answers_in(call(model, batch), batch, most)


def answers_in(returned: Any, batch: ExampleInputs, most: int = MOST) -> Answers:
    """The same, from what the network returned."""
    mask = padding_of(batch)
    logits = returned.get("logits") if isinstance(returned, Mapping) else None
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[2] > 1 and logits.is_floating_point():
        found = without_padding(logits, mask)
        return Answers((_part(found.flatten(0, -2), most),), words=True)
    values = [value for value in _counting(returned) if value.is_floating_point() or value.is_complex()]
    states = returned.get(_STATES) if isinstance(returned, Mapping) else None
    pooled = [mean_of_positions(states, mask)] if isinstance(states, Tensor) and states.ndim == 3 else []
    return Answers((*(_part(without_padding(value, mask), most) for value in values), *pooled))


def _counting(returned: Any) -> Iterator[Tensor]:
    """The tensors among what a network returned that are answers; all of them if none is known to be."""
    if isinstance(returned, Tensor):
        yield returned
        return
    if isinstance(returned, Mapping):
        named = {key: value for key, value in returned.items() if _is_answer(str(key))}
        returned = named or dict(returned)
        parts = list(returned.values())
    else:
        parts = list(returned) if isinstance(returned, tuple | list) else [returned]
    some = [part for part in parts if not type(part).__name__.endswith("Cache")]
    found = [value for part in some or parts for value in tensors_in(part)]
    yield from [value for value in found if value.ndim] or found


def _is_answer(key: str) -> bool:
    """Whether what a network returns by this name is an answer."""
    return key == _STATES or not any(word in key for word in _NO_ANSWERS)


def _part(values: Tensor, most: int) -> Tensor:
    """Evenly spaced rows of a tensor with too many values."""
    if values.numel() <= most or values.ndim < 2:
        return values
    step = -(-values.numel() // most)
    return values[::step].clone() if len(values) >= step else values  # a view would keep all of them


def apart(found: Answers, expected: Answers) -> Tensor | None:
    """How far answers are from the original's, a scalar: see the description of this module.

    Returns:
        None if they cannot be compared; -1 if there is nothing to compare.
    """
    if found.words and expected.words and found.values[0].shape == expected.values[0].shape:
        return _divergence(found.values[0], expected.values[0])
    return change(found.values, expected.values)


def _divergence(found: Tensor, expected: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of distributions given by logits [positions, vocabulary], in nats."""
    total = found.new_zeros((), dtype=torch.float32)
    for now, then in zip(found.split(256), expected.split(256), strict=True):
        log_then = floating(then).log_softmax(1)
        total = total + (log_then.exp() * (log_then - floating(now).log_softmax(1))).sum()
    return total / max(1, len(found))


def all_answers(model: nn.Module, batches: Sequence[ExampleInputs]) -> list[Answers]:
    """What a network answers to several batches, in the form that `judged` takes."""
    with evaluating(model):
        return [answers(model, batch, _each(batches)) for batch in batches]


def judged(model: nn.Module, batches: Sequence[ExampleInputs], expected: Sequence[Answers]) -> float | None:
    """How far a network's answers are from the original's, on average over batches; None if they cannot be compared.

    Args:
        model: the network.
        batches: inputs.
        expected: `all_answers` of the original.
    """
    pairs, most = zip(batches, expected, strict=True), _each(batches)
    with evaluating(model):
        found = mean_change(apart(answers(model, batch, most), then) for batch, then in pairs)
    trim()
    return found


def _each(batches: Sequence[ExampleInputs]) -> int:
    """Values of the answer to one batch, so that those to all of them fit in memory."""
    return max(1, MOST // max(1, len(batches)))
