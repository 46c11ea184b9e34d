"""Progress bars where tqdm is installed; where it is not, as on a borrowed machine, the work goes on without."""

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def progress(items: Iterable[T], label: str, unit: str) -> Iterable[T]:
    """The items, and how far one has come."""
    return items if tqdm is None else tqdm(items, desc=label, unit=unit)


def say(line: str) -> None:
    """A line on standard error, above the bar."""
    print(line, file=sys.stderr, flush=True) if tqdm is None else tqdm.write(line, file=sys.stderr)
