"""Several processes compress one model together: work is divided among them, and all get the same results.

Nothing happens here without a process group in the call: a library that talks to other processes because there happen
to be some would hang in a script that compresses on rank 0 alone.

Results go over a gloo group of their own, through the memory of the hosts: they are few and small, that works beside
any backend, and gloo gives an error where NCCL would end the process.
"""

import contextlib
import io
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from nac_gpu.distributed.heartbeat import TIMEOUT, Pulse, RankError
from nac_gpu.network.running import device_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


T = TypeVar("T")
R = TypeVar("R")
_PART = 1 << 26  # bytes sent at once, each of which may take as long as a rank may be silent


class Ranks:
    """One process alone: it does everything itself.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank, size = 0, 1

    def share(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """What the work makes of each item, in order; each item is worked on by one rank, and all get its result.

        Args:
            items: the same on every rank.
            work: its result depends on nothing but the item, and can be saved by `torch.save`.

        Raises:
            RankError: another rank failed, or was lost.
        """
        for item in items:
            yield work(item)

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that `share` lets this rank work on."""
        return items[self.rank :: self.size]

    def sent(self, value: T, source: int = 0) -> T:
        """The value of one rank, on every rank.

        Raises:
            RankError: as `share`.
        """
        return value

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, on every rank.

        Raises:
            RankError: as `share`.
        """
        return [self.sent(value, source) for source in range(self.size)]


ALONE = Ranks()


class Peers(Ranks):
    """One of several processes; made by `joined`.

    Args:
        process_group: the processes.
        device: where this one works.
    """

    def __init__(self, process_group: "ProcessGroup", device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("this process is not in process_group, expected a call on its members only")
        self._device = device
        dist.barrier(process_group)  # they may come late, for as long as the user's own timeout lets them
        pulse, self._group = _side_groups(process_group)
        self.pulse = Pulse(pulse)

    def share(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """See `Ranks.share`."""
        items = list(items)
        own = {number: work(items[number]) for number in self.own(range(len(items)))}
        for number in range(len(items)):
            source = number % self.size
            # only what is sent is looked at, so the others may give anything
            yield self.sent(own.pop(number) if source == self.rank else None, source)  # pyright: ignore[reportReturnType]

    def sent(self, value: T, source: int = 0) -> T:
        """See `Ranks.sent`."""
        self.pulse.arrive()
        try:
            return self._sent(value, source)
        except RuntimeError as error:
            raise RankError(self.pulse.why() or f"the exchange with rank {source} failed: {error}") from error

    def _sent(self, value: T, source: int) -> T:
        data = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self.rank == source:
            file = io.BytesIO()
            torch.save(value, file)
            data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        length = torch.tensor([len(data)], device="cpu")
        dist.broadcast(length, group=self._group, group_src=source)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        for part in data.split(_PART):
            dist.broadcast(part, group=self._group, group_src=source)
        if self.rank == source:
            return value
        return torch.load(io.BytesIO(data.numpy().tobytes()), map_location=self._here, weights_only=False)  # pyright: ignore[reportArgumentType]

    def _here(self, storage: torch.UntypedStorage, place: str) -> torch.UntypedStorage:
        return storage if place == "cpu" else storage.to(device=self._device)


_groups: "weakref.WeakKeyDictionary[ProcessGroup, tuple[ProcessGroup, ProcessGroup]]" = weakref.WeakKeyDictionary()


def _side_groups(process_group: "ProcessGroup") -> "tuple[ProcessGroup, ProcessGroup]":
    """Two gloo groups of the same processes: for the pulse, and for results.

    They are kept as long as the process group, because PyTorch gives a group the name of a destroyed one of the same
    processes, and with the name what is left of it in the store.
    """
    if process_group not in _groups:
        members = dist.get_process_group_ranks(process_group)
        made = [
            dist.new_group(members, timeout=TIMEOUT, backend="gloo", use_local_synchronization=True) for _ in range(2)
        ]
        pulse, results = (group for group in made if isinstance(group, dist.ProcessGroup))
        _groups[process_group] = pulse, results
    return _groups[process_group]


@contextlib.contextmanager
def joined(process_group: "ProcessGroup | None", model: nn.Module) -> Iterator[Ranks]:
    """Work together with the other processes of a group; alone without one.

    What a rank raises here is raised there, and is a `RankError` on the others: at once where they wait, else as soon
    as they have done their own part. A rank that died or cannot be reached is noticed within twice `TIMEOUT`.

    Args:
        process_group: the processes, all of which come here.
        model: says by its parameters where this one works.

    Raises:
        ValueError: this process is not in the group.
        RankError: another rank failed, or was lost.
    """
    if process_group is None:
        yield ALONE
        return
    device = device_of(model)
    peers = Peers(process_group, device)
    try:
        yield peers
    except BaseException as error:
        peers.pulse.leave(f"{type(error).__name__}: {error}")
        raise
    peers.pulse.leave()
