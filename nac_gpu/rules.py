"""What each ATen operation does to channels: the rules of the record.

Movement of data is applied to the planes as it is, so reshapes, concatenations and shuffles of any kind need no rule of
their own. An operation without a rule freezes what enters it: never a wrong network.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nac_gpu.labels import BOTH, CHANNELS, MEAN, NONE, UNITS, Labels, Separation, compact, varying
from nac_gpu.norms import BATCH_NORMS, batch_norm, group_norm, layer_norm
from nac_gpu.notes import Call, Notes, aligned, inner_axis, name_of
from nac_gpu.products import MATRIX_PRODUCTS, convolution, embedding, matrix_product

Rule = Callable[[Notes, Call], list[Labels]]

MOVEMENT = frozenset(
    """view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze expand slice select narrow split
    split_with_sizes chunk unbind flip roll repeat repeat_interleave index index_select constant_pad_nd unfold
    movedim swapaxes tile unsafe_split unsafe_chunk pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d gather""".split()
)
#: Movement that works on a plane as it is: the plane need not be expanded to the tensor's shape.
PERMUTATION = frozenset("permute transpose t unsqueeze movedim swapaxes".split())
RESHAPES = frozenset("view _unsafe_view reshape _reshape_alias".split())
#: Equal parts stay in step: the code that reads them expects them to be equal.
PARTS = frozenset("split split_with_sizes chunk unbind unsafe_split unsafe_chunk".split())
IDENTITY = frozenset("alias detach clone contiguous _to_copy lift_fresh lift_fresh_copy dropout alpha_dropout".split())
#: One constant everywhere, in the shape of what is read: nothing there keeps channels apart.
CONSTANTS = frozenset("zeros_like ones_like full_like".split())
#: One constant everywhere, whatever the size.
FACTORIES = frozenset("zeros ones full new_zeros new_ones new_full scalar_tensor".split())
#: Elementwise operations that lack the pointwise tag.
ELEMENTWISE = frozenset("hardswish _prelu_kernel prelu rrelu celu masked_fill threshold".split())
REDUCTIONS = frozenset(
    "sum mean amax amin max min var std var_mean std_mean logsumexp prod linalg_vector_norm norm".split()
)
#: Values meet along a dimension, and every one of them gives a result.
ALONG_DIM = frozenset("_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod sort".split())
WINDOWS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "grid_sampler")
#: Rows are added to, or written into, a tensor at indices along one dimension.
SCATTERED = frozenset("index_add index_copy scatter_add".split())
#: Only the shape or type of what they read matters.
VALUE_FREE = frozenset(
    """empty_like rand_like randn_like new_zeros new_ones new_empty new_full new_empty_strided sym_size sym_numel
    sym_stride is_same_size""".split()
)


def apply(notes: Notes, call: Call) -> list[Labels]:
    """The labels of an operation's outputs, in order; what it means is noted."""
    if call.name in FACTORIES:
        return call.each(Labels(uniform=True))
    for tensor in call.tensors:
        notes.atoms.separations.extend(notes.labels_of(tensor).pending)
    labelled = [tensor for tensor in call.tensors if notes.planes(tensor)]
    if not labelled or call.name in VALUE_FREE:
        return call.each(Labels(uniform=_stays_uniform(notes, call)))
    rule = _rule(call.func)
    if rule not in (_movement, _lookup, _join, _identity, _constant):
        notes.count_use(labelled)
    if rule is None:
        notes.freeze(labelled, f"operation {call.name} is not known")
        return call.each(Labels())
    try:
        return rule(notes, call)
    except Exception as error:  # a rule that meets what it was not written for must not break the user's model
        notes.freeze(labelled, f"operation {call.name} was used in a way that is not known ({error})")
        return call.each(Labels())


def _stays_uniform(notes: Notes, call: Call) -> bool:
    """All that an operation reads is uniform, and it moves values or acts on each."""
    rule, tensors = _rule(call.func), call.tensors
    keeps = rule in (_movement, _identity, _constant, _join, _elementwise) and call.name != "constant_pad_nd"
    return keeps and bool(tensors) and all(notes.labels_of(tensor).uniform or not tensor.ndim for tensor in tensors)


@cache
def _rule(func: torch._ops.OpOverload) -> Rule | None:
    name = name_of(func)
    by_name: dict[str, Rule] = {
        "cat": _join,
        "stack": _join,
        "copy": _copy,
        "glu": _glu,
        "zero": _fill,
        "fill": _fill,
        "index": _lookup,
        "index_select": _lookup,
        "convolution": convolution,
        "embedding": embedding,
        "native_layer_norm": layer_norm,
        "_fused_rms_norm": layer_norm,
        "rms_norm": layer_norm,
        "native_group_norm": group_norm,
        "pixel_shuffle": _pixel_shuffle,
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
        (SCATTERED, _scattered),
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
    return call.each(Labels(notes.planes(call.args[0])))


def _movement(notes: Notes, call: Call) -> list[Labels]:
    tensor = call.args[0]
    rest, named = pytree.tree_map(_on_cpu, (call.args[1:], call.kwargs))
    notes.freeze([t for t in call.tensors if t is not tensor], "channels are used as indices")
    labels = notes.labels_of(tensor)
    if call.name == "constant_pad_nd":
        return _padded(notes, call)
    per_output: list[list[Tensor]] = [[] for _ in call.outputs]
    for plane in labels.planes:
        full = plane.clone() if call.name in PERMUTATION else plane.expand(tensor.shape)
        _check_order(notes, call, plane)
        if call.name in RESHAPES:
            moved = [full.reshape(call.outputs[0].shape)]  # copies nothing where the plane is expanded
        else:
            moved = [v for v in pytree.tree_leaves(call.func(full, *rest, **named)) if isinstance(v, Tensor)]
        small = [compact(result) for result in moved]
        for target, result in zip(per_output, small, strict=True):
            if result is not None:
                target.append(result)
                _regrouped(notes, plane, result)
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


def _on_cpu(value: object) -> object:
    """Planes are on the CPU, and so must be the indices that move them."""
    return value.cpu() if isinstance(value, Tensor) else value


def _check_order(notes: Notes, call: Call, plane: Tensor) -> None:
    """Parts of channels are cut out, or channels change places: what holds for fewer channels, too, and what does not.

    A part stays a part if no channel inside is merged with one outside. One of every few channels stays one of as many
    if those few are merged in step. A fixed number of places or a list of channels means others once there are fewer.
    """
    given, tensor = call.given, call.args[0]
    dims = given.get("dim", given.get("dims") or (range(tensor.ndim) if call.name == "roll" else 0))
    dims = [dim % max(1, tensor.ndim) for dim in (dims if isinstance(dims, Sequence) else [dims])]
    if call.name in ("index", "index_select", "gather"):
        if call.name == "gather" and set(varying(plane)) & set(dims):
            notes.freeze_planes([plane], "channels are picked by index")
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
                if small is not None:  # channels of equal parts are kept in step, which is more
                    notes.separate(small, [], "channels are cut into parts", UNITS if equal else BOTH)


def _every(given: Mapping[str, Any], size: int) -> bool:
    """A slice takes one of each block of `step`, of all blocks."""
    start, end, step = given.get("start") or 0, given.get("end"), given["step"]
    return size % step == 0 and 0 <= start < step and (end is None or end >= size)


def _in_order(index: Tensor, size: int) -> bool:
    """All of a dimension, forwards or backwards."""
    if index.dtype == torch.bool or len(index) != size:
        return False
    forwards = torch.arange(size, device=index.device)
    return bool((index == forwards).all()) or bool((index == forwards.flip(0)).all())


def _padded(notes: Notes, call: Call) -> list[Labels]:
    """One constant beside the values: without a label where channels are added, the same for all of them elsewhere."""
    labels, pads = notes.labels_of(call.args[0]), list(call.args[1])
    planes = []
    for plane in labels.planes:
        own = [n if plane.shape[-1 - i // 2] > 1 else 0 for i, n in enumerate(pads)]
        planes.append(torch.nn.functional.pad(plane, own, value=NONE))
    return [Labels(tuple(planes), labels.parameter, labels.source)]


def _regrouped(notes: Notes, before: Tensor, after: Tensor) -> None:
    """Channels C seen as (h, d): d merges in step over h, because the code that regroups them keeps h."""
    dims = varying(after)
    if len(dims) > max(1, len(varying(before))):
        first = after
        for dim in dims[:-1]:
            first = first.narrow(dim, 0, 1)
        notes.atoms.unite(first, after, CHANNELS)


def _pixel_shuffle(notes: Notes, call: Call) -> list[Labels]:
    """Blocks of r^2 channels become pixels of one channel: the channels merge, the pixels stay in step."""
    tensor, times = call.args[0], call.args[1] ** 2
    channels = notes.along(tensor, tensor.ndim - 3)
    if channels is None or len(notes.planes(tensor)) > 1:
        notes.freeze([tensor], "operation pixel_shuffle moves other dimensions than channels")
        return [Labels()]
    rows = channels.reshape(-1, times)
    notes.atoms.unite(rows, rows[:, :1])
    return [Labels((rows[:, 0].reshape(-1, 1, 1),))]


def _join(notes: Notes, call: Call) -> list[Labels]:
    """Concatenation: labels stand side by side along the joined dimension, and meet along the others."""
    ndim, stacked = call.outputs[0].ndim, call.name == "stack"
    tensors = [t for t in call.args[0] if stacked or t.ndim == ndim]  # cat skips empty 1-D
    dim = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % ndim
    all_planes = [[p.unsqueeze(dim) if stacked else p for p in notes.planes(tensor)] for tensor in tensors]
    shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) if stacked else tuple(t.shape) for t in tensors]
    nothing = torch.full((1,) * ndim, NONE)
    side_by_side = [next((p for p in planes if dim in varying(p)), nothing) for planes in all_planes]
    joined = compact(torch.cat([p.expand(shape) for p, shape in zip(side_by_side, shapes, strict=True)], dim))
    others = [p for planes in all_planes for p in planes if dim not in varying(p)]
    planes = notes.join([*([joined] if joined is not None else []), *others])
    parameter = all(notes.labels_of(tensor).parameter for tensor in tensors)
    for tensor in tensors:
        if notes.labels_of(tensor).parameter and not parameter:
            for plane in notes.planes(tensor):
                notes.atoms.role(plane, MEAN)
        seen = tensor.unsqueeze(dim) if stacked else tensor
        own = {d for p in notes.planes(tensor) for d in varying(p.unsqueeze(dim) if stacked else p)}
        for plane in planes:
            differs = [d for d in varying(plane) if d not in own and d != dim and seen.shape[d] > 1 and seen.stride(d)]
            if differs and not notes.labels_of(tensor).uniform:
                notes.separate(plane, differs, "channels are joined with values that are not channels")
    return [Labels(tuple(planes), parameter)]


def _copy(notes: Notes, call: Call) -> list[Labels]:
    """Writing into an existing tensor: a whole one takes the labels; of a view, the rest goes on without them."""
    target, source = call.args[:2]
    if target._is_view() or notes.labels_of(target).parameter:
        notes.freeze(call.args[:2], "values are written in place")
        return [Labels()]
    return [Labels(tuple(aligned(plane, target.ndim) for plane in notes.planes(source)))]


def _scattered(notes: Notes, call: Call) -> list[Labels]:
    """Rows at indices along one dimension: labels along the others meet."""
    given = call.given
    target, index, dim = given["self"], given["index"], given["dim"] % given["self"].ndim
    source = given["source"] if "source" in given else given["src"]
    if any(dim in varying(plane) for t in (target, source) for plane in notes.planes(t)) or notes.planes(index):
        notes.freeze(call.tensors, f"operation {call.name} writes along channels")
        return [Labels()]
    planes = notes.join([*notes.planes(target), *notes.planes(source)])
    for plane in planes:
        for tensor in (target, source):
            notes.check_context(tensor, plane)
    return [Labels(tuple(planes))]


def _fill(notes: Notes, call: Call) -> list[Labels]:
    """A constant in place of values, in some channels perhaps and not in others."""
    labels = notes.labels_of(call.args[0])
    for plane in labels.planes:
        notes.separate(plane, [], "only some channels are overwritten")
    return [Labels(labels.planes)]


def _lookup(notes: Notes, call: Call) -> list[Labels]:
    """Indexing moves what it reads; rows of a parameter that are looked up are no channels."""
    tensor = call.args[0]
    if not notes.labels_of(tensor).parameter:
        return _movement(notes, call)
    indices = call.args[1] if call.name == "index" else [None] * call.args[1] + [call.args[2]]
    looked_up = {dim for dim, index in enumerate(indices) if index is not None and index.ndim}
    found = _movement(notes, call)[0]
    dead = {int(plane.max()) for plane in notes.planes(tensor) if set(varying(plane)) & looked_up}
    notes.freeze_planes([p for p in notes.planes(tensor) if int(p.max()) in dead], "rows are looked up by index")
    slots = {notes.atoms.slot_at(atom).first for atom in dead}
    kept = tuple(p for p in found.planes if notes.atoms.slot_at(int(p.max())).first not in slots)
    return [Labels(kept, parameter=True)]


def _glu(notes: Notes, call: Call) -> list[Labels]:
    """One half gates the other: they are one."""
    tensor, dim = call.args[0], call.given.get("dim", -1) % call.args[0].ndim
    half, planes = tensor.shape[dim] // 2, []
    for plane in notes.planes(tensor):
        if dim in varying(plane):
            plane = notes.meet(plane.narrow(dim, 0, half), plane.narrow(dim, half, half))
        planes.append(plane)
    return [Labels(tuple(planes))]


def _elementwise(notes: Notes, call: Call) -> list[Labels]:
    operands, ndim = call.tensors, call.outputs[0].ndim
    own = {id(tensor): [aligned(plane, ndim) for plane in notes.planes(tensor)] for tensor in operands}
    before = {varying(plane) for plane in own[id(call.args[0])]} if call.in_place else set()
    planes = notes.join(plane for tensor in operands for plane in own[id(tensor)])
    parameters = [tensor for tensor in operands if notes.labels_of(tensor).parameter]
    for plane in (plane for tensor in parameters for plane in own[id(tensor)]):
        notes.atoms.role(plane, MEAN)
    made = {varying(p) for tensor in operands if not notes.labels_of(tensor).parameter for p in own[id(tensor)]}
    for plane in list(planes):
        apart = [notes.check_context(tensor, plane) for tensor in operands]
        if any(apart) and varying(plane) not in made and set(varying(plane)) <= {dim for dims in apart for dim in dims}:
            planes = [other for other in planes if other is not plane]  # positions, say: nothing more to learn from it
    if call.in_place and call.args[0]._is_view() and before != {varying(plane) for plane in planes}:
        notes.freeze(operands, "values are written in place")  # what it is a view of goes on without the new labels
        return call.each(Labels())
    parameter = all(notes.labels_of(tensor).parameter for tensor in operands)
    return call.each(Labels(tuple(planes), parameter))


def _reduction(notes: Notes, call: Call) -> list[Labels]:
    given = call.given
    if "other" in given:  # torch.max(a, b)
        return _elementwise(notes, call)
    tensor, dims = call.args[0], given.get("dim")
    if dims is None or dims == []:
        dims = range(tensor.ndim)
    reduced = {dim % tensor.ndim for dim in (dims if isinstance(dims, Sequence) else [dims])}
    pending: list[Separation] = []
    kept = notes.mix(notes.planes(tensor), reduced, f"{call.name.strip('_')} is taken over channels", pending=pending)
    if not given.get("keepdim", False):
        kept = [plane.reshape([s for dim, s in enumerate(plane.shape) if dim not in reduced]) for plane in kept]
    return call.each(Labels(tuple(kept), pending=tuple(pending)))


def _along_dim(notes: Notes, call: Call) -> list[Labels]:
    """Softmax and the like: channels keep their places."""
    tensor, planes = call.args[0], notes.planes(call.args[0])
    dim = call.given.get("dim", -1) % tensor.ndim
    notes.mix(planes, {dim}, f"{call.name.strip('_')} is taken over channels")
    return call.each(Labels(planes))


def _windows(notes: Notes, call: Call) -> list[Labels]:
    """Pooling and resampling: windows over the last one, two or three dimensions."""
    windows = next(size for size in (1, 2, 3) if f"{size}d" in call.name)
    ndim = call.args[0].ndim
    notes.freeze(call.tensors[1:], f"{call.name} is taken at values that are channels")
    dims = set(range(ndim - windows, ndim))
    return call.each(Labels(tuple(notes.mix(notes.planes(call.args[0]), dims, f"{call.name} is taken over channels"))))
