"""Chains of modules: found where they are, and only there; a walk along one sees what whole passes see."""

import pytest
import torch
from networks import network
from torch import Tensor, nn
from torch.nn import functional

from nac_gpu.network.running import evaluating
from nac_gpu.network.walking import Chains, Place, Walk, find_chains
from nac_gpu.network.watching import captured


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.two(self.one(x).relu()) + shift, shift


class Blocks(nn.Module):
    """Blocks that are called with something beside the value that passes through them."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.ones(6)
        start = x
        for number, block in enumerate(self.blocks):
            if self.kind == "depends":
                shift = x.mean(0)
            x, _ = block(x, shift=shift)
            if self.kind == "skips" and number == 2:
                x = x + start
            if self.kind == "writes" and number == 1:
                x.mul_(2)
        return self.head(x)


def chains(model: nn.Module, inputs: Tensor) -> Chains:
    with evaluating(model):
        return find_chains(model, inputs)


def test_blocks_and_their_head_are_a_chain() -> None:
    found = chains(Blocks(), torch.randn(5, 6))
    assert found.modules == (("blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"),)
    assert found.place("blocks.2.one") == Place(0, 2)
    assert found.together(["blocks.1.one", "blocks.3.two"]) == (Place(0, 1), Place(0, 3))
    assert found.together(["blocks.1.one", "elsewhere"]) is None


def test_a_chain_ends_where_something_else_comes_in_or_is_written() -> None:
    assert chains(Blocks("depends"), torch.randn(5, 6)).place("blocks.1") is None
    skips = chains(Blocks("skips"), torch.randn(5, 6))
    assert skips.together(["blocks.0", "blocks.2"])
    assert skips.together(["blocks.2", "blocks.3"]) is None
    writes = chains(Blocks("writes"), torch.randn(5, 6))
    assert writes.together(["blocks.1", "blocks.2"]) is None
    assert writes.together(["blocks.0", "blocks.1"])
    assert writes.together(["blocks.2", "blocks.3"])


def test_what_a_chain_is_called_with_may_come_from_another() -> None:
    walk = Walk(Chains((("a",), ("b",))), [])
    walk._others |= {(0, 0): [], (0, 1): []}
    walk.forget(Place(0, 0))
    assert list(walk._others) == [(0, 0)]
    walk.forget(None)
    assert not walk._others


@pytest.mark.parametrize("onward", [False, True])
@pytest.mark.parametrize("name", ["cnn", "vgg16", "residual"])
def test_a_walk_sees_what_whole_passes_see(name: str, onward: bool) -> None:
    model, inputs = network(name)
    batches = [inputs, inputs + 0.5]
    found = chains(model, inputs)
    assert found.modules
    walk = Walk(found, batches)
    layers = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    seen_any = False
    with evaluating(model):
        for layer in layers:
            place = found.place(layer)
            if place is None:
                continue
            for number, batch in enumerate(batches):
                seen: list[Tensor] = []

                def take(_: str, x: Tensor, seen: list[Tensor] = seen) -> None:
                    seen.append(x.clone())

                if walk.look(model, number, (place, place), {layer: 1}, take, onward=onward):
                    seen_any = True
                    (expected,) = captured(model, batch, {layer: 1})[layer]
                    assert torch.allclose(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert seen_any


def test_what_was_changed_before_is_forgotten() -> None:
    model, x = Blocks(), torch.randn(5, 6)
    walk = Walk(chains(model, x), [x])
    last = (Place(0, 3), Place(0, 3))

    def seen() -> Tensor:
        found: list[Tensor] = []
        assert walk.look(model, 0, last, {"blocks.3.one": 1}, lambda _, value: found.append(value.clone()))
        return found[0]

    with evaluating(model):
        before = seen()
        model.blocks[0].two.bias += 1
        assert torch.equal(seen(), before)  # it goes on from where it was
        walk.forget(Place(0, 0))
        assert torch.allclose(seen(), captured(model, x, {"blocks.3.one": 1})["blocks.3.one"][0])
        assert not torch.equal(seen(), before)
        walk.forget(None)
        assert functional.mse_loss(seen(), before) > 0
