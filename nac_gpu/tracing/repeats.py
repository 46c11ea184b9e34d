"""Which values of a tensor are the same because one value was expanded or repeated.

A mask with one value for each position is often expanded over the heads, and then reshaped to one dimension for batch
and heads. Its values do not differ between heads, whatever they are. Comparing them would not tell: a mask may be zero
in the example inputs only. So it is followed where values come from, with planes of numbers: positions with the same
number in every plane hold the same value.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.tracing.atoms import Labels, compact, product, varying

#: Number of values. Of a larger tensor, which takes long to follow, all values may differ.
LARGEST = 1 << 22


def repeats(tensor: Tensor, labels: Labels) -> bool:
    """Whether any values of a tensor are known to be the same."""
    expanded = tensor.layout == torch.strided and 0 in tensor.stride()
    return labels.uniform or labels.repeats is not None or expanded


def combined(planes: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Planes of numbers that tell the same positions apart, no two varying along the same dimension."""
    found: list[Tensor] = []
    for plane in planes:
        small = compact(plane)
        if small is None or not varying(small):
            continue
        over = [other for other in found if set(varying(other)) & set(varying(small))]
        found = [other for other in found if not set(varying(other)) & set(varying(small))]
        found.append(product([*over, small]) if over else small)
    return tuple(found)


def moved(planes: Iterable[Tensor], shape: torch.Size, move: Callable[[Tensor], object]) -> list[tuple[Tensor, ...]]:
    """The planes of each output of an operation that moves the values of a tensor of this shape."""
    outputs: list[list[Tensor]] = []
    for plane in (torch.zeros([1] * len(shape), dtype=torch.int64), *planes):
        results = [v for v in pytree.tree_leaves(move(plane.expand(shape))) if isinstance(v, Tensor)]
        outputs = outputs or [[] for _ in results]
        for own, result in zip(outputs, results, strict=True):
            own.append(result)
    return [combined(own) for own in outputs]
