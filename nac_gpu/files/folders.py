"""Compressed models as folders of Hugging Face's transformers, whose configuration must express the widths.

A configuration holds one width for all layers of a kind. Whether it can express a plan is known before anything is
merged (`check_folder`), and is looked at again when the model is saved.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nac_gpu.merging.attributes import attributes
from nac_gpu.network.costs import Cost
from nac_gpu.network.state import shapes_of
from nac_gpu.planning.alike import unnumbered
from nac_gpu.planning.plans import GroupPlan, Plan
from nac_gpu.tracing.graph import Choice, Group, Member, Producer

#: Shapes of tensors by name.
Shapes = Mapping[str, tuple[int, ...]]


def check_folder(model: nn.Module, plan: Plan, name: str) -> None:
    """Check before a compression that its result can be saved to a folder.

    Args:
        model: that the plan is for; its weights do not matter.
        plan: what will be done.
        name: of the folder, for error messages.

    Raises:
        ValueError: the model is none of transformers, or its configuration cannot express the plan's widths.
    """
    if not hasattr(model, "save_pretrained"):
        raise not_a_folder(model, name)
    own = shapes_of(model)
    expected = _built(model, _configured(model, plan))
    wrong = list(_not_expressed(plan, own, expected))
    if wrong:
        raise _error(model, plan, wrong, name, own)


def check_saved(model: nn.Module, plan: Plan, original: Shapes, name: str) -> None:
    """Check that the configuration of a compressed model builds a network of its shapes.

    Args:
        model: the compressed model.
        plan: of the compression.
        original: shapes of the original's tensors.
        name: of the folder, for error messages.

    Raises:
        ValueError: it builds another one.
    """
    config: Any = model.config
    expected, saved = _built(model, copy.deepcopy(config)), set(model.state_dict())
    wrong = [
        f"{tensor} {shape} where the configuration gives {(expected or {}).get(tensor)}"
        for tensor, shape in shapes_of(model).items()
        if tensor in saved and (expected is None or shape != expected.get(tensor))
    ]
    if not wrong:
        return
    found = list(_not_expressed(plan, original, expected))
    if found:
        raise _error(model, plan, found, name, original)
    raise ValueError(
        f"the configuration of {type(model).__name__} cannot express {len(wrong)} tensors, such as {wrong[0]}; "
        f"{_file(name)}"
    )


def not_a_folder(model: nn.Module, name: str) -> ValueError:
    """The error for a name that is no file, and a model that is none of transformers."""
    return ValueError(f"{name} does not end in .safetensors, and {type(model).__name__} has no save_pretrained")


def _configured(model: nn.Module, plan: Plan) -> Any:
    """A copy of the model's configuration with the plan's widths, as compressing the model will change it."""
    copies: dict[int, Any] = {}
    own: Any = model.config
    config = copy.deepcopy(own, copies)
    modules = dict(model.named_modules())
    for (module, path), value in attributes(model, [_choice(group) for group in plan.groups]).items():
        held = copies.get(id(getattr(modules[module], "config", None)))
        if held is not None and path.startswith("config."):  # configurations of parts may be copies of their own
            setattr(held, path.removeprefix("config."), value)
    return config


def _choice(planned: GroupPlan) -> Choice:
    """A group of a plan as far as configurations ask: its layers and sizes."""
    layers = planned.layers or (planned.name,)
    nowhere = torch.empty(0, dtype=torch.int64)
    producers = tuple(Producer(Member(layer, 0, "mean", nowhere), layer, None, None) for layer in layers)
    group = Group(planned.name, planned.before, (), producers, (), layers if planned.units else ())
    return Choice(group, planned.after)


def _built(model: nn.Module, config: Any) -> Shapes | None:
    """The shapes of the network that a configuration builds; None if it builds none, as with heads left over."""
    try:
        with torch.device("meta"):
            return shapes_of(type(model)(config))
    except Exception:  # of any kind: configurations are checked by code of the model
        return None


def _not_expressed(plan: Plan, original: Shapes, expected: Shapes | None) -> Iterator[GroupPlan]:
    """The groups, and layers that are left alone, that a configuration gives another width than the plan."""
    merged = [group for group in plan.groups if group.after < group.before]
    if expected is None:  # heads, if there are any, since any number of channels can be built
        yield from [group for group in merged if group.units] or merged
        return
    kept = [GroupPlan(alone.layer, (alone.layer,), alone.size, alone.size) for alone in plan.left_alone]
    kept += [group for group in plan.groups if group.after == group.before]
    for group in (*merged, *kept):
        for layer in group.layers:
            name = next((name for name in (f"{layer}.weight", layer) if name in original and name in expected), "")
            if name and not _fits(group, original[name], expected[name]):
                yield group
                break


def _fits(group: GroupPlan, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether any dimension of a tensor changes as the group does, which may be a part of it."""
    if len(before) != len(after):
        return False
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old % group.before == 0]
    return not pairs or any(old * group.after == new * group.before for old, new in pairs)


@dataclass(frozen=True)
class _Fault:
    """What a configuration cannot express.

    Attributes:
        heads: heads or groups of channels that were merged.
        uneven: layers that have the same width, but not after the compression.
        unknown: merged channels whose number is in no entry of the configuration.
    """

    heads: list[GroupPlan]
    uneven: list[GroupPlan]
    unknown: list[GroupPlan]


def _fault(model: nn.Module, plan: Plan, wrong: Sequence[GroupPlan], shapes: Shapes) -> _Fault:
    """What is the matter with groups that a configuration gives another width than the plan."""
    fault = _Fault([], [], [])
    kinds: dict[tuple[object, ...], list[GroupPlan]] = {}
    for group in wrong:
        kinds.setdefault(_kind(group), []).append(group)
    for kind, alike in kinds.items():
        alike += [group for group in plan.groups if _kind(group) == kind and group not in alike]
        widths = sorted({group.after for group in alike})
        if len(widths) > 1 and any(_even(model, alike, width, shapes) for width in (widths[0], widths[-2])):
            fault.uneven.extend(next([alike[0], group] for group in alike if group.after != alike[0].after))
        else:
            (fault.heads if alike[0].units else fault.unknown).extend(alike)
    return fault


def _kind(group: GroupPlan) -> tuple[object, ...]:
    return unnumbered(group.name, group.name), group.before, group.units


def _even(model: nn.Module, groups: Sequence[GroupPlan], width: int, shapes: Shapes) -> bool:
    """Whether the configuration could express these groups if all had this width."""
    even = tuple(replace(group, after=width) for group in groups)
    plan = Plan(even, (), Cost(0, 0), Cost(0, 0))
    expected = _built(model, _configured(model, plan))
    return expected is not None and not list(_not_expressed(plan, shapes, expected))


def _error(model: nn.Module, plan: Plan, wrong: Sequence[GroupPlan], name: str, shapes: Shapes) -> ValueError:
    """The error that says what the configuration cannot express, and what to do."""
    what, remedies, fault = [], [], _fault(model, plan, wrong, shapes)
    if fault.heads:
        what.append(f"cannot express that heads were merged ({_told(fault.heads)})")
        only = _channels_only(plan, shapes)
        if only and not fault.unknown:
            listed = ", ".join(f'"{pattern}"' for pattern in only)
            spoken = " ".join(f"'{pattern}'" for pattern in only)
            remedies.append(f"leave heads as they are with only=[{listed}] (nac: --only {spoken})")
    if fault.uneven:
        first, second, *_ = fault.uneven
        widths = f"{first.after} in {first.name}, {second.after} in {second.name}"
        what.append(f"has one width for all layers and cannot express different ones ({widths})")
        remedies += [] if fault.unknown else ["give all layers of a kind one width with width=0.5 (nac: --width 0.5)"]
    if fault.unknown:
        what.append(f"cannot express the width of {_told(fault.unknown)}")
    said = " and ".join(what)
    return ValueError(
        f"the configuration of {type(model).__name__} {said}; {', '.join(remedies)}{', or ' if remedies else ''}"
        f"{_file(name)}"
    )


def _file(name: str) -> str:
    return f"save to a file such as {name}.safetensors, which nac_gpu.load opens"


def _told(groups: Sequence[GroupPlan]) -> str:
    first, *more = sorted(groups, key=lambda group: group.after == group.before)  # merged ones first
    return f"{first.name}: {first.before} -> {first.after}" + (f", and {len(more)} more" if more else "")


def _channels_only(plan: Plan, shapes: Shapes) -> list[str]:
    """Patterns of names that mean the groups of channels and no heads: one word that all have, if there is one.

    Of several such words it is the one that means the fewest other layers, since it says most of these.
    """
    channels = [group for group in plan.groups if not group.units]
    units = [name for group in plan.groups if group.units for name in (group.name, *group.layers)]
    named = [layer for group in channels for layer in group.layers]
    layers = {tensor.rpartition(".")[0] for tensor in shapes} - set(named)
    words = [
        word
        for word in dict.fromkeys(named[0].split(".") if named else ())
        if not word.isdecimal()
        and all(word in layer.split(".") for layer in named)
        and not any(word in name for name in units)
    ]
    if words:
        return [f"*{min(words, key=lambda word: sum(word in layer for layer in layers))}*"]
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?=\.)", "*", group.name) for group in channels))
