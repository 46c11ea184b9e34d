"""Checks that all ranks have the same model before compression, and the same bits after it."""

from torch import nn

from nac_gpu.distributed.consistency import check_same, digest
from nac_gpu.distributed.ranks import Ranks
from nac_gpu.network.copying import rebuild
from nac_gpu.network.machine import hardware
from nac_gpu.network.state import tensors


def same_model(model: nn.Module, given: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """Check that all ranks have the same model.

    Under DistributedDataParallel the buffers (statistics of BatchNorm) may differ between ranks. Then those of rank 0
    are used, as DistributedDataParallel does itself before each forward pass.

    Args:
        model: the network without wrappers; not changed.
        given: the same network with its wrappers.
        ranks: the processes.

    Returns:
        The model, or a copy with the buffers of rank 0; and a line that says so.

    Raises:
        ValueError: the models differ; names the first difference.
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


def same_result(small: nn.Module, ranks: Ranks) -> nn.Module:
    """Check that all ranks have the same compressed model. Different hardware may round differently.

    Returns:
        The compressed model; with the values of rank 0 if ranks with different hardware got different values.

    Raises:
        RuntimeError: the models differ in shape, or they differ on ranks with the same hardware.
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
