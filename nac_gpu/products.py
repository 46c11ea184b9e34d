"""Rules for operations with weights: matrix products, convolutions, embeddings, BatchNorm."""

from torch import Tensor

from nac_gpu.labels import MEAN, Labels, varying
from nac_gpu.notes import Call, Normalisation, Notes

#: Matrix products, and the position of the first factor among the arguments.
MATRIX_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1, "matmul": 0}

BATCH_NORMS = frozenset(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    miopen_batch_norm _batch_norm_with_update batch_norm_with_update _batch_norm_no_update batch_norm""".split()
)


def plane_along(atoms: Tensor, dim: int, ndim: int) -> Tensor:
    """Atoms [size] as a plane that varies along one dimension."""
    shape = [1] * ndim
    shape[dim] = len(atoms)
    return atoms.reshape(shape)


def matrix_product(notes: Notes, call: Call) -> list[Labels]:
    """`a @ b`, or `bias + a @ b`: the shared dimension is summed, the others make the result's."""
    first = MATRIX_PRODUCTS[call.name]
    a, b = call.args[first], call.args[first + 1]
    bias = call.args[0] if first else None
    out = call.outputs[0]
    if any(set(varying(p)) & set(range(t.ndim - 2)) for t in (a, b) for p in notes.labels_of(t).planes):
        notes.freeze(call.tensors, "channels are spread over a batch of matrix products")
        return [Labels()]
    notes.contract(a, notes.along(a, -1), b, notes.along(b, -2 if b.ndim > 1 else 0))
    planes: list[Tensor] = []
    source = None
    rows = (a, a.ndim - 2, out.ndim - 2) if b.ndim > 1 else (a, a.ndim - 2, out.ndim - 1)
    for tensor, own, dim in (rows, *([(b, b.ndim - 1, out.ndim - 1)] if b.ndim > 1 else [])):
        atoms = notes.along(tensor, own) if own >= 0 else None
        if atoms is None:
            continue
        if notes.labels_of(tensor).parameter:
            source = notes.produce(atoms, bias if tensor is b else None)
        planes.append(plane_along(atoms, dim, out.ndim))
    if bias is not None:
        _add_bias(notes, bias, planes, out.ndim)
    return [Labels(tuple(planes), source=source)]


def _add_bias(notes: Notes, bias: Tensor, planes: list[Tensor], ndim: int) -> None:
    for own in notes.labels_of(bias).planes:
        aligned = own.reshape((1,) * (ndim - own.ndim) + own.shape)
        same = [plane for plane in planes if varying(plane) == varying(aligned)]
        if not same:
            notes.freeze_planes([aligned], "a bias is added to values that are not channels")
        for plane in same:
            notes.meet(plane, aligned)
        notes.atoms.role(own[own >= 0], MEAN)
    for plane in planes:
        notes.check_context(bias, plane)


def convolution(notes: Notes, call: Call) -> list[Labels]:
    """Dense and depthwise convolutions, transposed ones too."""
    images, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    rows, columns = (1, 0) if transposed else (0, 1)
    if not notes.labels_of(weight).parameter:
        notes.freeze(call.tensors, "a convolution's kernel is not a parameter")
        return [Labels()]
    if bias is not None and not notes.labels_of(bias).parameter:
        notes.freeze(call.tensors, "a convolution's bias is not a parameter")
        return [Labels()]
    channels, made = notes.along(images, 1), notes.along(weight, rows)
    assert made is not None, "a parameter's dimensions are labelled"
    if groups == 1:
        notes.contract(images, channels, weight, notes.along(weight, columns))
    elif weight.shape[1] == 1 and weight.shape[0] == groups and channels is not None and not transposed:
        notes.per_channel(made, channels)  # depthwise: a kernel for each channel
    else:
        notes.freeze(call.tensors, "grouped convolutions are not known yet")
        return [Labels()]
    source = notes.produce(made, bias)
    if bias is not None:
        atoms = notes.along(bias, 0)
        assert atoms is not None, "a parameter's dimensions are labelled"
        notes.per_channel(atoms, made)
    return [Labels((plane_along(made, 1, call.outputs[0].ndim),), source=source)]


def embedding(notes: Notes, call: Call) -> list[Labels]:
    """Rows of a table, looked up by index: the columns are the channels."""
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


def batch_norm(notes: Notes, call: Call) -> list[Labels]:
    """BatchNorm over channels, which belong to dimension 1; its tensors have one value for each."""
    images, tensors = call.args[0], call.args[1:5]
    labels = notes.labels_of(images)
    eps = next(value for value in reversed(call.args) if isinstance(value, float))
    names = [None if tensor is None else notes.name_of(tensor) for tensor in tensors]
    if any(name is None and tensor is not None for name, tensor in zip(names, tensors, strict=True)):
        notes.freeze(call.tensors, "a normalisation's parameters are computed")
        return call.each(Labels())
    channels = notes.along(images, 1)
    for name, tensor in zip(names, tensors, strict=True):
        if name is None:
            continue
        atoms = notes.atoms.of(name, 0, tensor.shape[0])
        if channels is None:
            notes.freeze_planes([atoms], "normalises values that are not channels")
        else:
            notes.per_channel(atoms, channels)
    if channels is None:
        notes.freeze([images], "normalised over a dimension that is not channels")
        return call.each(Labels())
    weight, bias, mean, variance = names
    notes.normalisations.append(Normalisation(channels, (weight, bias, mean, variance), eps, labels.source))
    return [Labels(labels.planes)] + [Labels()] * (len(call.outputs) - 1)
