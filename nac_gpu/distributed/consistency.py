"""Checks that all ranks have the same arguments and results; collects the calibration data of all ranks."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.distributed.ranks import Ranks
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import content

_SHOWN = 100  # characters of an argument that an error message shows


def digest(*values: object) -> str:
    """A hash of the bits of all tensors, and of the `repr` of everything else."""
    found = hashlib.blake2b(digest_size=16)
    leaves, structure = pytree.tree_flatten(values)
    found.update(repr(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(content(leaf))
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def check_arguments(ranks: Ranks, given: Mapping[str, object]) -> None:
    """Check that every rank was given the same arguments.

    Args:
        ranks: the processes.
        given: arguments by name.

    Raises:
        ValueError: an argument differs; names the first one.
    """
    if ranks.size == 1:
        return
    every = ranks.gathered({name: repr(value) for name, value in given.items()})
    for rank, others in enumerate(every):
        for name, text in every[0].items():
            if others[name] != text:
                raise ValueError(
                    f"rank {rank} was given {name}={others[name][:_SHOWN]}, rank 0 {name}={text[:_SHOWN]}; expected "
                    "the same arguments on every rank"
                )


def without_values(inputs: ExampleInputs) -> str:
    """Example inputs as text: dtype and shape of tensors, and everything else by its `repr`."""

    def shape(leaf: object) -> object:
        return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

    return repr(pytree.tree_map(shape, inputs))


def union(batches: Sequence[Any], ranks: Ranks) -> list[Any]:
    """The calibration batches of all ranks, in order of ranks; a single copy if all ranks have the same batches."""
    if ranks.size == 1 or len(set(ranks.gathered(digest(list(batches))))) == 1:
        return list(batches)
    return [batch for source in range(ranks.size) for batch in ranks.sent(batches, source)]


def check_same(what: str, value: object, ranks: Ranks) -> None:
    """Check that a result is the same on all ranks, even if their hardware differs.

    Args:
        what: what the result is, for the error message.
        value: the result of this rank.
        ranks: the processes.

    Raises:
        RuntimeError: the results differ.
    """
    if ranks.size > 1:
        found = ranks.gathered(digest(value))
        if len(set(found)) > 1:
            rank = next(rank for rank, other in enumerate(found) if other != found[0])
            raise RuntimeError(f"rank {rank} made another {what} than rank 0; expected the same on every rank")
