"""Rules for operations that read or write rows at indices, which are data: scatter, gather, packed sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nac_gpu.tracing.atoms import MEAN, Labels, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes, aligned

#: Write rows into a tensor, or add them, at indices along one dimension: one index for each row, or for each value.
SCATTERED_ROWS = frozenset("index_add index_copy index_reduce index_fill".split())
SCATTERED_VALUES = frozenset("scatter scatter_add scatter_reduce".split())


def scattered(notes: Notes, call: Call) -> list[Labels]:
    """Values written at indices along one dimension: labels of target and source along other dimensions are united."""
    given = call.given
    target, index, dim = given["self"], given["index"], given["dim"] % max(1, given["self"].ndim)
    source = given.get("source", given.get("src"))
    if call.name in SCATTERED_ROWS:
        operands = [target, source]
        wrong = bool(notes.planes(index))
    else:
        operands = [target, source, index]
        wrong = not _all_of(notes, operands, index.shape)
    operands = [tensor for tensor in operands if isinstance(tensor, Tensor) and tensor.ndim]
    if wrong or any(dim in varying(plane) for tensor in operands for plane in notes.planes(tensor)):
        notes.freeze(call.tensors, f"operation {call.name} writes along channels")
        return [Labels()]
    return [Labels(tuple(_met(notes, operands)))]


def _all_of(notes: Notes, operands: Sequence[object], shape: Sequence[int]) -> bool:
    """Whether there is an index for each channel of each operand."""
    tensors = [tensor for tensor in operands if isinstance(tensor, Tensor)]
    dims = {dim for tensor in tensors for plane in notes.planes(tensor) for dim in varying(plane)}
    return all(tensor.shape[dim] == shape[dim] for tensor in tensors if tensor.ndim for dim in dims)


def _met(notes: Notes, operands: Sequence[Tensor]) -> list[Tensor]:
    """The planes of a result that has channels at the same position of all operands."""
    planes = notes.join(plane for tensor in operands for plane in notes.planes(tensor))
    for tensor in operands:
        if notes.labels_of(tensor).parameter:
            for plane in notes.planes(tensor):
                notes.atoms.role(plane, MEAN)
        for plane in planes:
            notes.check_context(tensor, plane)
    return planes


def gather(notes: Notes, call: Call) -> list[Labels]:
    """Values read at indices along one dimension. Indices with labels are those of the same channels."""
    tensor, dim, index = call.args[:3]
    dim %= max(1, tensor.ndim)
    own = [plane for plane in notes.planes(tensor) if dim in varying(plane)]
    notes.freeze_planes(own, "channels are picked by index")
    chosen = [plane for plane in notes.planes(index) if dim in varying(plane)]
    notes.freeze_planes(chosen, "channels are used as indices")
    if own or chosen or not _all_of(notes, [tensor, index], index.shape):
        notes.freeze([tensor, index], "channels are picked by index")
        return [Labels()]
    labels = notes.labels_of(tensor)
    if labels.parameter and not notes.planes(index):
        return [Labels(labels.planes, parameter=True)]
    return [Labels(tuple(_met(notes, [tensor, index])), source=labels.source)]


def index_put(notes: Notes, call: Call) -> list[Labels]:
    """`x[indices] = values`: labels along dimensions without an index are united."""
    target, indices, values = call.args[:3]
    if not values.ndim and len(indices) == 1 and indices[0].dtype == torch.bool:
        return _filled(notes, target, indices[0])
    places = _places(indices, target.ndim)
    own, given = notes.planes(target), [aligned(plane, places.ndim) for plane in notes.planes(values)]
    wrong = any(notes.planes(index) for index in indices if index is not None)
    wrong |= any(not set(varying(plane)) <= set(places.of_target) for plane in own)
    if wrong or any(not set(varying(plane)) <= set(places.of_values) for plane in given):
        notes.freeze(call.tensors, "channels are picked by index")
        return [Labels()]
    if notes.labels_of(values).parameter:
        for plane in given:
            notes.atoms.role(plane, MEAN)
    planes = notes.join([*(_laid_out(plane, places.of_target, places.ndim) for plane in own), *given])
    labelled = {dim for plane in own for dim in varying(plane)}
    for plane in planes:
        notes.check_context(values, plane)
        dims = [d for d in varying(plane) if places.of_values[d] not in labelled]
        reason = "channels are written beside values that are not channels"
        notes.keep_apart(plane, dims, target, [places.of_values[dim] for dim in dims], reason)
    return [Labels(tuple(_laid_out(plane, places.of_values, target.ndim) for plane in planes))]


@dataclass(frozen=True)
class _Places:
    """Where the dimensions of a tensor that are not indexed are in what its indices select.

    Attributes:
        of_target: by dimension of the tensor.
        of_values: the reverse.
        ndim: how many dimensions the selected values have.
    """

    of_target: dict[int, int]
    of_values: dict[int, int]
    ndim: int


def _places(indices: Sequence[Tensor | None], ndim: int) -> _Places:
    """Dimensions of indices are where the first one is if all indices are side by side, else in front."""
    free: list[int] = []
    dim = 0
    for index in indices:
        if index is None:
            free.append(dim)
        dim += index.ndim if index is not None and index.dtype == torch.bool else 1
    free += range(dim, ndim)
    at = [number for number, index in enumerate(indices) if index is not None]
    before = at[0] if at[-1] - at[0] + 1 == len(at) else 0
    width = max(1 if index.dtype == torch.bool else index.ndim for index in indices if index is not None)
    of_target = {dim: number if number < before else number + width for number, dim in enumerate(free)}
    return _Places(of_target, {place: dim for dim, place in of_target.items()}, width + len(free))


def _laid_out(plane: Tensor, places: Mapping[int, int], ndim: int) -> Tensor:
    """A plane with each dimension along which it varies at its new place among `ndim` dimensions, in the same order."""
    shape = [1] * ndim
    for dim in varying(plane):
        shape[places[dim]] = plane.shape[dim]
    return plane.reshape(shape)


def _filled(notes: Notes, target: Tensor, mask: Tensor) -> list[Labels]:
    """`x[mask] = constant`: the mask has the leading dimensions of the target."""
    more = target.ndim - mask.ndim
    masks = [plane.reshape(*plane.shape, *[1] * more) for plane in notes.planes(mask)]
    planes = notes.join([*notes.planes(target), *masks])
    labelled = {dim for plane in masks for dim in varying(plane)}
    for plane in planes:
        notes.check_context(target, plane)
        dims = [dim for dim in varying(plane) if dim < mask.ndim and dim not in labelled]
        notes.keep_apart(plane, dims, mask, dims, "only some channels are overwritten")
    return [Labels(tuple(planes))]


def packed(notes: Notes, call: Call) -> list[Labels]:
    """`pack_padded_sequence`: batch and time become one dimension; padding is left out."""
    tensor = call.args[0]
    if any({0, 1} & set(varying(plane)) for plane in notes.planes(tensor)) or notes.planes(call.args[1]):
        notes.freeze(call.tensors, "channels are packed as a sequence")
        return call.each(Labels())
    return [Labels(tuple(plane.squeeze(0) for plane in notes.planes(tensor))), Labels()]


def segments(notes: Notes, call: Call) -> list[Labels]:
    """`segment_reduce`: rows are reduced along an axis, with lengths that are data."""
    tensor, axis = call.args[0], call.given.get("axis", 0) % call.args[0].ndim
    others = [other for other in call.tensors if other is not tensor]
    if any(axis in varying(plane) for plane in notes.planes(tensor)) or any(map(notes.planes, others)):
        notes.freeze(call.tensors, f"{call.name} is taken over channels")
        return [Labels()]
    return [Labels(notes.planes(tensor))]
