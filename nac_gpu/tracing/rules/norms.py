"""Rules for normalisations: BatchNorm, InstanceNorm, LayerNorm, RMSNorm, GroupNorm."""

from torch import Tensor

from nac_gpu.tracing.atoms import CHANNELS, MEAN, UNITS, Labels, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Normalisation, Notes, aligned

BATCH_NORMS = frozenset(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    miopen_batch_norm _batch_norm_with_update batch_norm_with_update _batch_norm_no_update batch_norm""".split()
)


def batch_norm(notes: Notes, call: Call) -> list[Labels]:
    """BatchNorm: channels are dimension 1, and its tensors have one value per channel.

    PyTorch runs InstanceNorm as a BatchNorm of batch x channels channels, with repeated tensors.
    """
    images, tensors = call.args[0], [tensor for tensor in call.args[1:5] if tensor is not None]
    labels = notes.labels_of(images)
    names = [None if tensor is None else notes.name_of(tensor) for tensor in call.args[1:5]]
    if any(not notes.labels_of(tensor).parameter for tensor in tensors):
        notes.freeze(call.tensors, "a normalisation's parameters are computed")
        return call.each(Labels())
    if any(varying(plane) and 1 not in varying(plane) for plane in labels.planes):
        notes.freeze([images], "normalised over a dimension that is not channels")
        return call.each(Labels())
    channels = notes.along(images, 1)
    for tensor in tensors:
        atoms = notes.along(tensor, 0)
        assert atoms is not None, "a parameter's dimensions are labelled"
        if channels is None:
            notes.freeze_planes([atoms], "normalises values that are not channels")
        else:
            notes.per_channel(atoms, channels)
    if channels is None:
        return call.each(Labels())
    if len(tensors) == len({name for name in names if name is not None}):
        eps = next(value for value in reversed(call.args) if isinstance(value, float))
        weight, bias, mean, variance = names
        notes.normalisations.append(Normalisation(channels, (weight, bias, mean, variance), eps, labels.source))
    return [Labels(labels.planes)] + [Labels()] * (len(call.outputs) - 1)


def layer_norm(notes: Notes, call: Call) -> list[Labels]:
    """LayerNorm and RMSNorm over the last dimensions: channels there are frozen, but rows of them are units."""
    values, shape = call.args[0], call.args[1]
    dims = range(values.ndim - len(shape), values.ndim)
    planes = notes.planes(values)
    notes.mix(planes, dims, "normalised over channels")
    return _scaled(notes, call, list(planes), [t for t in call.args[2:] if isinstance(t, Tensor)])


def _scaled(notes: Notes, call: Call, planes: list[Tensor], tensors: list[Tensor]) -> list[Labels]:
    """Scale and shift by parameters that are aligned to the last dimensions."""
    ndim = call.outputs[0].ndim
    for tensor in tensors:
        own = [aligned(plane, ndim) for plane in notes.planes(tensor)]
        for plane in own:
            notes.atoms.role(plane, MEAN)
            if not any(set(varying(plane)) <= set(varying(other)) for other in planes):
                notes.freeze_planes([plane], "scales values that are not channels")
        planes = notes.join([*planes, *own])
    return [Labels(tuple(planes))] + [Labels()] * (len(call.outputs) - 1)


def group_norm(notes: Notes, call: Call) -> list[Labels]:
    """GroupNorm: merging channels would change the mean over their group, but whole groups can be merged."""
    images, tensors = call.args[0], [t for t in call.args[1:3] if t is not None]
    groups, size = call.args[6], images.shape[1]
    planes = notes.planes(images)
    if any(varying(plane) and 1 not in varying(plane) for plane in planes):
        notes.freeze(call.tensors, "normalised over a dimension that is not channels")
        return call.each(Labels())
    channels = notes.along(images, 1)
    for tensor in tensors:
        atoms = notes.along(tensor, 0)
        if atoms is None or not notes.labels_of(tensor).parameter:
            notes.freeze(call.tensors, "a normalisation's parameters are computed")
            return call.each(Labels())
        if channels is None:
            notes.freeze_planes([atoms], "scales values that are not channels")
        else:
            notes.per_channel(atoms, channels)
    if channels is not None and groups < size:
        rows = channels.reshape(groups, -1)
        notes.freeze_planes([rows], "normalised over channels", CHANNELS)
        notes.separate(rows, [1], "normalised over channels", UNITS)
        notes.atoms.unite(rows, notes.atoms.units(groups, notes.module())[:, None], UNITS)
    return [Labels(planes)] + [Labels()] * (len(call.outputs) - 1)
