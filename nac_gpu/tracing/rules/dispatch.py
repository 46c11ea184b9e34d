"""What each ATen operation does to channels: the rules of the record.

Movement of data is applied to the planes as it is, so reshapes, concatenations and shuffles of any kind need no rule of
their own. An operation without a rule freezes what enters it: never a wrong network.
"""

from collections.abc import Callable
from functools import cache

import torch

from nac_gpu.tracing.atoms import Labels
from nac_gpu.tracing.recorder import Call, Notes, name_of
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

Rule = Callable[[Notes, Call], list[Labels]]
IDENTITY = frozenset("alias detach clone contiguous _to_copy lift_fresh lift_fresh_copy dropout alpha_dropout".split())
#: One constant everywhere, in the shape of what is read: nothing there keeps channels apart.
CONSTANTS = frozenset("zeros_like ones_like full_like".split())
#: One constant everywhere, whatever the size.
FACTORIES = frozenset("zeros ones full new_zeros new_ones new_full scalar_tensor".split())
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
    if rule not in (movement, lookup, join, identity, constant):
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
            return None if func._overloadname == "dtype" else rule  # view.dtype reads other numbers from the bits
    if name.lstrip("_").startswith(WINDOWS):
        return windows
    return elementwise if _is_pointwise(func) else None


def _is_pointwise(func: torch._ops.OpOverload) -> bool:
    """In-place operations lack the pointwise tag: look at the operation without the trailing underscore too."""
    name = func.overloadpacket.__name__
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    functional = getattr(packet, func._overloadname, func) if packet is not None else func
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in functional.tags
