"""Selects the rule for each ATen operation of a recorded pass.

Operations that move data are applied to the planes themselves, so all kinds of reshapes, concatenations and shuffles
share one rule. An operation without a rule freezes its inputs: the network stays larger, but is never wrong.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from nac_gpu.tracing.atoms import Labels, numbered, varying
from nac_gpu.tracing.calls import Call, name_of
from nac_gpu.tracing.recorder import Notes, aligned, unfilled
from nac_gpu.tracing.repeats import LARGEST, combined, moved, repeats
from nac_gpu.tracing.rules.buffers import Rule, Way, alone, held, meet
from nac_gpu.tracing.rules.elementwise import (
    ALONG_DIM,
    ALONG_DIMS,
    ELEMENTWISE,
    REDUCTIONS,
    WINDOWS,
    along_dim,
    along_dims,
    elementwise,
    fill,
    glu,
    reduction,
    windows,
)
from nac_gpu.tracing.rules.indexing import (
    SCATTERED_ROWS,
    SCATTERED_VALUES,
    gather,
    index_put,
    packed,
    scattered,
    segments,
)
from nac_gpu.tracing.rules.movement import (
    MOVEMENT,
    RESHAPES,
    complex_view,
    constant,
    identity,
    join,
    lookup,
    movement,
    on_cpu,
    real_view,
)
from nac_gpu.tracing.rules.norms import BATCH_NORMS, batch_norm, group_norm, layer_norm
from nac_gpu.tracing.rules.pixels import channel_shuffle, col2im, im2col, pixel_shuffle, unpool
from nac_gpu.tracing.rules.products import MATRIX_PRODUCTS, convolution, embedding, matrix_product
from nac_gpu.tracing.rules.writing import copy, note_read, note_written, refresh

#: Operations that repeat values of a tensor, beside those that expand one.
REPEATING = frozenset("repeat repeat_interleave tile index index_select".split())
IDENTITY = frozenset(
    """alias detach clone contiguous _to_copy lift_fresh lift_fresh_copy dropout alpha_dropout _conj resolve_conj
    _neg_view resolve_neg""".split()
)
#: Return one constant in the shape of the input, so the result has the same value for all channels.
CONSTANTS = frozenset("zeros_like ones_like full_like".split())
#: Return one constant, or nothing yet, in a size that is given as an argument.
FACTORIES = frozenset("zeros ones full new_zeros new_ones new_full scalar_tensor empty new_empty empty_like".split())
#: Keep the constant that fills channels up the same at all its positions.
FILLING = frozenset([movement, lookup, join, identity, constant, elementwise, reduction, windows, copy])
#: What rules do to buffers; all others freeze them.
WAYS: dict[Rule, Way] = {
    identity: Way.KEEPS,
    **dict.fromkeys([movement, lookup], Way.MOVES),
    **dict.fromkeys([constant, reduction, along_dim], Way.COMBINES),
    elementwise: Way.MEETS,
    join: Way.JOINS,
    **dict.fromkeys([batch_norm, layer_norm, group_norm], Way.SCALES),
    **dict.fromkeys([convolution, matrix_product], Way.WEIGHS),
}
#: Use only the shape or dtype of their inputs.
VALUE_FREE = frozenset(
    """empty_like rand_like randn_like new_zeros new_ones new_empty new_full new_empty_strided sym_size sym_numel
    sym_stride is_same_size""".split()
)


def apply(notes: Notes, call: Call) -> list[Labels]:
    """Apply the rule of an operation: note what it does to channels, and return the labels of its outputs in order."""
    if call.name in FACTORIES:
        return call.each(Labels(uniform=True))
    refresh(notes, call.tensors)
    for tensor in call.tensors:
        notes.atoms.separations.extend(notes.labels_of(tensor).pending)
    before = [notes.labels_of(tensor) for tensor in call.written]
    labels = _outputs(notes, call)
    if call.in_place:
        labels = note_written(notes, call, before, labels)
    note_read(notes, call.outputs)
    return labels


def _outputs(notes: Notes, call: Call) -> list[Labels]:
    """The labels of the outputs, from those of the inputs."""
    labelled = [tensor for tensor in call.tensors if notes.planes(tensor)]
    rule, buffers = _rule(call.func), held(notes, call)
    if not labelled or call.name in VALUE_FREE:
        return _unlabelled(notes, call, rule)
    if rule not in (movement, lookup, join, identity, constant, gather):
        notes.count_use(labelled)
    if rule is None:
        notes.freeze(labelled, f"operation {call.name} is not known")
        notes.freeze_latent(buffers, f"operation {call.name} is not known")
        return call.each(Labels())
    try:
        found = meet(notes, call, rule, WAYS.get(rule)) if buffers else rule(notes, call)
    except Exception as error:  # a case that the rule does not cover must not stop the compression of the model
        notes.freeze(labelled, f"operation {call.name} was used in a way that is not known ({error})")
        notes.freeze_latent(buffers, f"operation {call.name} was used in a way that is not known ({error})")
        return call.each(Labels())
    if rule not in FILLING:
        found = [replace(labels, planes=tuple(map(unfilled, labels.planes))) for labels in found]
    return found


def _unlabelled(notes: Notes, call: Call, rule: Rule | None) -> list[Labels]:
    """An operation that reads no channels, or none of their values."""
    found, buffers = _without_labels(notes, call, rule), held(notes, call)
    if call.name in VALUE_FREE or not call.outputs or not buffers:
        return found
    try:
        latent = alone(notes, call, rule, None if rule is None else WAYS.get(rule))
        return [replace(own, repeats=labels.repeats) for own, labels in zip(latent, found, strict=True)]
    except Exception as error:  # as in `apply`
        notes.freeze_latent(buffers, f"operation {call.name} was used in a way that is not known ({error})")
        return call.each(Labels())


def _without_labels(notes: Notes, call: Call, rule: Rule | None) -> list[Labels]:
    """The outputs of an operation on tensors without labels: whether they are uniform, or repeat values."""
    tensors = call.tensors
    uniform = all(notes.labels_of(tensor).uniform or not tensor.ndim for tensor in tensors)
    keeps = rule in (movement, lookup, identity, constant, join, elementwise) and call.name != "constant_pad_nd"
    if keeps and tensors and uniform:
        return call.each(Labels(uniform=True))
    if rule is fill:
        return call.each(Labels(repeats=()))
    found: Sequence[tuple[Tensor, ...] | None] = [None] * len(call.outputs)
    with contextlib.suppress(Exception):  # of an unusual form of an operation it is not known what it repeats
        found = _repeated(notes, call, rule) or found
    return [Labels(repeats=own) for own in found]


def _repeated(notes: Notes, call: Call, rule: Rule | None) -> Sequence[tuple[Tensor, ...]]:
    """For each output without labels, planes of numbers: which values are the same; empty if only strides tell."""
    tensors, first = call.tensors, call.args[0] if call.args else None
    if not tensors or sum(output.numel() for output in call.outputs) > LARGEST:
        return []

    def numbers(tensor: Tensor) -> tuple[Tensor, ...]:
        return numbered(tensor, notes.labels_of(tensor))

    if rule is elementwise or rule is copy:
        read = tensors[1:] if rule is copy else tensors
        known = any(tensor.ndim and repeats(tensor, notes.labels_of(tensor)) for tensor in read)
        if not known and rule is not copy:  # what is copied may be expanded
            return []
        ndim = call.outputs[0].ndim
        return [combined(aligned(own, ndim) for tensor in read for own in numbers(tensor))] * len(call.outputs)
    if rule is join:
        if any(tensor is not tensors[0] for tensor in tensors):
            return []
        rest, times = call.args[1:], len(tensors)
        return moved(numbers(tensors[0]), tensors[0].shape, lambda own: call.func([own] * times, *rest, **call.kwargs))
    moves = rule in (movement, lookup, identity) and not call.in_place  # in place, its shape is no longer there
    if not moves or not isinstance(first, Tensor):
        return []
    if call.name not in REPEATING and not repeats(first, notes.labels_of(first)):
        return []
    if rule is identity:
        return [numbers(first)] * len(call.outputs)
    if call.name in RESHAPES:
        return moved(numbers(first), first.shape, lambda own: own.reshape(call.outputs[0].shape))
    rest, named = on_cpu((call.args[1:], call.kwargs))
    if call.name == "constant_pad_nd":  # as many places are padded if there are fewer values, so these may all differ
        padded = {first.ndim - 1 - number // 2 for number, size in enumerate(rest[0]) if size}
        apart = padded.union(*(dims for dims in map(varying, numbers(first)) if padded & set(dims)))
        kept = [own for own in numbers(first) if not apart & set(varying(own))]
        return [combined([*kept, *(own for own in numbered(call.outputs[0], Labels()) if apart & set(varying(own)))])]
    return moved(numbers(first), first.shape, lambda own: call.func(own, *rest, **named))


@cache
def _rule(func: torch._ops.OpOverload) -> Rule | None:
    name = name_of(func)
    by_name: dict[str, Rule] = {
        "cat": join,
        "stack": join,
        "copy": copy,
        "glu": glu,
        "zero": fill,
        "fill": fill,
        "index": lookup,
        "index_select": lookup,
        "convolution": convolution,
        "embedding": embedding,
        "native_layer_norm": layer_norm,
        "_fused_rms_norm": layer_norm,
        "rms_norm": layer_norm,
        "native_group_norm": group_norm,
        "pixel_shuffle": pixel_shuffle,
        "channel_shuffle": channel_shuffle,
        "native_channel_shuffle": channel_shuffle,
        "im2col": im2col,
        "col2im": col2im,
        "max_unpool2d": unpool,
        "max_unpool3d": unpool,
        "gather": gather,
        "index_put": index_put,
        "_pack_padded_sequence": packed,
        "segment_reduce": segments,
        "view_as_real": real_view,
        "view_as_complex": complex_view,
    }
    if name in by_name:
        return by_name[name]
    by_set: list[tuple[frozenset[str] | dict[str, int], Rule]] = [
        (IDENTITY, identity),
        (CONSTANTS, constant),
        (MOVEMENT, movement),
        (MATRIX_PRODUCTS, matrix_product),
        (BATCH_NORMS, batch_norm),
        (REDUCTIONS, reduction),
        (ALONG_DIM, along_dim),
        (ALONG_DIMS, along_dims),
        (SCATTERED_ROWS | SCATTERED_VALUES, scattered),
        (ELEMENTWISE, elementwise),
    ]
    for names, rule in by_set:
        if name in names:
            return None if func._overloadname == "dtype" else rule  # view.dtype reinterprets bits, so it has no rule
    if name.lstrip("_").startswith(WINDOWS):
        return windows
    return elementwise if _is_pointwise(func) else None


def _is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Whether an operation is elementwise. In-place ones lack the tag, so the functional form is checked too."""
    name = func.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    functional = getattr(packet, func._overloadname, func) if packet is not None else func
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in functional.tags
