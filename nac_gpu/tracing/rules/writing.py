"""Values written into a part of a tensor: through a view of it, or at indices.

A view and its base are different tensors with the same values. What is written into a view is therefore also noted for
the base, and all other views of it are read anew.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nac_gpu.tracing.atoms import MEAN, NONE, Labels, compact, numbered, numbers_along, plane_along, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes, aligned
from nac_gpu.tracing.repeats import combined, repeats

_IN_PLACE = "values are written in place"


def copy(notes: Notes, call: Call) -> list[Labels]:
    """`copy_`: the target takes the labels of the source. Values without labels leave those of the target."""
    target, source = call.args[:2]
    if notes.labels_of(target).parameter:
        notes.freeze(call.args[:2], _IN_PLACE)
        return [Labels()]
    planes = tuple(aligned(plane, target.ndim) for plane in notes.planes(source))
    if not target._is_view():
        return [Labels(planes)]
    if planes:
        for plane in planes if notes.labels_of(source).parameter else ():
            notes.atoms.role(plane, MEAN)
        return [Labels(planes)]
    for plane in notes.planes(target):
        notes.separate(plane, [], "only some channels are overwritten")
        notes.check_context(source, plane)
    return [Labels(notes.planes(target))]


def refresh(notes: Notes, tensors: Iterable[Tensor]) -> None:
    """Read the labels of views anew if others were written into their base after the views were made."""
    for tensor, base in _of_changed(notes, tensors):
        at = notes.changed[base]
        if notes.read.get(tensor) != at:
            notes.read[tensor] = at
            notes.put(tensor, _of_view(notes, tensor, base))


def note_read(notes: Notes, tensors: Iterable[Tensor]) -> None:
    """Note that the labels of these tensors agree with those of their bases."""
    for tensor, base in _of_changed(notes, tensors):
        notes.read[tensor] = notes.changed[base]


def _of_changed(notes: Notes, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The views of bases whose labels were changed, and these bases."""
    pairs = [(tensor, tensor._base) for tensor in tensors if tensor._is_view()] if notes.changed else []
    return [(tensor, base) for tensor, base in pairs if base is not None and base in notes.changed]


def note_written(notes: Notes, call: Call, before: list[Labels], after: list[Labels]) -> list[Labels]:
    """Note for the bases what was written into views of them.

    Args:
        notes: the notes of the recorded pass.
        call: the operation.
        before: the labels that the written arguments had.
        after: the labels of the outputs.

    Returns:
        The labels of the outputs; none for those that could not be noted.
    """
    after = list(after)
    for tensor, old in zip(call.written, before, strict=True):
        number = next((n for n, output in enumerate(call.outputs) if output is tensor), None)
        if number is None:
            if not old.planes:
                notes.put(tensor, Labels())
            continue
        new = after[number]
        if not tensor._is_view():
            if not _same(old.planes, new.planes) or repeats(tensor, old):
                _changed(notes, tensor)
        elif tensor._base is not None and tensor.numel() and not (new.planes and _same(old.planes, new.planes)):
            after[number] = _written_into(notes, tensor, tensor._base, old, new)
    return after


def _same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def _changed(notes: Notes, base: Tensor) -> None:
    notes.changed[base] = (notes.changed.get(base) or 0) + 1


def _written_into(notes: Notes, view: Tensor, base: Tensor, old: Labels, new: Labels) -> Labels:
    """Note for a base that its view got new labels: returns those of the view."""
    known, whole = notes.labels_of(base), view.numel() == base.numel()
    if not new.planes:
        if not known.planes and repeats(base, known):
            notes.put(base, Labels(repeats=_repeats_with(view, base, known, new)))
            _changed(notes, base)
        return new
    if not whole and set(map(varying, old.planes)) == set(map(varying, new.planes)):
        return Labels(tuple(notes.join([*old.planes, *new.planes])))  # the base has the channels of the view already
    planes = [_in_base(view, base, plane, whole) for plane in new.planes]
    found = [plane for plane in planes if plane is not None]
    if known.parameter or notes.name_of(base) is not None or len(found) < len(planes):
        notes.freeze_planes([*old.planes, *new.planes, *known.planes], _IN_PLACE)
        notes.put(base, Labels())
        return Labels()
    if not whole:
        for plane in found:
            notes.check_context(base, plane)
        found = notes.join([*known.planes, *found])
    notes.put(base, Labels(tuple(found)))
    _changed(notes, base)
    return _of_view(notes, view, base)


def _corner(view: Tensor, base: Tensor) -> tuple[list[int], dict[int, int]] | None:
    """Where a view that is a block of its base begins, and the dimension of the base for each longer one of the view.

    Returns:
        The first index along each dimension of the base, and dimensions of the view with more than one index, with
        those of the base. None if the view is no block, but for example flattened or every other row.
    """
    steps = {step: dim for dim, step in enumerate(base.stride()) if base.shape[dim] > 1}
    first, rest = [0] * base.ndim, int(view.storage_offset()) - int(base.storage_offset())
    for step in sorted(steps, reverse=True):
        first[steps[step]], rest = divmod(rest, step)
    dims = {dim: steps.get(step, -1) for dim, step in enumerate(view.stride()) if view.shape[dim] > 1}
    inside = all(own >= 0 and first[own] + view.shape[dim] <= base.shape[own] for dim, own in dims.items())
    return (first, dims) if inside and not rest and len(set(dims.values())) == len(dims) else None


def _through(view: Tensor, base: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers laid out in memory as a base, and a view of them that is to them what `view` is to `base`.

    Args:
        view: a view of the base, of the same dtype.
        base: the tensor that owns the memory.
        values: int64, broadcastable to the base.
    """
    laid_out = torch.empty_strided(base.shape, base.stride(), dtype=torch.int64).copy_(values)
    return laid_out, laid_out.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())


def _in_base(view: Tensor, base: Tensor, plane: Tensor, whole: bool) -> Tensor | None:
    """The plane of a base into whose view channels are written; None if these are only some of the base's channels."""
    if view.dtype != base.dtype or (not whole and plane.numel() == 1):
        return None
    block = _corner(view, base)
    if block is not None and plane.numel() > 1:
        own = [block[1][dim] for dim in varying(plane)]
        shape = [1] * base.ndim
        for dim, size in zip(own, (plane.shape[dim] for dim in varying(plane)), strict=True):
            shape[dim] = size
        order = sorted(range(len(own)), key=lambda number: own[number])
        full = all(shape[dim] == base.shape[dim] for dim in own)
        return plane.squeeze().permute(order).reshape(shape) if full else None
    found, part = _through(view, base, torch.full((), NONE))
    part.copy_(plane)
    if whole:
        return compact(found)
    for dim in range(found.ndim):  # along which channels are the same wherever they were written
        largest = found.amax(dim, keepdim=True)
        if bool(((found < 0) | (found == largest)).all()):
            found = largest
    return None if bool((found < 0).any()) else found


def _of_view(notes: Notes, view: Tensor, base: Tensor) -> Labels:
    """The labels of a view, read from those of its base."""
    known, planes = notes.labels_of(base), []
    if view.dtype != base.dtype:
        notes.freeze_planes(known.planes, _IN_PLACE)
        return Labels()
    block = _corner(view, base)
    for plane in known.planes:
        small = compact(_through(view, base, plane)[1] if block is None else _part(plane, view, *block))
        if small is not None:
            planes.append(small)
            notes.regroup(plane, small)
    if known.repeats is None:
        return Labels(tuple(planes), uniform=known.uniform)
    parts = (_through(view, base, own)[1] if block is None else _part(own, view, *block) for own in known.repeats)
    return Labels(repeats=combined(parts))


def _part(plane: Tensor, view: Tensor, first: list[int], dims: dict[int, int]) -> Tensor:
    """The part of a base's plane that belongs to a block of the base: see `_corner`."""
    sizes = {own: view.shape[dim] for dim, own in dims.items()}
    for dim in varying(plane):
        plane = plane.narrow(dim, first[dim], sizes.get(dim, 1))
    others = [dim for dim in range(plane.ndim) if dim not in sizes]
    plane = plane.permute([*dims.values(), *others])  # longer dimensions in the order of the view
    return plane.reshape([plane.shape[list(dims).index(dim)] if dim in dims else 1 for dim in range(view.ndim)])


def _repeats_with(view: Tensor, base: Tensor, known: Labels, new: Labels) -> tuple[Tensor, ...] | None:
    """Which values of a base are the same once others without labels were written into a view of it.

    Along dimensions of which only a part is written, all values may differ: the code says which part, and would write
    the same one if there were fewer.
    """
    block = _corner(view, base)
    if block is None or view.dtype != base.dtype:
        return None
    planes, content = list(numbered(base, known)), numbered(view, new)
    of_view = {own: dim for dim, own in block[1].items()}
    for dim, size in enumerate(base.shape):
        if size > 1:
            all_of_it = dim in of_view and view.shape[of_view[dim]] == size
            own = numbers_along(content, [of_view[dim]]).flatten() if all_of_it else torch.arange(size)
            planes.append(plane_along(own, dim, base.ndim))
    return combined(planes)
