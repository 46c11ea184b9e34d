"""Numbers of experts in the attributes of modules and configurations, updated after merging."""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from nac_gpu.experts.mixtures import Lookalike, Mixture

_COUNT = re.compile(r"(?<!shared_)experts$")
#: Names of the modules around a mixture, and its number of experts before and after.
Entry = tuple[list[str], int, int]


def entries(found: Sequence[Mixture], others: Sequence[Lookalike], kept: Sequence[int]) -> list[Entry]:
    """Numbers of experts of all mixtures. Lookalikes keep theirs: the inputs may just not reach such a mixture."""
    entries = [(mixture.around(), mixture.count, count) for mixture, count in zip(found, kept, strict=True)]
    return entries + [(other.around(), other.count, other.count) for other in others]


def _agreed(entries: Sequence[Entry], place: Mapping[str, int]) -> dict[tuple[int, int], int]:
    """The new number of experts by place and old number, if all mixtures inside the place agree on it."""
    counts: dict[tuple[int, int], set[int]] = {}
    for names, before, after in entries:
        for name in names:
            counts.setdefault((place[name], before), set()).add(after)
    return {key: after.pop() for key, after in counts.items() if len(after) == 1}


def attributes(model: nn.Module, entries: Sequence[Entry]) -> dict[tuple[str, str], object]:
    """New values of attributes that contain a number of experts, by (module, attribute)."""
    modules = dict(model.named_modules())
    names = list(modules)
    return {
        (names[number], attribute): after
        for (number, before), after in _agreed(entries, {name: i for i, name in enumerate(names)}).items()
        for attribute, value in vars(modules[names[number]]).items()
        if _says_count(attribute, value, before)
    }


def set_configs(small: nn.Module, model: nn.Module, entries: Sequence[Entry]) -> None:
    """Update the number of experts in configurations of models of transformers, in place."""
    place = {name: id(getattr(module, "config", None)) for name, module in model.named_modules()}
    configs = {place[name]: getattr(module, "config", None) for name, module in small.named_modules()}
    for (number, before), after in _agreed(entries, place).items():
        config = configs.get(number)
        if hasattr(config, "to_dict"):
            for attribute, value in list(vars(config).items()):
                if _says_count(attribute, value, before):
                    setattr(config, attribute, after)


def _says_count(attribute: str, value: object, count: int) -> bool:
    return _COUNT.search(attribute) is not None and type(value) is int and value == count
