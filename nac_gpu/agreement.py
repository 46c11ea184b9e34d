"""Whether all ranks hold the same: arguments and model before, calibration data, the result."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.distributed import Ranks
from nac_gpu.forward import ExampleInputs, device_of
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.shards import content

_SHOWN = 100  # characters of an argument in an error


def digest(*values: object) -> str:
    """A hash of tensors, bit for bit, and of everything else by its text."""
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
    """Every rank must be given the same.

    Args:
        ranks: the processes.
        given: arguments by name.

    Raises:
        ValueError: they differ, naming the first.
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


def shapes_of(inputs: ExampleInputs) -> str:
    """Example inputs without their values, which do not matter."""

    def shape(leaf: object) -> object:
        return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

    return repr(pytree.tree_map(shape, inputs))


def same_model(model: nn.Module, given: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that all ranks hold, and what was changed for that.

    Under DistributedDataParallel the buffers (statistics of BatchNorm) of the ranks may differ. Rank 0's are taken, as
    it does itself before each forward pass.

    Args:
        model: the network itself; left as it is.
        given: the same with its wrappers.
        ranks: the processes.

    Raises:
        ValueError: they hold different models, naming the first difference.
    """
    if ranks.size == 1:
        return model, ()
    own = {f"{name} ({type(module).__qualname__})": "" for name, module in model.named_modules()}
    own |= {name: digest(tensor) for name, tensor in tensors(model).items()}
    every = ranks.gathered(own)
    differ = [
        (rank, name)
        for rank, others in enumerate(every)
        for name in {**every[0], **others}
        if others.get(name) != every[0].get(name)
    ]
    if not differ:
        return model, ()
    buffers = {name for name, _ in model.named_buffers()}
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) and m.broadcast_buffers for m in given.modules())
    if wrapped and all(name in buffers for _, name in differ):
        state = tensors(model)
        state |= ranks.sent({name: state[name] for name in buffers})
        return rebuild(model, state), ("buffers: rank 0's, as DistributedDataParallel takes them",)
    rank, name = differ[0]
    remedy = "give the DistributedDataParallel module itself, or " if name in buffers else ""
    raise ValueError(
        f"rank {rank} holds another model than rank 0: {name} differs, the first of {len(differ)} differences; "
        f"expected the same model on every rank: {remedy}load the same checkpoint"
    )


def union(batches: Sequence[Any], ranks: Ranks) -> list[Any]:
    """The calibration batches of all ranks: rank 0's, then rank 1's and so on; those that all ranks have count once."""
    if ranks.size == 1 or len(set(ranks.gathered(digest(list(batches))))) == 1:
        return list(batches)
    return [batch for source in range(ranks.size) for batch in ranks.sent(batches, source)]


def check_same(what: str, value: object, ranks: Ranks) -> None:
    """Results must agree, whatever the hardware.

    Raises:
        RuntimeError: they do not.
    """
    if ranks.size > 1:
        found = ranks.gathered(digest(value))
        if len(set(found)) > 1:
            rank = next(rank for rank, other in enumerate(found) if other != found[0])
            raise RuntimeError(f"rank {rank} made another {what} than rank 0; expected the same on every rank")


def same_result(small: nn.Module, ranks: Ranks) -> nn.Module:
    """The compressed model, after its bits were compared; rank 0's where they differ because hardware does.

    Raises:
        RuntimeError: they differ in shape, or on ranks with the same hardware.
    """
    if ranks.size == 1:
        return small
    state = tensors(small)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_same("architecture", shapes, ranks)
    every = ranks.gathered((digest(state), hardware(small)))
    for rank, (found, place) in enumerate(every):
        if found != every[0][0] and place == every[0][1]:
            raise RuntimeError(
                f"rank {rank} made another model than rank 0 on the same hardware ({place}), expected the same bits; "
                "a method must depend on nothing but its arguments"
            )
    if len({found for found, _ in every}) > 1:
        for name, tensor in ranks.sent(state).items():
            state[name].copy_(tensor)
    return small


def hardware(model: nn.Module) -> str:
    """What the rounding of a result depends on: processor, number of threads, version of PyTorch."""
    device = device_of(model)
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"
