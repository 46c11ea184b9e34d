"""Whole numbers that modules keep are found, read and replaced by their paths."""

import copy
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nac_gpu.network.kept_numbers import number_at, numbers_of, reads_of, set_number

Space = namedtuple("Space", "height width")


@dataclass(frozen=True)
class Options:
    hidden: int
    name: str = "x"


class Config:
    """A plain object, which is taken for a configuration by the name of the attribute only."""

    def __init__(self) -> None:
        self.units = 5


class OfHuggingFace(Config):
    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size, self.flag, self.one, self.share, self._own = 3, True, 1, 0.5, 4
        self.sizes, self.pair, self.space = [3, [4, 1]], (np.int64(5), "x"), Space(6, 7)
        self.options, self.table = Options(8), {"a": 9, 2: 10, "b.c": 11}
        self.config, self.object, self.cfg = Config(), Config(), OfHuggingFace()
        self._hidden_list, self.data = [12], [13] * 1000
        self.layer = nn.Linear(14, 15)


FOUND = {
    **{"size": 3, "_own": 4, "sizes.0": 3, "sizes.1.0": 4, "pair.0": 5, "space.0": 6, "space.1": 7},
    **{"options.hidden": 8, "table.a": 9, "table.2": 10, "config.units": 5},
}


def test_numbers_are_found_in_containers_and_in_objects_with_fields() -> None:
    assert numbers_of(Keeps()) == FOUND


@pytest.mark.parametrize("path", FOUND)
def test_a_number_is_replaced_and_nothing_else(path: str) -> None:
    module = Keeps()
    before = {name: (value, copy.deepcopy(value)) for name, value in vars(module).items() if not name.startswith("_")}
    set_number(module, path, 2)
    assert number_at(module, path) == 2
    assert numbers_of(module) == FOUND | {path: 2}
    for name, (shared, value) in before.items():
        assert type(getattr(module, name)) is type(value)
        assert repr(shared) == repr(value) or isinstance(shared, Config | nn.Module)  # others may share it
    assert type(module.pair[0]) is np.int64


def test_what_is_no_number_is_not_found() -> None:
    module = Keeps()
    for path in ("flag", "share", "missing", "sizes.7", "sizes.x", "options.name", "size.real.x", "table.zz"):
        assert number_at(module, path) is None


def test_attributes_are_noted_as_they_are_read() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.other, self.inside = 2, 3, nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x) * self.read

    model = Reads()
    with reads_of(model) as seen:
        model(torch.zeros(1, 4))
    assert {("", "read"), ("", "inside"), ("inside.0", "unflattened_size")} <= seen
    assert ("", "other") not in seen
    assert [type(module) for module in model.modules()] == [Reads, nn.Sequential, nn.Unflatten, nn.Flatten]
