"""Channels that are filled up with zeros, as in the shortcuts without parameters of residual networks."""

from collections.abc import Callable

import pytest
import torch
from plans import prepared
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.testing import merge_copies, randomise
from nac_gpu.tracing.trace import record

Shortcut = Callable[["Widened", Tensor, Tensor], Tensor]


class Widened(nn.Module):
    """A residual stream of 8 channels that goes on with 16, and a layer behind it."""

    def __init__(self, shortcut: Shortcut) -> None:
        super().__init__()
        self.shortcut, self.pad = shortcut, 4
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.again, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.norm(self.wide(x))
        x = (self.shortcut(self, x[:, :, ::2, ::2], y) + y).relu()
        return self.head((x + self.again(x)).mean((2, 3)))


INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def widened(shortcut: Shortcut) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Widened(shortcut)).eval()


def half_each(s: Widened, x: Tensor, y: Tensor) -> Tensor:
    pad = (y.shape[1] - x.shape[1]) // 2
    return F.pad(x, (0, 0, 0, 0, pad, pad))


def zeros_behind(s: Widened, x: Tensor, y: Tensor) -> Tensor:
    zeros = torch.zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:], dtype=x.dtype)
    return torch.cat([x, zeros.to(x.device)], 1)


FOLLOWING: dict[str, tuple[Shortcut, dict[str, int]]] = {
    "at_both_ends": (half_each, {"stem": 8, "wide": 4}),
    "behind": (lambda s, x, y: F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])), {"stem": 8, "wide": 8}),
    "joined": (zeros_behind, {"stem": 8, "wide": 8}),
    "kept_in_the_block": (lambda s, x, y: F.pad(x, (0, 0, 0, 0, s.pad, s.pad)), {"stem": 8, "wide": 4}),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_channels_beside_zeros_merge_where_their_number_follows(name: str) -> None:
    shortcut, sizes = FOLLOWING[name]
    model = widened(shortcut)
    plan = prepared(model, INPUTS)
    assert {group.name: group.size for group in plan.groups} == sizes
    assert [alone.layer for alone in plan.plan.left_alone] == ["head"]
    for seed in (1, 2):
        found = merge_copies(plan.model, INPUTS, plan.choices, seed)
        assert found.error < 1e-8
        assert not found.vacuous


def test_both_ends_keep_equal_numbers() -> None:
    (_, beside) = record(widened(half_each), INPUTS).groups
    assert next(m.index.tolist() for m in beside.members if m.tensor == "wide.weight") == [
        [n, n + 12] for n in range(4)
    ]


@pytest.mark.parametrize("pads", [(4, 4), (3, 5), (0, 8)])
def test_a_number_of_zeros_in_the_code_stays_and_the_stream_merges(pads: tuple[int, int]) -> None:
    model = widened(lambda s, x, y: F.pad(x, (0, 0, 0, 0, *pads)))
    plan = prepared(model, INPUTS)
    assert {group.name: group.size for group in plan.groups} == {"stem": 8}
    refused = [alone for alone in plan.plan.left_alone if alone.layer.startswith("wide")]
    assert refused
    assert all("the smaller network does not run" in alone.reason for alone in refused)
    assert merge_copies(plan.model, INPUTS, plan.choices).error < 1e-8


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: x + torch.arange(16.0)[:, None, None],
        lambda x: x.softmax(1),
        lambda x: torch.cat([x[:, :8], torch.rand(len(x), 8, *x.shape[2:])], 1),
    ],
    ids=["numbered", "softmax", "noise"],
)
def test_zeros_that_were_changed_keep_channels_apart(changed: Callable[[Tensor], Tensor]) -> None:
    graph = record(widened(lambda s, x, y: changed(F.pad(x, (0, 0, 0, 0, 0, 8)))), INPUTS)
    assert not any(group.name.startswith("wide") for group in graph.groups)
    reasons = {alone.layer: alone.reason for alone in graph.left_alone}
    assert "wide" in reasons
