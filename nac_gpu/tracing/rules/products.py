"""Rules for operations with weights: matrix products, convolutions, embeddings."""

import torch
from torch import Tensor

from nac_gpu.tracing.atoms import BOTH, CHANNELS, MEAN, SUM, UNITS, Labels, plane_along, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes, aligned

#: Matrix products, with the position of the first factor among their arguments.
MATRIX_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1, "matmul": 0, "_grouped_mm": 0}
#: Index of the shared (summed) dimension once both factors are laid out as (batch, rows, shared, columns).
SHARED = 2


def matrix_product(notes: Notes, call: Call) -> list[Labels]:
    """`a @ b` or `bias + a @ b`: the shared dimension is summed, the other dimensions are those of the result.

    The planes of both factors are laid out as (batch, rows, shared, columns).
    """
    first = MATRIX_PRODUCTS[call.name]
    a, b = call.args[first], call.args[first + 1]
    bias = call.args[0] if first else None
    notes.freeze_latent((a, b), f"a buffer is read by operation {call.name}")
    notes = notes if bias is None else notes.awake([bias])
    out = call.outputs[0]
    of_a = [plane.reshape((1,) * (3 - a.ndim) + plane.shape).unsqueeze(3) for plane in notes.planes(a)]
    of_b = [_over_product(plane) for plane in _of_second(notes, call, b)]
    weights = [notes.labels_of(tensor).parameter for tensor in (a, b)]
    if weights == [False, True]:
        of_a = _consume(notes, of_b, of_a, a)
        of_b = [plane for plane in of_b if SHARED not in varying(plane)]
    elif weights == [True, False]:
        of_b = _consume(notes, of_a, of_b, b)
        of_a = [plane for plane in of_a if SHARED not in varying(plane)]
    else:
        reason = "multiplied by values that are not a parameter"
        of_a, of_b = (notes.mix(planes, [SHARED], reason) for planes in (of_a, of_b))
    source = None
    for parameter, planes in zip(weights, (of_a, of_b), strict=True):
        if not parameter or weights == [True, True]:
            continue
        for plane in planes:
            if set(varying(plane)) & {1, 3}:
                source = notes.produce(plane, bias)
            else:
                notes.atoms.role(plane, MEAN)
    for tensor, own, others in ((a, of_a, of_b), (b, of_b, of_a)):
        alone = call.name == "_grouped_mm" or tensor.ndim < 3 or tensor.shape[0] == 1
        if not alone and not any(0 in varying(plane) for plane in own):
            for plane in others:
                if 0 in varying(plane):
                    reason = "multiplied by values that differ between them and are not channels"
                    notes.keep_apart(plane, [0], tensor, [0], reason)
    planes = [plane.squeeze(SHARED) for plane in notes.join([*of_a, *of_b])]
    if b.ndim == 1:
        planes = [plane.squeeze(-1) for plane in planes]
    planes = [plane.reshape(plane.shape[plane.ndim - out.ndim :]) for plane in planes]
    if bias is not None:
        planes = _add_bias(notes, bias, planes, out.ndim)
    return [Labels(tuple(planes), source=source)]


def _of_second(notes: Notes, call: Call, b: Tensor) -> list[Tensor]:
    """The planes of the second factor. A grouped product (mixture of experts) has one weight per expert."""
    planes = list(notes.planes(b))
    if call.name == "_grouped_mm":
        notes.freeze_planes([plane for plane in planes if varying(plane) == (0,)], "rows choose among weights")
        planes = [plane.select(0, 0) for plane in planes if 0 not in varying(plane)]
    return planes


def _over_product(plane: Tensor) -> Tensor:
    """A plane of the second factor, [batch, shared, columns], [shared, columns] or [shared], in four dimensions."""
    if plane.ndim == 1:
        plane = plane.unsqueeze(1)
    return plane.reshape((1,) * (3 - plane.ndim) + plane.shape).unsqueeze(1)


def _consume(notes: Notes, weight: list[Tensor], values: list[Tensor], tensor: Tensor) -> list[Tensor]:
    """A weight sums values over the shared dimension: its columns are united with the channels that it reads.

    Args:
        notes: the notes of the recorded pass.
        weight: planes of the weight.
        values: planes of the values that it reads.
        tensor: the values that it reads.

    Returns:
        The planes of the values that the result still has.
    """
    columns = [plane for plane in weight if SHARED in varying(plane)]
    summed = [plane for plane in values if SHARED in varying(plane)]
    for plane in columns:
        notes.atoms.role(plane, SUM)
        if not summed and not notes.labels_of(tensor).uniform:
            notes.freeze_planes([plane], "reads values that are not channels")
    kept = [plane for plane in values if SHARED not in varying(plane)]
    for plane in summed:
        if not columns:
            notes.freeze_planes([plane], "read by values that are not a parameter")
        for own in columns:
            dims, others = set(varying(own)), set(varying(plane))
            if not dims <= others:
                notes.freeze_planes([own, plane], "layouts of channels differ")
                continue
            level = BOTH if dims == others else CHANNELS
            left, right = torch.broadcast_tensors(own, plane)
            notes.atoms.unite(left, right, level)
            notes.freeze_planes([left[right < 0]], "reads values that are not channels")
        if len(varying(plane)) > 1:  # channels are (heads, channels per head): the result still has the heads
            kept += notes.mix([plane], [SHARED], "summed by a weight", UNITS)
    return kept


def _add_bias(notes: Notes, bias: Tensor, planes: list[Tensor], ndim: int) -> list[Tensor]:
    if not bias.ndim:
        return planes
    dims = [set(varying(plane)) for plane in planes]
    own = [aligned(plane, ndim) for plane in notes.planes(bias)]
    for plane in own:
        if not any(set(varying(plane)) <= other for other in dims):
            notes.freeze_planes([plane], "a bias is added to values that are not channels")
        elif notes.labels_of(bias).parameter:
            notes.atoms.role(plane, MEAN)
    for plane in planes:
        notes.check_context(bias, plane)
    return notes.join([*planes, *own])


def convolution(notes: Notes, call: Call) -> list[Labels]:
    """Convolutions: dense, grouped and depthwise, and their transposed forms."""
    images, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    out = call.outputs[0]
    notes = notes if bias is None else notes.awake([bias])
    if bias is not None and not notes.labels_of(bias).parameter:
        notes.freeze(call.tensors, "a convolution's bias is not a parameter")
        return [Labels()]
    batch = tuple(plane for plane in notes.planes(images) if varying(plane) == (0,))  # channels as images of their own
    if any(varying(plane) and 1 not in varying(plane) for plane in notes.planes(images) if varying(plane) != (0,)):
        notes.freeze(call.tensors, "labels are spread over other dimensions of a convolution's input")
        return [Labels()]
    channels = notes.along(images, 1)
    if not notes.labels_of(weight).parameter or (groups > 1 and not notes.differs(weight, 0)):
        return _filtered(notes, call, channels, batch)
    rows, columns = notes.along(weight, 0), notes.along(weight, 1)
    assert rows is not None, "a parameter's dimensions are labelled"
    assert columns is not None, "a parameter's dimensions are labelled"
    if transposed:
        rows, columns = columns, rows
    if groups == 1:
        _read(notes, columns, channels, images)
        made = rows
    elif channels is None:
        notes.freeze([weight], "a grouped convolution reads values that are not channels")
        made = rows.repeat(groups) if transposed else rows
    elif weight.shape[0 if transposed else 1] == (groups if transposed else 1):  # depthwise
        made = _depthwise(notes, columns if transposed else rows, channels, transposed, out.shape[1])
    else:
        made = _grouped(notes, rows, columns, channels, groups, transposed)
    source = notes.produce(made, bias)
    if bias is not None:
        atoms = notes.along(bias, 0)
        assert atoms is not None, "a parameter's dimensions are labelled"
        notes.per_channel(atoms, made)
    return [Labels((*batch, plane_along(made, 1, out.ndim)), source=source)]


def _filtered(notes: Notes, call: Call, channels: Tensor | None, batch: tuple[Tensor, ...]) -> list[Labels]:
    """A convolution whose kernels are not trained: depthwise, fixed ones for all channels or a buffer with its own.

    Channels may also be images of their own in the batch, for which any kernel is fixed.
    """
    images, weight, bias, out, groups = *call.args[:3], call.outputs[0], call.args[8]
    depthwise = images.shape[1] == groups and weight.shape[1] == 1
    latent = [plane.flatten() for plane in notes.labels_of(weight).latent if varying(plane) == (0,)]
    if channels is None or not depthwise or (not latent and notes.differs(weight, 0)):
        fixed = channels is None and batch and not notes.planes(weight)
        if not fixed:
            notes.freeze(call.tensors, "a convolution's kernel is not a parameter")
        notes.freeze_latent([weight], "a convolution's kernel is not a parameter")
        return [Labels(batch if fixed else ())]
    made = channels.repeat_interleave(out.shape[1] // groups)
    if latent:
        each = latent[0].reshape(groups, -1)
        if bool((each == each[:1]).all()):  # the same few kernels for every channel
            notes.freeze_planes([each[0]], "a convolution's kernel is the same for all channels")
        else:
            notes.per_channel(latent[0], made)
            made = latent[0]
    if bias is not None:
        atoms = notes.along(bias, 0)
        assert atoms is not None, "a parameter's dimensions are labelled"
        notes.per_channel(atoms, made)
    return [Labels((*batch, plane_along(made, 1, out.ndim)))]


def _read(notes: Notes, columns: Tensor, channels: Tensor | None, values: Tensor) -> None:
    """Note that the columns of a weight, int64 [m], read these channels, int64 [m]."""
    notes.atoms.role(columns, SUM)
    if channels is not None:
        notes.atoms.unite(columns, channels)
        notes.freeze_planes([columns[channels < 0]], "reads values that are not channels")
    elif not notes.labels_of(values).uniform:
        notes.freeze_planes([columns], "reads values that are not channels")


def _depthwise(notes: Notes, kernels: Tensor, channels: Tensor, transposed: bool, size: int) -> Tensor:
    """A depthwise convolution with one or more kernels per channel: returns the atoms of the `size` output channels."""
    times = size // len(channels)
    made = kernels.repeat_interleave(times) if transposed else kernels
    notes.per_channel(made, channels.repeat_interleave(times))
    return made


def _grouped(notes: Notes, rows: Tensor, columns: Tensor, channels: Tensor, groups: int, transposed: bool) -> Tensor:
    """A grouped convolution, whose channels are (group, channel): returns the atoms of its output channels.

    Either channels merge with the same assignment in all groups, or whole groups merge.
    """
    reason = "each group of a convolution reads its own channels"
    read = channels.reshape(groups, -1)
    notes.atoms.role(columns, SUM)
    notes.freeze_planes([channels[channels < 0]], reason)
    units = notes.atoms.units(groups, notes.module())[:, None]
    if transposed:  # columns are (group, channel), rows are shared by all groups
        made = rows.repeat(groups)
        notes.atoms.unite(columns.reshape(groups, -1), read)
        notes.atoms.unite(read[:1], read, CHANNELS)
        notes.freeze_planes([rows, columns], reason, UNITS)
        return made
    made = rows.reshape(groups, -1)
    notes.atoms.unite(columns, read, CHANNELS)
    notes.freeze_planes([columns], reason, UNITS)
    notes.atoms.unite(made[:1], made, CHANNELS)
    for plane in (read, made):
        notes.atoms.unite(plane, units, UNITS)
        notes.separate(plane, [1], reason, UNITS)
    return rows


def embedding(notes: Notes, call: Call) -> list[Labels]:
    """An embedding: its rows are looked up by index, its columns are the channels."""
    weight, out = call.args[0], call.outputs[0]
    if not notes.labels_of(weight).parameter:
        notes.freeze(call.tensors, "rows are looked up in values that are not a parameter")
        return [Labels()]
    notes.freeze(call.tensors[1:], "channels are used as indices")
    notes.freeze_planes(
        [plane for plane in notes.labels_of(weight).planes if varying(plane) == (0,)], "rows are looked up by index"
    )
    atoms = notes.along(weight, 1)
    assert atoms is not None, "a parameter's dimensions are labelled"
    return [Labels((plane_along(atoms, out.ndim - 1, out.ndim),), source=notes.produce(atoms, None))]
