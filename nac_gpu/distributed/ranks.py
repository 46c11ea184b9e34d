"""Divides work among several processes that compress one model together, and gives all of them the same results.

Processes communicate only if the caller passes a process group. Using the default group whenever one exists would hang
a script that compresses on rank 0 alone.

Results are sent through a separate gloo group, by way of CPU memory: they are few and small, gloo works beside any
other backend, and it raises an error where NCCL would end the process.
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
_PART = 1 << 26  # bytes per broadcast: large results are split, so that each broadcast takes less than TIMEOUT


class Ranks:
    """The processes that work together; this base class is a single process, which does all work itself.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank, size = 0, 1

    def share(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """The result of `work` for each item, in order. One rank computes each result, and all ranks receive it.

        Args:
            items: the same on every rank.
            work: its result must depend only on the item, and `torch.save` must be able to save it.

        Raises:
            RankError: another rank failed or was lost.
        """
        for item in items:
            yield work(item)

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this rank works on in `share`."""
        return items[self.rank :: self.size]

    def sent(self, value: T, source: int = 0) -> T:
        """Broadcast: the value of rank `source`, on every rank.

        Raises:
            RankError: as for `share`.
        """
        return value

    def gathered(self, value: T) -> list[T]:
        """All-gather: the values of all ranks, on every rank.

        Raises:
            RankError: as for `share`.
        """
        return [self.sent(value, source) for source in range(self.size)]


ALONE = Ranks()


class Peers(Ranks):
    """One of several processes; created by `joined`.

    Args:
        process_group: the processes.
        device: of this process's model; received tensors that were not on a CPU are moved there.
    """

    def __init__(self, process_group: "ProcessGroup", device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("this process is not in process_group, expected a call on its members only")
        self._device = device
        dist.barrier(process_group)  # ranks may arrive late: this waits with the timeout of the user's own group
        pulse, self._group = _side_groups(process_group)
        self.pulse = Pulse(pulse)

    def share(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """See `Ranks.share`."""
        items = list(items)
        own = {number: work(items[number]) for number in self.own(range(len(items)))}
        for number in range(len(items)):
            source = number % self.size
            # only the value of the source is used, so the other ranks pass None
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
    """Two gloo groups of the same processes: one for the heartbeat, one for results.

    They are cached for as long as the process group exists. A new group of the same processes would get the name of a
    destroyed one, and with it stale entries of the store.
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
    """A context in which this process works together with the others of a group; alone if there is none.

    An exception on one rank becomes a `RankError` on the others: at once if they wait, else when they finish their own
    work. A rank that died or cannot be reached is noticed within twice `TIMEOUT`.

    Args:
        process_group: the processes, all of which must enter this context; None for this process alone.
        model: its parameters are on the device of this process.

    Raises:
        ValueError: this process is not in the group.
        RankError: another rank failed or was lost.
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
