"""Layers whose names differ only in the numbers of their blocks, shown as one line.

A number of a block is a whole part of a name, but not the last one: 3 in `model.layers.3.mlp.gate_proj`, none in
`features.3`.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

_Item = TypeVar("_Item")
_BLOCK = re.compile(r"(?<![^.])\d+(?=\.)")
_MARK = re.compile(r"\0(\d+)\0")  # stands for the number of a block, the first one of a name, the second, ...
_FEW = 4  # so many of a kind are shown one by one


def blocks_of(name: str) -> tuple[int, ...]:
    """The numbers of the blocks that a layer is in.

    >>> blocks_of("encoder.block.3.layer.1.wi")
    (3, 1)
    """
    return tuple(int(number) for number in _BLOCK.findall(name))


def unnumbered(text: str, name: str) -> str:
    """A text with a mark for each block of a layer, wherever it names one of these blocks.

    Args:
        text: the layer's own name, or what is said of it.
        name: of the layer.

    >>> name, other = "layers.3.mlp.gate", "layers.4.mlp.gate"
    >>> unnumbered("read by layers.3.mlp.down", name) == unnumbered("read by layers.4.mlp.down", other)
    True
    """
    blocks = list(_BLOCK.finditer(name))
    for count in range(len(blocks), 0, -1):  # the innermost block first: its name contains those of the others
        marked, end = "", 0
        for place, block in enumerate(blocks[:count]):
            marked += f"{name[end : block.start()]}\0{place}\0"
            end = block.end()
        text = re.sub(rf"(?<![\w.]){re.escape(name[:end])}(?!\w)", lambda _, marked=marked: marked, text)
    return text


def numbered(text: str, names: Sequence[str]) -> str:
    """A text with marks, as `unnumbered` makes it, with the numbers of all these layers' blocks.

    >>> numbered(unnumbered("layers.0.mlp", "layers.0.mlp"), ["layers.0.mlp", "layers.1.mlp", "layers.4.mlp"])
    'layers.{0..1, 4}.mlp'
    """
    numbers = list(zip(*map(blocks_of, names), strict=True))
    return _MARK.sub(lambda mark: _ranges(numbers[int(mark[1])]), text)


def counted(names: Sequence[str]) -> str:
    """How many layers a pattern stands for, where its numbers alone would mean more; else nothing."""
    combinations = 1
    for numbers in zip(*map(blocks_of, names), strict=True):
        combinations *= len(set(numbers))
    return "" if combinations == len(names) else f" ({len(names)} of them)"


def by_kind(items: Iterable[_Item], kind: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """Items of a kind together, where the first one was, if there are more than a few of them; each other one alone.

    >>> by_kind("abacaada", str)
    [['a', 'a', 'a', 'a', 'a'], ['b'], ['c'], ['d']]
    """
    found: dict[Hashable, list[_Item]] = {}
    for item in items:
        found.setdefault(kind(item), []).append(item)
    rows: list[list[_Item]] = []
    for item in items:
        alike = found[kind(item)]
        if len(alike) <= _FEW:
            rows.append([item])
        elif alike[0] is item:
            rows.append(alike)
    return rows


def spread(values: Sequence[int]) -> str:
    """Numbers as one, or as their range and mean.

    >>> spread([700, 1200, 950])
    '700 to 1,200 (mean 950)'
    """
    least, most = min(values), max(values)
    mean = round(sum(values) / len(values))
    return f"{least:,}" if least == most else f"{least:,} to {most:,} (mean {mean:,})"


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in braces, with dots for those in between; a single one without."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    runs = [[number for _, number in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    return f"{{{', '.join(str(run[0]) if len(run) == 1 else f'{run[0]}..{run[-1]}' for run in runs)}}}"
