"""The origin of a compressed model: what is needed to rebuild it with the code that builds the original."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nac_gpu.network.kept_numbers import number_at, numbers_of, set_number
from nac_gpu.network.state import shapes_of
from nac_gpu.planning.plans import Plan

_KEPT_AS = "_nac_gpu_origin"
_Lists = nn.ModuleList | nn.ModuleDict
#: By the name of a module, its attributes.
Changes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Differences between a compressed model and its original.

    Attributes:
        shapes: of the original's tensors, by name.
        attributes: changed attributes of modules: integers, tuples of them, strings; and integers inside of other
            containers, by their paths (see `nac_gpu.network.kept_numbers`).
        configs: the same for configurations that modules keep as `config`, as models of transformers do.
        plan: of the last compression.
        shortened: new lengths of lists and dictionaries of modules that became shorter, by name.
        seed: of the compression.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Changes
    configs: Changes
    plan: Plan
    shortened: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0


def remember(small: nn.Module, model: nn.Module, plan: Plan, seed: int) -> None:
    """Attach the origin to a compressed model.

    Args:
        small: compressed; it has the same modules as `model`, but lists of modules may be shorter.
        model: the original, without wrappers and parametrisations. If it was compressed before, the origin still
            refers to its own original.
        plan: of the compression.
        seed: of the compression.
    """
    first = origin_of(model)
    shapes = shapes_of(model) if first is None else first.shapes
    attributes = {name: dict(values) for name, values in (first.attributes if first else {}).items()}
    configs = {name: dict(values) for name, values in (first.configs if first else {}).items()}
    shortened = dict(first.shortened) if first else {}
    seen: set[int] = set()
    originals, there = dict(model.named_modules()), dict(small.named_modules())
    for name, new in there.items():
        old = originals[name]
        if isinstance(new, _Lists) and isinstance(old, _Lists) and len(new) < len(old):
            shortened[name] = len(new)
        for attribute, value in (*_changed_inside(old, new), *_changed(vars(old), vars(new))):
            attributes.setdefault(name, {})[attribute] = value
        config = getattr(new, "config", None)
        if config is not None and id(config) not in seen and hasattr(config, "to_dict"):
            seen.add(id(config))
            for attribute, value in _changed(vars(old.config), vars(config)):
                configs.setdefault(name, {})[attribute] = value
    attributes, configs = ({n: c for n, c in changes.items() if n in there} for changes in (attributes, configs))
    setattr(small, _KEPT_AS, Origin(shapes, attributes, configs, replace(plan), shortened, seed))


def origin_of(model: nn.Module) -> Origin | None:
    """The origin of a model, or None if it was not made by compression."""
    return vars(model).get(_KEPT_AS)


def attach(model: nn.Module, origin: Origin) -> None:
    """Attach an origin to a model."""
    setattr(model, _KEPT_AS, origin)


def shorten(model: nn.Module, lengths: Mapping[str, int]) -> None:
    """Shorten lists and dictionaries of modules, by name, to their first entries; in place."""
    for name, length in lengths.items():
        modules = model.get_submodule(name)
        assert isinstance(modules, _Lists), "only these are shortened"
        for key in list(modules._modules)[length:]:
            del modules._modules[key]


def restore(small: nn.Module, origin: Origin) -> None:
    """Set the recorded attributes on the modules of a rebuilt network, and attach the origin.

    Raises:
        ValueError: the network lacks a module or an attribute, or the attribute has another type.
    """
    modules = dict(small.named_modules())
    configs = {name: getattr(module, "config", None) for name, module in modules.items()}
    for changes, holders in ((origin.attributes, modules), (origin.configs, configs)):
        for name, values in changes.items():
            known = vars(holders[name]) if holders.get(name) is not None else {}
            for attribute, value in values.items():
                if known and holders is modules and type(value) is int and number_at(modules[name], attribute):
                    set_number(modules[name], attribute, value)
                elif known and _same_kind(known.get(attribute, None if holders is configs else ...), value):
                    setattr(holders[name], attribute, value)
                else:
                    raise ValueError(
                        f"the module {name!r} has no attribute {attribute} like {value!r}, expected the original's "
                        "code; give the factory that built the original"
                    )
    attach(small, origin)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for attribute, value in new.items():
        if _plain(value) and old.get(attribute) != value:
            yield attribute, value


def _changed_inside(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, int]]:
    """Numbers in containers, and those of NumPy, by their paths."""
    for path, value in numbers_of(old).items():
        now = number_at(new, path)
        name = path.partition(".")[0]
        if now is not None and now != value and not _plain(vars(old)[name]):
            yield path, now


def _plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(isinstance(item, int) for item in value)
    return isinstance(value, int | str)


def _same_kind(old: Any, value: Any) -> bool:
    return (_plain(old) and type(old) is type(value)) or (old is None and isinstance(value, int))
