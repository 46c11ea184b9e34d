"""Buffers with one value per channel, which merge with the channels that they meet.

A buffer may be anything: the statistics of a frozen BatchNorm, a mask, a table of positions. So its labels are
*latent*: rules take them for labels of a parameter where the buffer, or what was computed from buffers alone, meets
channels along a dimension where it varies, and do not see them anywhere else.
"""

from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto

from torch import Tensor

from nac_gpu.tracing.atoms import Labels, varying
from nac_gpu.tracing.calls import Call
from nac_gpu.tracing.recorder import Notes, aligned

Rule = Callable[[Notes, Call], list[Labels]]


class Way(Enum):
    """What the operations of a rule do to buffers."""

    KEEPS = auto()  # every value stays where it is
    MOVES = auto()  # it moves values of one tensor
    COMBINES = auto()  # it combines values of one tensor along dimensions
    MEETS = auto()  # it is elementwise
    JOINS = auto()  # it joins tensors
    SCALES = auto()  # it normalises, and scales by tensors with one value per channel
    WEIGHS = auto()  # a product: its rule looks for buffers itself


def held(notes: Notes, call: Call) -> list[Tensor]:
    """The operands that were computed from buffers alone."""
    return [tensor for tensor in call.tensors if notes.labels_of(tensor).latent]


def alone(notes: Notes, call: Call, rule: Rule | None, way: Way | None) -> list[Labels]:
    """An operation on tensors without labels, some of which were computed from buffers alone."""
    operands = held(notes, call)
    target = call.args[0] if call.in_place and call.args else None
    if isinstance(target, Tensor) and (target._is_view() or notes.name_of(target) is not None):
        notes.freeze_latent(operands, "values are written in place")
        return call.each(notes.labels_of(target))
    if rule is None or way in (None, Way.SCALES, Way.WEIGHS):
        notes.freeze_latent(operands, f"a buffer is read by operation {call.name}")
        return call.each(Labels())
    if way in (Way.MEETS, Way.JOINS) and not all(_is_fixed(notes, tensor) for tensor in call.tensors):
        notes.freeze_latent(operands, "a buffer meets values that are not channels")
        return call.each(Labels())
    found = rule(notes.awake(operands), call)
    return [Labels(latent=labels.planes, pending=labels.pending) for labels in found]


def meet(notes: Notes, call: Call, rule: Rule, way: Way | None) -> list[Labels]:
    """An operation on tensors of which some have labels, and some were computed from buffers alone."""
    operands = held(notes, call)
    if call.in_place and any(tensor is call.args[0] for tensor in operands):
        notes.freeze_latent(operands, "values are written in place")
        notes.freeze(call.tensors, "values are written in place")
        return call.each(Labels())
    if way is Way.SCALES:
        return rule(notes.awake(operands), call)
    if way is Way.WEIGHS:
        return rule(notes, call)
    ndim = call.outputs[0].ndim
    joins = way is Way.JOINS and all(tensor.ndim == ndim for tensor in call.tensors)
    if way is not Way.MEETS and not joins:
        notes.freeze_latent(operands, f"a buffer is read by operation {call.name}")
        return rule(notes, call)
    dims = {dim for tensor in call.tensors for plane in notes.planes(tensor) for dim in varying(aligned(plane, ndim))}

    def meets(plane: Tensor) -> bool:
        return not dims.isdisjoint(varying(aligned(plane, ndim)))

    asleep = [plane for tensor in operands for plane in notes.labels_of(tensor).latent if not meets(plane)]
    notes.freeze_planes([plane for plane in asleep if varying(plane)], "a buffer meets values that are not channels")
    fixed = all(_is_fixed(notes, tensor) for tensor in call.tensors)
    found = rule(notes.awake(operands, meets), call)
    return [replace(labels, parameter=False, constant=fixed) for labels in found]


def _is_fixed(notes: Notes, tensor: Tensor) -> bool:
    """Whether a tensor was computed from parameters, buffers and constants alone, or is a single number."""
    labels = notes.labels_of(tensor)
    single = tensor.numel() == 1 and not labels.planes
    return single or labels.parameter or labels.constant or labels.uniform or bool(labels.latent)
