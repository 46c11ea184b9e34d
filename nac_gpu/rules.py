"""What each ATen operation does to channels: the rules of the record.

Movement of data is applied to the planes as it is, so reshapes, concatenations and shuffles of any kind need no rule of
their own. An operation without a rule freezes what enters it: never a wrong network.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.labels import MEAN, NONE, Labels, compact, varying
from nac_gpu.notes import Call, Notes
from nac_gpu.products import BATCH_NORMS, MATRIX_PRODUCTS, batch_norm, convolution, embedding, matrix_product

Rule = Callable[[Notes, Call], list[Labels]]

MOVEMENT = frozenset(
    """view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze expand slice select narrow split
    split_with_sizes chunk unbind flip roll repeat repeat_interleave index index_select constant_pad_nd unfold
    movedim swapaxes tile unsafe_split unsafe_chunk pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d""".split()
)
#: Movement that works on a plane as it is: the plane need not be expanded to the tensor's shape.
PERMUTATION = frozenset("permute transpose t unsqueeze movedim swapaxes".split())
IDENTITY = frozenset("alias detach clone contiguous _to_copy lift_fresh lift_fresh_copy dropout alpha_dropout".split())
#: One constant everywhere, in the shape of what is read: nothing there keeps channels apart.
CONSTANTS = frozenset("zeros_like ones_like full_like".split())
#: Elementwise operations that lack the pointwise tag.
ELEMENTWISE = frozenset("hardswish _prelu_kernel prelu rrelu celu masked_fill threshold".split())
REDUCTIONS = frozenset(
    "sum mean amax amin max min var std var_mean std_mean logsumexp prod linalg_vector_norm norm".split()
)
ALONG_DIM = frozenset("_softmax _log_softmax softmax log_softmax cumsum cumprod sort topk".split())
WINDOWS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample")
#: Only the shape or type of what they read matters.
VALUE_FREE = frozenset(
    """empty_like rand_like randn_like new_zeros new_ones new_empty new_full new_empty_strided sym_size sym_numel
    sym_stride is_same_size""".split()
)


def apply(notes: Notes, call: Call) -> list[Labels]:
    """The labels of an operation's outputs, in order; what it means is noted."""
    labelled = [tensor for tensor in call.tensors if notes.labels_of(tensor).planes]
    if not labelled or call.name in VALUE_FREE:
        return call.each(Labels())
    rule = _rule(call)
    if rule not in (_movement, _join, _identity, _constant):
        notes.count_use(labelled)
    if rule is None:
        notes.freeze(labelled, f"operation {call.name} is not known")
        return call.each(Labels())
    try:
        return rule(notes, call)
    except Exception as error:  # a rule that meets what it was not written for must not break the user's model
        notes.freeze(labelled, f"operation {call.name} was used in a way that is not known ({error})")
        return call.each(Labels())


def _rule(call: Call) -> Rule | None:
    name, func = call.name, call.func
    by_name: dict[str, Rule] = {
        "cat": _join,
        "stack": _join,
        "copy": _copy,
        "convolution": convolution,
        "embedding": embedding,
    }
    if name in by_name:
        return by_name[name]
    by_set: list[tuple[frozenset[str] | dict[str, int], Rule]] = [
        (IDENTITY, _identity),
        (CONSTANTS, _constant),
        (MOVEMENT, _movement),
        (MATRIX_PRODUCTS, matrix_product),
        (BATCH_NORMS, batch_norm),
        (REDUCTIONS, _reduction),
        (ALONG_DIM, _along_dim),
        (ELEMENTWISE, _elementwise),
    ]
    for names, rule in by_set:
        if name in names:
            return None if func._overloadname == "dtype" else rule  # view.dtype reads other numbers from the bits
    if name.lstrip("_").startswith(WINDOWS):
        return _windows
    return _elementwise if _is_pointwise(func) else None


def _is_pointwise(func: torch._ops.OpOverload) -> bool:
    """In-place operations lack the pointwise tag: look at the operation without the trailing underscore too."""
    name = func.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    functional = getattr(packet, func._overloadname, func) if packet is not None else func
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in functional.tags


def _identity(notes: Notes, call: Call) -> list[Labels]:
    return call.each(notes.labels_of(call.args[0]))


def _constant(notes: Notes, call: Call) -> list[Labels]:
    return call.each(Labels(notes.labels_of(call.args[0]).planes))


def _movement(notes: Notes, call: Call) -> list[Labels]:
    tensor, rest = call.args[0], call.args[1:]
    notes.freeze([t for t in call.tensors if t is not tensor], "channels are used as indices")
    labels = notes.labels_of(tensor)
    if call.name == "constant_pad_nd":
        rest = (rest[0], NONE)  # padding has no label
    per_output: list[list[Tensor]] = [[] for _ in call.outputs]
    for plane in labels.planes:
        full = plane if call.name in PERMUTATION else plane.expand(tensor.shape).contiguous()
        moved = [v for v in pytree.tree_leaves(call.func(full, *rest, **call.kwargs)) if isinstance(v, Tensor)]
        for target, result in zip(per_output, moved, strict=True):
            small = compact(result)
            if small is None:
                continue
            if len(varying(small)) > max(1, len(varying(plane))):
                notes.freeze_planes([plane], "channels are regrouped")
                continue
            target.append(small)
    return [Labels(tuple(planes), labels.parameter, labels.source) for planes in per_output]


def _join(notes: Notes, call: Call) -> list[Labels]:
    tensors = [t for t in call.args[0] if t.ndim == call.outputs[0].ndim or call.name == "stack"]  # cat skips empty 1-D
    labels = [notes.labels_of(tensor) for tensor in tensors]
    if any(len(found.planes) > 1 for found in labels):
        notes.freeze(tensors, "tensors with several labelled dimensions are joined")
        return [Labels()]
    nothing = torch.full((), NONE)
    full = [
        (found.planes[0] if found.planes else nothing).expand(tensor.shape)
        for tensor, found in zip(tensors, labels, strict=True)
    ]
    plane = compact(call.func(full, *call.args[1:], **call.kwargs))
    assert plane is not None, "at least one operand is labelled"
    if len(varying(plane)) > 1:
        notes.freeze_planes([plane], "differently labelled tensors are joined along another dimension")
        return [Labels()]
    return [Labels((plane,), all(found.parameter for found in labels))]


def _copy(notes: Notes, call: Call) -> list[Labels]:
    """Writing into an existing tensor, which may be a view of a larger one that goes on without these labels."""
    notes.freeze(call.args[:2], "values are written in place")
    return [Labels()]


def _elementwise(notes: Notes, call: Call) -> list[Labels]:
    operands, ndim = call.tensors, call.outputs[0].ndim
    planes: dict[tuple[int, ...], Tensor] = {}
    for tensor in operands:
        labels = notes.labels_of(tensor)
        for plane in labels.planes:
            aligned = plane.reshape((1,) * (ndim - plane.ndim) + plane.shape)
            dims = varying(aligned)
            crossing = [other for other in planes if other != dims and set(other) & set(dims)]
            if crossing:
                notes.freeze_planes([aligned, *(planes.pop(other) for other in crossing)], "layouts of channels differ")
            else:
                planes[dims] = notes.meet(planes[dims], aligned) if dims in planes else aligned
            if labels.parameter:
                notes.atoms.role(plane[plane >= 0], MEAN)
    for plane in planes.values():
        for tensor in operands:
            notes.check_context(tensor, plane)
    if call.in_place and call.args[0]._is_view():
        before = {varying(plane) for plane in notes.labels_of(call.args[0]).planes}
        if before != set(planes):  # what it is a view of goes on without the new labels
            notes.freeze(operands, "values are written in place")
            return call.each(Labels())
    parameter = all(notes.labels_of(tensor).parameter for tensor in operands)
    return call.each(Labels(tuple(planes.values()), parameter))


def _reduction(notes: Notes, call: Call) -> list[Labels]:
    given = call.given
    if "other" in given:  # torch.max(a, b)
        return _elementwise(notes, call)
    tensor, dims = call.args[0], given.get("dim")
    if dims is None or dims == []:
        dims = range(tensor.ndim)
    reduced = {dim % tensor.ndim for dim in (dims if isinstance(dims, Sequence) else [dims])}
    kept = _not_along(notes, call, reduced)
    if not given.get("keepdim", False):
        kept = [plane.reshape([s for dim, s in enumerate(plane.shape) if dim not in reduced]) for plane in kept]
    return call.each(Labels(tuple(kept)))


def _along_dim(notes: Notes, call: Call) -> list[Labels]:
    return call.each(Labels(tuple(_not_along(notes, call, {call.given.get("dim", -1) % call.args[0].ndim}))))


def _windows(notes: Notes, call: Call) -> list[Labels]:
    """Pooling and resampling: windows over the last one, two or three dimensions."""
    windows = next(size for size in (1, 2, 3) if f"{size}d" in call.name)
    ndim = call.args[0].ndim
    return call.each(Labels(tuple(_not_along(notes, call, set(range(ndim - windows, ndim))))))


def _not_along(notes: Notes, call: Call, dims: set[int]) -> list[Tensor]:
    """The planes that do not vary along these dimensions; the others are frozen."""
    kept = []
    for plane in notes.labels_of(call.args[0]).planes:
        if dims & set(varying(plane)) or not varying(plane):
            notes.freeze_planes([plane], f"{call.name.strip('_')} is taken over channels")
        else:
            kept.append(plane)
    return kept
