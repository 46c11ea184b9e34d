"""Selects the rule for each ATen operation of a recorded pass.

Operations that move data are applied to the planes themselves, so all kinds of reshapes, concatenations and shuffles
share one rule. An operation without a rule freezes its inputs: the network stays larger, but is never wrong.
"""

from dataclasses import replace
from functools import cache

import torch

from nac_gpu.tracing.atoms import Labels
from nac_gpu.tracing.recorder import Call, Notes, name_of, unfilled
from nac_gpu.tracing.rules.buffers import Rule, Way, alone, held, meet, repeated
from nac_gpu.tracing.rules.elementwise import (
    ALONG_DIM,
    ELEMENTWISE,
    REDUCTIONS,
    WINDOWS,
    along_dim,
    elementwise,
    fill,
    glu,
    reduction,
    windows,
)
from nac_gpu.tracing.rules.movement import (
    MOVEMENT,
    SCATTERED,
    constant,
    copy,
    identity,
    join,
    lookup,
    movement,
    pixel_shuffle,
    scattered,
)
from nac_gpu.tracing.rules.norms import BATCH_NORMS, batch_norm, group_norm, layer_norm
from nac_gpu.tracing.rules.products import MATRIX_PRODUCTS, convolution, embedding, matrix_product

IDENTITY = frozenset("alias detach clone contiguous _to_copy lift_fresh lift_fresh_copy dropout alpha_dropout".split())
#: Return one constant in the shape of the input, so the result has the same value for all channels.
CONSTANTS = frozenset("zeros_like ones_like full_like".split())
#: Return one constant in a size that is given as an argument.
FACTORIES = frozenset("zeros ones full new_zeros new_ones new_full scalar_tensor".split())
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
    for tensor in call.tensors:
        notes.atoms.separations.extend(notes.labels_of(tensor).pending)
    labelled = [tensor for tensor in call.tensors if notes.planes(tensor)]
    rule, buffers = _rule(call.func), held(notes, call)
    if not labelled or call.name in VALUE_FREE:
        return _unlabelled(notes, call, rule)
    if rule not in (movement, lookup, join, identity, constant):
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
    if call.name in VALUE_FREE or not call.outputs:
        return call.each(Labels(uniform=_stays_uniform(notes, call, rule)))
    uniform, buffers = _stays_uniform(notes, call, rule), held(notes, call)
    try:
        way = None if rule is None else WAYS.get(rule)
        found = alone(notes, call, rule, way) if buffers else call.each(Labels())
        return [replace(labels, uniform=uniform, equal=repeated(notes, call, way)) for labels in found]
    except Exception as error:  # as in `apply`
        notes.freeze_latent(buffers, f"operation {call.name} was used in a way that is not known ({error})")
        return call.each(Labels())


def _stays_uniform(notes: Notes, call: Call, rule: Rule | None) -> bool:
    """Whether the result is uniform: all inputs are, and the operation only moves values or acts elementwise."""
    tensors = call.tensors
    keeps = rule in (movement, identity, constant, join, elementwise) and call.name != "constant_pad_nd"
    return keeps and bool(tensors) and all(notes.labels_of(tensor).uniform or not tensor.ndim for tensor in tensors)


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
        (SCATTERED, scattered),
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
