"""Where a model's experts are: parts of equal form among which a router chooses for every input.

They are found by form, not by name: modules with the same tensors in a list or a dictionary, or a module whose own
tensors have one row for each expert; and near them a matrix, the router's, with an entry for each. Whether that is what
it looks like is tried: in another order, experts and router together must give the same outputs, and experts alone
others.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.comparing import outputs, relative_error
from nac_gpu.network.copying import rebuild
from nac_gpu.network.probes import converted, lively
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors


@dataclass(frozen=True)
class Mixture:
    """Experts of which a router chooses some for every input.

    Attributes:
        name: of the module that holds the experts.
        count: how many experts there are.
        keys: under which the module holds them, if they are modules; else each is a row of its own tensors.
        parts: names of an expert's tensors, within the expert if that is a module, else within the module.
        router: names of the tensors that have an entry for each expert, and the dimension.
    """

    name: str
    count: int
    keys: tuple[str, ...]
    parts: tuple[str, ...]
    router: tuple[tuple[str, int], ...]

    def tensor(self, part: str, number: int = 0) -> str:
        """The name of the tensor that holds a part of an expert."""
        return within(self.name, f"{self.keys[number]}.{part}" if self.keys else part)

    def expert(self, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """An expert's tensors by part."""
        found = {part: state[self.tensor(part, number)] for part in self.parts}
        return found if self.keys else {part: tensor[number] for part, tensor in found.items()}

    def written(self, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors by name that hold these experts."""
        if self.keys:
            return {self.tensor(part, i): expert[part] for i, expert in enumerate(experts) for part in self.parts}
        return {self.tensor(part): torch.stack([expert[part] for expert in experts]) for part in self.parts}

    def names(self) -> list[str]:
        """All of its tensors."""
        numbers = range(self.count) if self.keys else (0,)
        return [self.tensor(part, number) for number in numbers for part in self.parts] + [n for n, _ in self.router]

    def around(self) -> list[str]:
        """The modules that hold it, its router, or one that does; the model itself is the empty string."""
        return _around([self.name, *(name.rpartition(".")[0] for name, _ in self.router)])


@dataclass(frozen=True)
class Lookalike:
    """What has the form of a mixture of experts, and is none: name of the module, how many parts it has, and why."""

    name: str
    count: int
    why: str

    def around(self) -> list[str]:
        """The modules that hold it."""
        return _around([self.name])


def _around(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(own[:length]) for own in parts for length in range(len(own) + 1)))


def within(module: str, name: str) -> str:
    """The full name of what has this name within a module."""
    return f"{module}.{name}" if module else name


def find_mixtures(model: nn.Module, example_inputs: ExampleInputs) -> tuple[list[Mixture], list[Lookalike]]:
    """The mixtures of experts of a model, and what only looks like one.

    Args:
        model: not changed.
        example_inputs: what it is called with.
    """
    state = tensors(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    trial = _Trial(model, example_inputs)
    found, others = [], []
    for name, module in model.named_modules():
        keys = tuple(module) if isinstance(module, nn.ModuleDict) else ()
        keys = tuple(map(str, range(len(module)))) if isinstance(module, nn.ModuleList) else keys
        forms = [_form(module.get_submodule(key)) for key in keys]
        count, parts = (len(keys), tuple(forms[0]) if forms else ()) if keys else _rows(module)
        if count < 2 or not parts:
            continue
        bare = Mixture(name, count, keys, parts, ())
        ways = list(_routers(bare, state, linear))
        if not ways:
            continue
        why = _difference(keys, forms) if keys else ""
        if not why and any(other not in state for other in bare.names()):
            why = "its parts share tensors"
        if not why:
            mixture, why = trial.first_that_holds(ways, _numbers(bare, state))
            if mixture is not None:
                found.append(mixture)
                continue
        others.append(Lookalike(name, count, why))
    return found, others


def _form(module: nn.Module) -> dict[str, torch.Size]:
    return {part: tensor.shape for part, tensor in tensors(module).items()}


def _difference(keys: Sequence[str], forms: Sequence[Mapping[str, torch.Size]]) -> str:
    """How modules differ in their tensors; nothing if they do not."""
    for key, form in zip(keys, forms, strict=True):
        for part in (*forms[0], *form):
            first, own = (tuple(f[part]) if part in f else "none" for f in (forms[0], form))
            if first != own:
                return f"its parts differ: {keys[0]}.{part} {first}, {key}.{part} {own}"
    return ""


def _rows(module: nn.Module) -> tuple[int, tuple[str, ...]]:
    """How many rows a module's own tensors have, several of which hold a matrix in each; and the names of all such."""
    own = dict(module.named_parameters(recurse=False))
    stacks = [name for name, tensor in own.items() if tensor.ndim >= 3]
    counts = {len(own[name]) for name in stacks}
    if len(stacks) < 2 or len(counts) != 1:
        return 0, ()
    count = counts.pop()
    return count, (*stacks, *(n for n, tensor in own.items() if tensor.ndim < 3 and tensor.shape[:1] == (count,)))


def _near(mixture: Mixture, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors that are no expert's, in the module that holds the experts, and further and further out."""
    own = set(mixture.names())
    inside = within(mixture.name, "") if mixture.keys else None
    block = mixture.name
    for _ in range(3):
        prefix = within(block, "")
        yield {
            name: tensor
            for name, tensor in state.items()
            if name.startswith(prefix) and name not in own and not (inside and name.startswith(inside))
        }
        if not block:
            return
        block = block.rpartition(".")[0]


def _routers(mixture: Mixture, state: Mapping[str, Tensor], linear: set[str]) -> Iterator[Mixture]:
    """The mixture with what its router may be, the likeliest first: a module's tensors, with a matrix among them."""
    seen: set[tuple[tuple[str, int], ...]] = set()
    for near in _near(mixture, state):
        by_module: dict[str, list[tuple[str, int]]] = {}
        for name, tensor in near.items():
            if tensor.ndim <= 2 and mixture.count in (tensor.shape[:1] if name in linear else tensor.shape):
                by_module.setdefault(name.rpartition(".")[0], []).append((name, tensor.shape.index(mixture.count)))
        with_matrix = [own for own in by_module.values() if any(state[name].numel() > mixture.count for name, _ in own)]
        for chosen in (*with_matrix, [entry for own in with_matrix for entry in own]):
            if chosen and tuple(chosen) not in seen:
                seen.add(tuple(chosen))
                yield replace(mixture, router=tuple(chosen))


def _numbers(mixture: Mixture, state: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Tensors near a mixture with one number for each expert: a bias of the choice, say, wherever the code keeps it."""
    near = list(_near(mixture, state))[-1]
    return [
        (name, tensor.shape.index(mixture.count))
        for name, tensor in near.items()
        if tensor.numel() == mixture.count and tensor.is_floating_point() and mixture.count in tensor.shape
    ]


_SAME = {torch.float32: 1e-5, torch.float64: 1e-8}  # relative
_OTHER = {torch.float32: 1e-3, torch.float64: 1e-6}
_SURELY_OTHER = 1e-2  # no rounding of float32


class _Trial:
    """Runs a model with its experts in another order, in float64 where float32 does not tell.

    What holds one constant (biases of zero, inputs of zeros) is replaced by random numbers: it would hide who reads it.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._model, self._inputs = model, example_inputs
        self._dtype: torch.dtype | None = None

    def first_that_holds(
        self, ways: Sequence[Mixture], numbers: Sequence[tuple[str, int]]
    ) -> tuple[Mixture | None, str]:
        """The first of these that is a mixture, with those `numbers` that are its router's, too; or why none is."""
        reasons: list[tuple[float, str]] = []
        for mixture in ways:
            error, why = self._failure(mixture)
            wider = [replace(mixture, router=(*mixture.router, n)) for n in numbers if n not in mixture.router]
            if why:  # a bias of zero that the router has elsewhere is not zero here
                mixture = next((one for one in wider if not self._failure(one)[1]), mixture)
                if mixture not in wider:
                    reasons.append((error, why))
                    continue
            for entry in numbers:
                if entry not in mixture.router and self._failure(mixture, entry)[1]:
                    one = replace(mixture, router=(*mixture.router, entry))
                    mixture = mixture if self._failure(one, entry)[1] else one
            return mixture, ""
        return None, min(reasons, key=lambda reason: reason[0])[1]

    def _failure(self, mixture: Mixture, number: tuple[str, int] | None = None) -> tuple[float, str]:
        """By how much the outputs change in another order, and why this is no mixture; nothing if it is one.

        Even if a `number` were not the same for all.
        """
        names = [name for name, _ in mixture.router]
        told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        error, why = math.inf, ""
        for dtype in (torch.float32, torch.float64):
            try:
                both, alone = self._changes(mixture, number, dtype)
            except torch.OutOfMemoryError:
                raise
            except Exception as raised:  # an operation that this type has not, or a model that does not take it
                return error, why or f"in another order of its parts it does not run: {type(raised).__name__}: {raised}"
            if both <= _SAME[dtype] and alone >= _OTHER[dtype]:
                return both, ""
            error, why = both, "its parts change nothing in the outputs of these example inputs"
            if not both <= _SAME[dtype]:
                why = f"in another order its {mixture.count} parts and {told} give other outputs (by {both:.1e})"
            if both > _SURELY_OTHER:
                break
        return error, why

    def _changes(self, mixture: Mixture, number: tuple[str, int] | None, dtype: torch.dtype) -> tuple[float, float]:
        """The relative changes of the outputs where experts and router are in another order, and experts alone."""
        self._convert(dtype)
        state = dict(self._state)
        if number is not None:
            state[number[0]] = lively(state[number[0]], self._generator()).abs()
        order = [*range(1, mixture.count), 0]
        moved = mixture.written([mixture.expert(state, number) for number in order])
        followed = {
            name: state[name].index_select(dim, torch.tensor(order, device=state[name].device))
            for name, dim in mixture.router
        }
        expected, both, alone = (
            outputs(rebuild(self._as_type, state | other, share=True), self._typed_inputs)
            for other in ({}, moved | followed, moved)
        )
        return relative_error(both, expected), relative_error(alone, expected)

    def _convert(self, dtype: torch.dtype) -> None:
        """The model, its tensors and its inputs in another type; one at a time is kept."""
        if self._dtype == dtype:
            return
        self._dtype = dtype
        self._as_type, inputs = self._model, self._inputs
        if any(parameter.dtype != dtype for parameter in self._model.parameters()):
            self._as_type, inputs = converted(self._model, self._inputs, dtype)
        generator = self._generator()
        parameters = {name for name, _ in self._as_type.named_parameters()}
        self._state = {
            name: lively(tensor, generator) if name in parameters else tensor
            for name, tensor in tensors(self._as_type).items()
        }
        self._typed_inputs = pytree.tree_map(lambda value: lively(value, generator), inputs)

    @staticmethod
    def _generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)
