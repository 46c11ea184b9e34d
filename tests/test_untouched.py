"""The user's model stays as it is, whatever its code writes when it runs, and whatever is raised."""

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nac_gpu as nac

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def halves(model: "Writes") -> None:
    model.last.weight.div_(2)


def writes_to_data(model: "Writes") -> None:
    model.first.bias.data.view(-1)[0] += 1


def writes_with_numpy(model: "Writes") -> None:
    model.first.weight.detach().numpy()[0] = 3


def averages(model: "Writes") -> None:
    model.average.lerp_(torch.ones(16), 0.1)


def replaces(model: "Writes") -> None:
    model.last.bias = nn.Parameter(model.last.bias + 1)


def counts(model: "Writes") -> None:
    model.calls += 1
    model.seen["calls"].append(model.calls)


def remembers(model: "Writes") -> None:
    model.table.add_(1)
    model.history.append(model.table.clone())
    model.newly = model.table * 2


def freezes(model: "Writes") -> None:
    model.first.weight.requires_grad_(False)
    model.register_buffer("extra", torch.ones(2))


def switches(model: "Writes") -> None:
    model.last.train(not model.last.training)


WRITERS: tuple[Callable[["Writes"], None], ...] = (
    halves,
    writes_to_data,
    writes_with_numpy,
    averages,
    replaces,
    counts,
    remembers,
    freezes,
    switches,
)


class Writes(nn.Module):
    """Changes itself when it runs: every time or only the first time, and perhaps raises after some runs."""

    def __init__(self, writers: list[Callable[["Writes"], None]], once: bool, fails_after: int | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("average", torch.zeros(16))
        self.average: Tensor
        self.writers, self.once, self.fails_after, self.runs = writers, once, fails_after, 0
        self.calls, self.seen, self.history = 0, {"calls": [0]}, collections.deque([torch.zeros(2)])
        self.table = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        with torch.no_grad():
            for write in self.writers if self.runs == 1 or not self.once else ():
                write(self)
        if self.fails_after is not None and self.runs > self.fails_after:
            raise OSError("the disk is full")
        x = x.mul_(2)  # the inputs, too
        return self.last(self.first(x).relu())


def content(value: Any) -> Any:
    """Everything that a value holds, in a form that can be compared."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.requires_grad, value.detach().numpy().tobytes()
    if isinstance(value, nn.Module):
        return type(value).__name__, content(vars(value))
    if isinstance(value, dict):
        return [(key, content(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | collections.deque):
        return [content(item) for item in value]
    return repr(value)


def planned(model: nn.Module) -> None:
    nac.plan(model, X, params=0.6, calibration=[X])


def compressed(rule: Any) -> Callable[[nn.Module], None]:
    return lambda model: nac.compress(model, X, width=0.5, calibration=[X, X], rule=rule, refine=1) and None


def reported(model: nn.Module) -> None:
    small = nac.compress(copy.deepcopy(model), X, width=0.5, calibration="none")
    untouched(small, lambda own: nac.report(model, own, X, calibration=[X], timed={4: 0.01}) and None)


def costed(model: nn.Module) -> None:
    nac.cost(model, X)


def copies_checked(model: nn.Module) -> None:
    nac.testing.check_copies(model, X)


USES = (planned, *map(compressed, ("compensated", "restored", "centroid")), reported, costed, copies_checked)


def untouched(model: nn.Module, use: Callable[[nn.Module], None]) -> None:
    """Use a model, and check that neither it nor the inputs changed."""
    before, inputs = content(model), X.clone()
    # A model that writes to its weights may have nothing to compress, and one that raises cannot be compressed.
    try:
        use(model)
    except (ValueError, RuntimeError, OSError, AssertionError) as error:
        said = str(error)
        assert any(word in said for word in ("nothing to compress", "disk is full", "changed the outputs")), said
    assert content(model) == before
    assert torch.equal(X, inputs)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(WRITERS), max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 12)),
    st.sampled_from(USES),
)
def test_what_forward_writes_stays_in_a_copy(
    writers: list[Any], once: bool, fails_after: int | None, use: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    untouched(Writes(writers, once, fails_after), use)


@pytest.mark.parametrize("use", USES)
def test_each_use_leaves_a_model_that_writes_everything(use: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    untouched(Writes(list(WRITERS), False, None), use)


def test_an_exported_model_is_not_changed(tmp_path: Any) -> None:
    torch.manual_seed(0)
    untouched(Writes([averages], False, None), lambda model: nac.export(model, tmp_path / "model.pt2", X) and None)


def test_a_model_that_writes_to_its_weights_is_compressed_by_its_weights() -> None:
    class Rescales(nn.Module):
        """Divides its weights the first time it runs, as models do that keep away from the limits of float16."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.done = nn.Linear(6, 16), nn.Linear(16, 3), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.done:
                with torch.no_grad():
                    self.last.bias.data.div_(2)
                self.done = True
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    model = Rescales()
    twin = copy.deepcopy(model)
    plan = nac.plan(model, X, params=0.6)
    assert "forward writes to last.bias" in "".join(plan.changes)
    small = nac.compress(model, X, plan)
    assert not model.done
    assert not small.done
    assert torch.equal(model(X.clone()), twin(X.clone()))
    wide = nac.compress(twin, X, width={"first": 16})
    assert torch.equal(wide(X.clone()), twin(X.clone()))
