"""Several processes of one experiment, as `torchrun` starts them; without it, one process alone.

They train on parts of the same batches, compress together, and measure parts of the test images. BatchNorm normalises
by a process' own part, so a training is like that of one process, not the same. The first process alone writes and is
heard.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn


def device(name: str | None = None) -> torch.device:
    """Where this process works: by default CUDA if there is any; each process of a machine has a GPU of its own."""
    place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(own)) if own and place.type == "cuda" and place.index is None else place


@contextlib.contextmanager
def together(place: torch.device) -> Iterator[None]:
    """Talk to the other processes, if `torchrun` started this one.

    An error leaves the process group as it is: there is nobody to say goodbye to, `torchrun` ends the others.

    Args:
        place: where this process works.
    """
    if "RANK" not in os.environ:
        yield
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    with open(os.devnull, "w") as nobody, contextlib.nullcontext() if first() else contextlib.redirect_stdout(nobody):
        yield
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first() -> bool:
    """Whether this is the process that writes."""
    return rank_and_size()[0] == 0


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_ahead() -> Iterator[None]:
    """The first process does it, then the others: they find what it fetched."""
    if not first():
        wait()
    yield
    if first():
        wait()


def part(count: int) -> tuple[int, int]:
    """This process' part of so many things: where it begins and where it ends."""
    rank, size = rank_and_size()
    return count * rank // size, count * (rank + 1) // size


def summed(value: int, place: torch.device) -> int:
    """The sum of a number over the processes."""
    total = torch.tensor(value, device=place)
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)


def parallel(model: nn.Module, place: torch.device) -> nn.Module:
    """The model, wrapped so that the gradients of all processes are averaged; itself if this one is alone."""
    if not dist.is_initialized():
        return model
    return nn.parallel.DistributedDataParallel(model, [place] if place.type == "cuda" else None)


def share_buffers(model: nn.Module) -> None:
    """Give the first process' buffers to all.

    Statistics of BatchNorm differ, because every process saw other images. The first one's are in the checkpoint, and
    DistributedDataParallel takes them before each forward pass.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
