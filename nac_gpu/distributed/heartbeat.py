"""A heartbeat between the ranks of a process group: whether all are alive, and how far each has come.

A collective cannot distinguish a slow rank from a dead one, so its timeout must exceed the longest piece of work.
Here a background thread of each rank exchanges a few bytes with the others all the time, whatever the rank itself
computes. The exchange is quick, so its timeout can be short, and ranks may still work for as long as they need.
"""

import json
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


TIMEOUT = timedelta(seconds=20)  # a rank that is silent for this long counts as dead
_INTERVAL = 0.25  # seconds between exchanges while no rank waits
_BYTES = 2048  # size of a message
_LONGEST = 300  # characters of an error message that are sent; JSON may need six bytes for each


class RankError(RuntimeError):
    """Another rank of the process group failed or was lost."""


class Pulse:
    """The heartbeat thread of one rank. It ends once all ranks have left, or one of them failed or was lost.

    Args:
        group: a gloo group with a short timeout, which nothing else uses at the same time.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        self._group, self._size = group, dist.get_world_size(group)
        self._changed = threading.Condition()
        self._arrived, self._slowest = 0, 0  # how often this rank has called `arrive`, and the minimum over all ranks
        self._leaving, self._error = False, ""
        self._over, self._why = False, ""
        self._thread = threading.Thread(target=self._run, name="nac_gpu pulse", daemon=True)
        self._thread.start()

    def arrive(self) -> None:
        """Wait until every rank has called `arrive` as often as this one.

        Raises:
            RankError: another rank failed or was lost.
        """
        with self._changed:
            self._arrived += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or self._slowest >= self._arrived)
            if self._slowest < self._arrived:
                raise RankError(self._why)

    def leave(self, error: str = "") -> None:
        """Wait until every rank leaves, or tell the others why this rank failed.

        Args:
            error: why this rank failed; empty if it finished its work.

        Raises:
            RankError: another rank failed or was lost, and this one did not fail itself.
        """
        with self._changed:
            self._leaving, self._error = True, error
            self._changed.notify_all()
        self._thread.join()
        if self._why and not error:
            raise RankError(self._why)

    def why(self) -> str:
        """Why an exchange with the other ranks failed; waits for the heartbeat to find out, empty if it does not."""
        self._thread.join(TIMEOUT.total_seconds())
        return self._why

    def _run(self) -> None:
        try:
            while not self._over:
                self._exchange()
        except Exception as error:  # gloo raises various exception types for a rank that does not answer
            with self._changed:
                self._why = f"a rank of the process group was lost: it died or cannot be reached ({error})"
                self._over = True
                self._changed.notify_all()

    def _exchange(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._leaving or self._arrived > self._slowest, _INTERVAL)
            own = _message(self._arrived, self._leaving, self._error)
        messages = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(messages, own, group=self._group)
        states = [json.loads(bytes(message.tolist())) for message in messages]
        arrived = [state[0] for state in states]
        errors = [f"rank {rank} failed: {state[2]}" for rank, state in enumerate(states) if state[2]]
        if not errors and any(leaving and here < max(arrived) for here, leaving, _ in states):
            errors = ["one rank finished before the others did the same steps; use the same version on every rank"]
        with self._changed:
            self._slowest = min(arrived)
            self._why = "; ".join(errors)
            self._over = bool(errors) or all(state[1] for state in states)
            self._changed.notify_all()


def _message(arrived: int, leaving: bool, error: str) -> Tensor:
    text = json.dumps([arrived, leaving, error[:_LONGEST]]).encode().ljust(_BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
