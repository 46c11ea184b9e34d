"""Rules for operations that move values: views, splits, concatenation, indexing."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.tracing.atoms import BOTH, CHANNELS, FILLED, MEAN, NONE, UNITS, Labels, compact, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes, inner_axis

MOVEMENT = frozenset(
    """view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze expand slice select narrow split
    split_with_sizes chunk unbind flip roll repeat repeat_interleave index index_select constant_pad_nd unfold
    movedim swapaxes tile unsafe_split unsafe_chunk pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d rot90 diagonal""".split()
)
#: Operations that can be applied to a compact plane, without expanding it to the tensor's shape first.
PERMUTATION = frozenset("permute transpose t unsqueeze movedim swapaxes".split())
RESHAPES = frozenset("view _unsafe_view reshape _reshape_alias".split())
#: Split channels into parts. Equal parts get the same assignment, because the model's code expects equal sizes.
PARTS = frozenset("split split_with_sizes chunk unbind unsafe_split unsafe_chunk".split())


def identity(notes: Notes, call: Call) -> list[Labels]:
    """An operation that returns its input's values at the same positions."""
    return call.each(notes.labels_of(call.args[0]))


def constant(notes: Notes, call: Call) -> list[Labels]:
    """One constant in the shape of the input."""
    return call.each(Labels(notes.planes(call.args[0])))


def movement(notes: Notes, call: Call) -> list[Labels]:
    """An operation that moves values: the same operation is applied to the planes."""
    tensor = call.args[0]
    rest, named = on_cpu((call.args[1:], call.kwargs))
    notes.freeze([t for t in call.tensors if t is not tensor], "channels are used as indices")
    labels = notes.labels_of(tensor)
    if call.name == "constant_pad_nd":
        return _padded(notes, call)
    per_output: list[list[Tensor]] = [[] for _ in call.outputs]
    for plane in labels.planes:
        compact_too = call.name in PERMUTATION or (call.in_place and "dim" in call.given)
        full = plane.clone() if compact_too else plane.expand(tensor.shape)
        _check_order(notes, call, plane)
        if call.name in RESHAPES:
            moved = [full.reshape(call.outputs[0].shape)]  # often without copying the expanded plane
        else:
            moved = [v for v in pytree.tree_leaves(call.func(full, *rest, **named)) if isinstance(v, Tensor)]
        small = [compact(result) for result in moved]
        for target, result in zip(per_output, small, strict=True):
            if result is not None:
                target.append(result)
                notes.regroup(plane, result)
        if call.name in PARTS and len(small) > 1 and len({result.shape for result in moved}) == 1:
            for result in small[1:]:
                if small[0] is not None and result is not None and varying(plane) == varying(result):
                    notes.atoms.unite(small[0], result, CHANNELS)
    for planes in per_output:
        dims = [dim for plane in planes for dim in varying(plane)]
        if len(dims) > len(set(dims)):
            notes.freeze_planes(planes, "several dimensions of channels are flattened into one")
            planes.clear()
    return [Labels(tuple(planes), labels.parameter, labels.source) for planes in per_output]


def real_view(notes: Notes, call: Call) -> list[Labels]:
    """Complex numbers as pairs of real ones, in a dimension of their own."""
    return [Labels(tuple(plane.unsqueeze(-1) for plane in notes.planes(call.args[0])))]


def complex_view(notes: Notes, call: Call) -> list[Labels]:
    """Pairs of real numbers as complex ones."""
    pairs = call.args[0]
    if notes.labels_of(pairs).parameter:
        notes.freeze([pairs], "a parameter is read as complex numbers")
        return [Labels()]
    left = notes.mix(notes.planes(pairs), {pairs.ndim - 1}, "channels are parts of complex numbers")
    return [Labels(tuple(plane.squeeze(-1) for plane in left))]


def on_cpu(arguments: Any) -> Any:
    """Arguments with index tensors moved to the CPU, where the planes are."""
    return pytree.tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, arguments)


def _check_order(notes: Notes, call: Call, plane: Tensor) -> None:
    """Note which channels must not be merged so that the code that slices, splits, rolls or indexes them stays correct.

    A slice or split stays valid if no channel inside a part is merged with one outside. A slice with step s stays valid
    if the s channels of each block get the same assignment. Rolls by a fixed number, and lists of indices, would select
    other channels once there are fewer, so these channels are frozen.
    """
    given, tensor = call.given, call.args[0]
    dims = given.get("dim", given.get("dims") or (range(tensor.ndim) if call.name == "roll" else 0))
    dims = [dim % max(1, tensor.ndim) for dim in (dims if isinstance(dims, Sequence) else [dims])]
    if call.name in ("index", "index_select"):
        indices = given["indices"] if call.name == "index" else [None] * dims[0] + [given["index"]]
        for dim, index in enumerate(indices):
            if (
                index is not None
                and dim in varying(plane)
                and not (index.ndim == 1 and _in_order(index, tensor.shape[dim]))
            ):
                notes.freeze_planes([plane], "channels are picked by index")
        return
    own = [dim for dim in dims if dim in varying(plane)]
    if not own:
        return
    level = CHANNELS if len(varying(plane)) > 1 and own == [inner_axis(plane)] else BOTH
    step = given.get("step", 1) if call.name == "slice" else 1
    if step != 1 and _every(given, tensor.shape[own[0]]):
        blocks = plane.movedim(own[0], -1).unflatten(-1, (-1, step))
        notes.atoms.unite(blocks, blocks[..., :1], level)
    elif call.name == "roll" or step != 1:
        notes.freeze_planes([plane], "channels are moved by a fixed number of places", level)
    elif call.name in PARTS or call.name in ("slice", "narrow", "select"):
        parts = pytree.tree_leaves(call.func(plane.expand(tensor.shape), *call.args[1:], **call.kwargs))
        equal = len({part.shape for part in parts}) == 1 and len(parts) > 1
        for part in parts:
            if part.numel() and part.numel() < tensor.numel():
                small = compact(part)
                if small is not None:  # `movement` also unites the channels of equal parts
                    notes.separate(small, [], "channels are cut into parts", UNITS if equal else BOTH)


def _every(given: Mapping[str, Any], size: int) -> bool:
    """Whether a slice takes exactly one channel from each block of `step` channels."""
    start, end, step = given.get("start") or 0, given.get("end"), given["step"]
    return size % step == 0 and 0 <= start < step and (end is None or end >= size)


def _in_order(index: Tensor, size: int) -> bool:
    """Whether an index selects a whole dimension in its order or in reverse order."""
    if index.dtype == torch.bool or len(index) != size:
        return False
    forwards = torch.arange(size, device=index.device)
    return bool((index == forwards).all()) or bool((index == forwards.flip(0)).all())


def _padded(notes: Notes, call: Call) -> list[Labels]:
    """Padding with a constant: new positions along channels are marked; other dimensions do not change the plane."""
    labels, pads = notes.labels_of(call.args[0]), list(call.args[1])
    planes = []
    for plane in labels.planes:
        own = [n if plane.shape[-1 - i // 2] > 1 else 0 for i, n in enumerate(pads)]
        planes.append(torch.nn.functional.pad(plane, own, value=FILLED))
    return [Labels(tuple(planes), labels.parameter, labels.source)]


def join(notes: Notes, call: Call) -> list[Labels]:
    """Concatenation: planes are concatenated along the joined dimension, and united along the others."""
    ndim, stacked = call.outputs[0].ndim, call.name == "stack"
    tensors = [t for t in call.args[0] if stacked or t.ndim == ndim]  # torch.cat skips empty 1-D tensors
    dim = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % ndim
    all_planes = [[p.unsqueeze(dim) if stacked else p for p in notes.planes(tensor)] for tensor in tensors]
    shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) if stacked else tuple(t.shape) for t in tensors]
    nothing = [torch.full((1,) * ndim, FILLED if notes.labels_of(t).uniform else NONE) for t in tensors]
    side_by_side = [
        next((p for p in planes if dim in varying(p)), none) for planes, none in zip(all_planes, nothing, strict=True)
    ]
    joined = compact(torch.cat([p.expand(shape) for p, shape in zip(side_by_side, shapes, strict=True)], dim))
    others = [p for planes in all_planes for p in planes if dim not in varying(p)]
    planes = notes.join([*([joined] if joined is not None else []), *others])
    parameter = all(notes.labels_of(tensor).parameter for tensor in tensors)
    for tensor in tensors:
        if notes.labels_of(tensor).parameter and not parameter:
            for plane in notes.planes(tensor):
                notes.atoms.role(plane, MEAN)
        own = {d for p in notes.planes(tensor) for d in varying(p.unsqueeze(dim) if stacked else p)}
        for plane in planes:
            dims = [d for d in varying(plane) if d not in own and d != dim]
            places = [d - (stacked and d > dim) for d in dims]
            notes.keep_apart(plane, dims, tensor, places, "channels are joined with values that are not channels")
    return [Labels(tuple(planes), parameter)]


def lookup(notes: Notes, call: Call) -> list[Labels]:
    """Indexing moves values. Along indexed dimensions of a parameter there are no channels: these atoms are frozen."""
    tensor = call.args[0]
    if not notes.labels_of(tensor).parameter:
        return movement(notes, call)
    indices = call.args[1] if call.name == "index" else [None] * call.args[1] + [call.args[2]]
    looked_up = {dim for dim, index in enumerate(indices) if index is not None and index.ndim}
    found = movement(notes, call)[0]
    dead = {int(plane.max()) for plane in notes.planes(tensor) if set(varying(plane)) & looked_up}
    notes.freeze_planes([p for p in notes.planes(tensor) if int(p.max()) in dead], "rows are looked up by index")
    slots = {notes.atoms.slot_at(atom).first for atom in dead}
    kept = tuple(p for p in found.planes if notes.atoms.slot_at(int(p.max())).first not in slots)
    return [Labels(kept, parameter=True)]
