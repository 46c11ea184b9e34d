"""Models that do not take what the default does to them: each step that fails is replaced, and the plan says so."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nac_gpu as nac
from nac_gpu.calibration import dream
from nac_gpu.calibration.activations import observe
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.files.origin import origin_of
from nac_gpu.network.state import tensors
from nac_gpu.tracing.trace import record

IMAGES, VECTORS = torch.randn(2, 3, 9, 9), torch.randn(4, 6)
NORMS, NOISE, DRAWN = "dreamed up from the statistics", "of noise, scaled to fit", "drawn from the weights"
WEIGHTS = "neurons are compared by their weights, without compensation"
pytestmark = pytest.mark.usefixtures("short_dreams")


def convolutions() -> nn.Sequential:
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 5, 3))


def vectors() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


class Around(nn.Module):
    """A network that some code calls."""

    def __init__(self, net: nn.Module, code: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.code = net, code

    def forward(self, x: Tensor) -> Any:
        return self.code(self.net, x)


def without_gradients(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def refusing_gradients(net: nn.Module, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise NameError("only for inference")
    return net(x)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (16 * x).round() / 16


def by_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return net(x * float(x.numpy().std() > 0))


def middle_by_numpy(net: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(net, nn.Sequential)
    read = net[:3](x)
    assert read.detach().numpy().size
    return net[3:](read)


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(net, nn.Sequential)
    gate = net[0](x).sigmoid()
    squares = gate * gate
    return net[1:](squares + gate.mul_(2))


def two_only(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.view(2, 3, 9, 9))


def four_only(net: nn.Module, x: Tensor) -> Tensor:
    if len(x) != 4:
        raise ValueError("four, please")
    return net(x)


def unusable(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).cumsum(1).argmax(1)


def around(code: Callable[[nn.Module, Tensor], Any], net: Callable[[], nn.Module] = convolutions) -> nn.Module:
    return Around(net(), code)


def statistics(mean: float, variance: float) -> nn.Module:
    model = convolutions()
    model[1].running_mean.fill_(mean)
    model[1].running_var.fill_(variance)
    return model


def changed(factor: float) -> nn.Module:
    model = vectors()
    model[0].weight.data *= factor
    return model


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return convolutions().requires_grad_(False)


class Unused(nn.Sequential):
    """It has a BatchNorm that it does not run."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input) if not isinstance(layer, nn.BatchNorm1d) else input
        return input


#: How a model is made, its inputs, and what its plan says about its evidence.
AWKWARD: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "no_grad": (lambda: around(without_gradients), IMAGES, NORMS),
    "no_grad, vectors": (lambda: around(without_gradients, vectors), VECTORS, DRAWN),
    "refusing": (lambda: around(refusing_gradients), IMAGES, f"{NOISE}.*failed \\(NameError: only for inference"),
    "detach": (lambda: around(lambda net, x: net(x.detach())), IMAGES, f"{NOISE}.*dreaming failed \\(RuntimeError: "),
    "no backward": (lambda: around(lambda net, x: net(_Rounded.apply(x))), IMAGES, f"{NOISE}.*\\(NotImplementedError"),
    "numpy": (lambda: around(by_numpy), IMAGES, f"{NOISE}.*\\(RuntimeError: Can't call numpy"),
    "numpy in the middle": (lambda: around(middle_by_numpy), IMAGES, NORMS),
    "in place": (lambda: around(in_place), IMAGES, f"{NOISE}.*modified by an inplace o"),
    "batches of two": (lambda: around(two_only), IMAGES, NORMS),
    "batches of four": (lambda: around(four_only, vectors), VECTORS, DRAWN),
    "nothing to compare": (lambda: around(unusable), IMAGES, "by the errors of the groups alone, because the outputs"),
    "no deviation": (lambda: statistics(0, 0), IMAGES, NORMS),
    "huge deviation": (lambda: statistics(0, 1e30), IMAGES, NORMS),
    "dead": (lambda: changed(0), VECTORS, f"{WEIGHTS}, because dreaming failed \\(ValueError: .* not finite"),
    "overflowing": (lambda: changed(1e25), VECTORS, f"{WEIGHTS}, because dreaming failed"),
    "unused": (lambda: Unused(*vectors(), nn.BatchNorm1d(3)), VECTORS, f"{DRAWN}.*no BatchNorm with statistics is run"),
    "inference tensors": (in_inference_mode, IMAGES, NORMS),
    "float16": (lambda: convolutions().half(), IMAGES.half(), f"{NORMS} of BatchNorm, in float32"),
    "float16, overflowing": (
        lambda: changed(3e4).half(),
        VECTORS.half(),
        f"{DRAWN} of the first layer, and of noise, in float32",
    ),
    "bfloat16": (lambda: convolutions().bfloat16(), IMAGES.bfloat16(), NORMS),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_the_default_does_what_it_can_and_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dream, "multiplies_bfloat16", lambda _: True)
    torch.manual_seed(0)
    make, inputs, said = AWKWARD[name]
    model = make().eval()
    plan = nac.plan(model, inputs, params=0.5)
    assert re.search(said, "\n".join(plan.changes)), plan.changes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = nac.compress(model, inputs, width=0.5)
    origin = origin_of(small)
    assert origin is not None
    failures = [line for line in origin.plan.changes if " failed (" in line]
    assert [str(warning.message) for warning in caught] == failures
    assert ("because dreaming failed" in " ".join(failures)) == ("because dreaming failed" in " ".join(plan.changes))
    assert [tensor.dtype for tensor in tensors(small).values()] == [tensor.dtype for tensor in tensors(model).values()]
    with torch.no_grad():
        found, expected = (pytree.tree_leaves(each(inputs)) for each in (small, model))
    for now, then in zip(found, expected, strict=True):
        assert now.shape == then.shape
        assert bool(torch.isfinite(now).all())


class Particular(nn.Module):
    """A network that does not run where a weight of its last layer is zero, as it is while neurons are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.last.weight.detach().numpy().all():
            raise ZeroDivisionError("a weight is zero")
        return self.last(self.first(x).relu())


def test_consumers_that_cannot_be_compensated_keep_their_sums() -> None:
    torch.manual_seed(0)
    model = Particular()
    plan = nac.plan(model, VECTORS, params=0.5)
    assert "because measuring how the outputs change failed (ZeroDivisionError: a weight is zero)" in plan.changes[1]
    said = r"^last: not compensated, because that failed \(ZeroDivisionError: a weight is zero\)$"
    with pytest.warns(UserWarning, match=said):
        # so few that none are kept aside: else what was not refitted would be tried, too
        small = nac.compress(model, VECTORS, plan, refine=0, calibration=[torch.randn(8, 6)])
    origin = origin_of(small)
    assert origin is not None
    assert origin.plan.changes[: len(plan.changes)] == plan.changes
    assert re.search(said, origin.plan.changes[-1])
    summed = nac.compress(model, VECTORS, plan, calibration="none")
    assert torch.allclose(small.last.bias, summed.last.bias)  # type: ignore[union-attr]


def test_data_of_the_user_that_fails_is_an_error_of_the_user() -> None:
    model = around(four_only, vectors)
    with pytest.raises(RuntimeError, match=r"^the forward pass fails on the calibration data: four, please$") as raised:
        nac.compress(model, VECTORS, width=0.5, calibration=[torch.randn(3, 6)])
    assert isinstance(raised.value.__cause__, ValueError)
    nac.compress(model, VECTORS, width=0.5, calibration=[torch.randn(4, 6) for _ in range(3)])  # in batches of four


def test_activations_in_inference_mode_are_summed_up() -> None:
    def inferred(net: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return net(x)

    model = vectors()
    graph, state = record(model, VECTORS), tensors(model)
    prefixed = record(around(lambda net, x: net(x), vectors), VECTORS)
    wrapped = Around(model, inferred)
    found = observe(wrapped, tensors(wrapped), prefixed.groups, [VECTORS, 2 * VECTORS])
    expected = observe(model, state, graph.groups, [VECTORS, 2 * VECTORS])
    for name, activity in expected.items():
        assert torch.equal(activity.covariances[0], found[f"net.{name}"].covariances[0])


def raising(error: BaseException) -> Callable[[object], None]:
    def work(_: object) -> None:
        raise error

    return work


def test_what_is_not_about_the_model_is_raised() -> None:
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    for error in (KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError(), allocator):
        with pytest.raises(type(error)):
            attempt(raising(error))
    with pytest.raises(StepError, match=r"^MemoryError$"):
        attempt(raising(MemoryError()), survives_memory=True)


def test_an_error_is_told_in_a_short_line() -> None:
    for error, line in (
        (ValueError("\n  no \n more"), "ValueError: no"),
        (AssertionError(), "AssertionError"),
        (KeyError("x" * 200), "KeyError: '" + 89 * "x"),
    ):
        with pytest.raises(StepError) as raised:
            attempt(raising(error))
        assert str(raised.value) == line
