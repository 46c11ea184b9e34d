"""Steps that the result can do without: where one fails, all ranks go on without it, and the plan says so.

The default way runs the user's code as nobody else does: with gradients, on other inputs, in larger batches. That code
may raise anything, so any exception counts as a failure of the step, apart from those that are not about the model:
interruptions, a lost rank, too little memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from nac_gpu.distributed.ranks import ALONE, RankError, Ranks

T = TypeVar("T")
R = TypeVar("R")
_LONGEST = 100  # characters of an error
_NO_MEMORY = ("can't allocate memory", "not enough memory")  # PyTorch's allocators for CPUs raise RuntimeError


class StepError(Exception):
    """A step failed, and all ranks know; the message is a short line."""


def attempt(step: Callable[[Ranks], R], ranks: Ranks = ALONE, *, survives_memory: bool = False) -> R:
    """The result of a step that may fail.

    Args:
        step: is called on every rank, with the ranks among which it may divide its work.
        ranks: the processes.
        survives_memory: too little memory is a failure like any other.

    Raises:
        StepError: the step failed on some rank; every rank raises the same.
        RankError: another rank failed in another way, or was lost.
    """
    own = _outcome(lambda: step(_Agreeing(ranks, survives_memory)), survives_memory)
    for failure in ranks.gathered(own.failure):
        if failure is not None:
            raise StepError(failure)
    return own.value()


@dataclass(frozen=True)
class _Outcome(Generic[R]):
    """The result of some work in a list of one, or why it failed."""

    results: tuple[R, ...] = ()
    failure: str | None = None

    def value(self) -> R:
        if self.failure is not None:
            raise StepError(self.failure)
        return self.results[0]


def _outcome(work: Callable[[], R], survives_memory: bool) -> _Outcome[R]:
    try:
        return _Outcome((work(),))
    except RankError:
        raise
    except Exception as error:
        if _is_about_memory(error) and not survives_memory:
            raise
        return _Outcome(failure=_in_short(error))


class _Agreeing(Ranks):
    """Ranks of which none fails alone: an exception in what they share is a `StepError` on all of them."""

    def __init__(self, ranks: Ranks, survives_memory: bool) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks, self._survives_memory = ranks, survives_memory

    def share(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """See `Ranks.share`."""
        for outcome in self._ranks.share(items, lambda item: _outcome(lambda: work(item), self._survives_memory)):
            yield outcome.value()

    def sent(self, value: T, source: int = 0) -> T:
        """See `Ranks.sent`."""
        return self._ranks.sent(value, source)


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _in_short(error: Exception) -> str:
    if isinstance(error, StepError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:_LONGEST] if first else type(error).__name__
