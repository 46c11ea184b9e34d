"""Functions that hold on to a model run on its copies, and never on the model itself."""

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.network.copying import copied

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
OLD: Any = None  # as a notebook has it: the method that a function replaces
MODEL: Any = None


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def by_closure(model: Any) -> None:
    old = model.forward
    model.forward = lambda x: old(2 * x)


def by_layer(model: Any) -> None:
    old = model[2].forward

    def forward(x: Tensor) -> Tensor:
        return old(x) + 1

    model[2].forward = forward


def by_method(model: Any) -> None:
    old = model.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return old(x)

    model.forward = types.MethodType(forward, model)


def by_partial(model: Any) -> None:
    old = model.forward

    def forward(scale: float, x: Tensor) -> Tensor:
        return old(scale * x)

    model.forward = functools.partial(forward, 3.0)


def by_default(model: Any) -> None:
    def forward(x: Tensor, old: Callable[[Tensor], Tensor] = model.forward) -> Tensor:
        return old(2 * x)

    model.forward = forward


def by_container(model: Any) -> None:
    layers = [[model[0], model[1]], {"rest": (model[2], model[3], model[4])}]

    def forward(x: Tensor) -> Tensor:
        for layer in (*layers[0], *layers[1]["rest"]):  # type: ignore[call-overload]
            x = layer(x)
        return x

    model.forward = forward


def by_reference(model: Any) -> None:
    model.parent = weakref.ref(model)
    model.forward = functools.partial(_through_reference, model.parent)


def _through_reference(parent: Any, x: Tensor) -> Tensor:
    for layer in parent():
        x = layer(x)
    return x


def by_global(model: Any) -> None:
    global OLD
    OLD = model.forward
    model.forward = lambda x: OLD(2 * x)


def by_global_function(model: Any) -> None:
    global MODEL
    MODEL = model
    model.forward = lambda x: _doubled(x)


def _doubled(x: Tensor) -> Tensor:
    return 2 * _all_layers(x)


def _all_layers(x: Tensor) -> Tensor:
    for layer in MODEL:
        x = layer(x)
    return x


def by_recursion(model: Any) -> None:
    def forward(x: Tensor, place: int = 0) -> Tensor:
        return forward(model[place](x), place + 1) if place < len(model) else x

    model.forward = forward


WAYS = [
    *(by_closure, by_layer, by_method, by_partial, by_default, by_container, by_reference),
    *(by_global, by_global_function, by_recursion),
]


@pytest.mark.parametrize("hold", WAYS, ids=lambda way: way.__name__)
def test_a_method_that_was_replaced_is_compressed_like_any_other(hold: Callable[[Any], None]) -> None:
    model = network()
    hold(model)
    expected = model(X)
    small = nac.compress(model, X, width=0.5, calibration="none")
    assert (small[0].out_features, small[2].out_features) == (8, 4)
    assert torch.equal(model(X), expected)
    for layer in model:  # the smaller network needs nothing of the original
        layer.register_forward_hook(lambda *_: pytest.fail("the model itself runs"))
    assert small(X).shape == (4, 3)
    again = copied(small)
    assert torch.equal(again(X), small(X))
    nn.init.zeros_(again[0].weight)
    assert not torch.equal(again(X), small(X))


def write_in_forward(model: Any) -> None:
    old = model.forward

    def forward(x: Tensor) -> Tensor:
        model[0].weight.data.mul_(0.9)
        return old(x)

    model.forward = forward


def write_in_hook(model: Any) -> None:
    def hook(*_: Any) -> None:
        model[4].bias.data.add_(1)

    model[0].register_forward_hook(hook)


def write_before(model: Any) -> None:
    model[2].register_forward_pre_hook(lambda *_: model.steps.add_(1) and None)
    model.register_buffer("steps", torch.zeros(1))


@pytest.mark.parametrize("hold", [write_in_forward, write_in_hook, write_before], ids=lambda way: way.__name__)
def test_what_functions_write_stays_in_the_copies(hold: Callable[[Any], None]) -> None:
    model = network()
    hold(model)
    before = copy.deepcopy(model.state_dict())
    nac.plan(model, X, width=0.5)
    nac.compress(model, X, width=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_functions_share_what_they_shared() -> None:
    model, count = network(), 0
    layer = model[0]

    def add(*_: Any) -> None:
        nonlocal count, layer
        count += 1
        layer = model[count % 5]

    def get() -> Any:
        return layer

    model.register_forward_hook(add)
    model.get = get
    other = copied(model)
    assert other.get() is other[0]
    other(X)
    assert other.get() is other[1]
    assert model.get() is model[0]
    assert count == 0  # the copy's functions count for themselves


def test_functions_without_a_model_stay_the_same() -> None:
    model = network()
    model.act, model.scale = torch.relu, lambda x: 2 * x
    model.rows = {"act": nn.functional.relu, "own": [_doubled.__name__]}
    other = copied(model)
    assert other.act is model.act
    assert other.scale is model.scale
    assert other.rows == model.rows


def test_a_rebound_function_is_like_its_original() -> None:
    model = network()

    def forward(x: Tensor, *, scale: float = 2.0) -> Tensor:
        """Scales."""
        return nn.Sequential.forward(model, scale * x)

    forward.tag = "mine"  # type: ignore[attr-defined]
    model.forward = forward
    other = copied(model).forward
    assert other is not forward
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__kwdefaults__", "tag"):
        assert getattr(other, name) == getattr(forward, name)


class Keeper:
    """An object that `copy.deepcopy` leaves as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> "Keeper":
        return self


class Kept(nn.Module):
    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.up, self.down, self.keeper, self.writes = nn.Linear(6, 16), nn.Linear(16, 3), Keeper(self), writes

    def forward(self, x: Tensor) -> Tensor:
        original: Any = self.keeper.model
        if self.writes:
            original.up.weight.data.mul_(0.9)
        return self.down(self.up(x).relu()) + original.down.bias


def test_an_object_that_leads_to_the_model_may_read_but_not_write() -> None:
    assert nac.compress(Kept(writes=False).eval(), X, width=0.5, calibration="none")(X).shape == (4, 3)
    model = Kept(writes=True).eval()
    before = model.up.weight.clone()
    with pytest.raises(RuntimeError, match=r"Kept would write to up\.weight of the model itself"):
        nac.plan(model, X, width=0.5)
    assert torch.equal(model.up.weight, before)
