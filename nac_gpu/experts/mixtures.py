"""Finding mixtures of experts: parts of equal shapes among which a router chooses for every input.

They are found by shape, not by name: modules with the same tensors in a list or a dictionary, or a module whose own
tensors have one row for each expert; and near them a matrix of a router with one entry for each expert. Each candidate
is tested: permuting experts and router together must not change the outputs, and permuting only the experts must.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nac_gpu.network.comparing import outputs, relative_error
from nac_gpu.network.copying import rebuild
from nac_gpu.network.probes import SAME, lively, probed
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        name: of the module that contains the experts.
        count: number of experts.
        keys: names of the experts in that module; empty if experts are rows of the module's own tensors.
        parts: names of an expert's tensors, relative to the expert or, if experts are rows, to the module.
        router: names of the router's tensors, and the dimension that has an entry for each expert.
    """

    name: str
    count: int
    keys: tuple[str, ...]
    parts: tuple[str, ...]
    router: tuple[tuple[str, int], ...]

    def tensor(self, part: str, number: int = 0) -> str:
        """The full name of the tensor that contains a part of an expert."""
        return within(self.name, f"{self.keys[number]}.{part}" if self.keys else part)

    def expert(self, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """An expert's tensors by part."""
        found = {part: state[self.tensor(part, number)] for part in self.parts}
        return found if self.keys else {part: tensor[number] for part, tensor in found.items()}

    def written(self, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors, by full name, that contain these experts."""
        if self.keys:
            return {self.tensor(part, i): expert[part] for i, expert in enumerate(experts) for part in self.parts}
        return {self.tensor(part): torch.stack([expert[part] for expert in experts]) for part in self.parts}

    def names(self) -> list[str]:
        """The full names of all its tensors, with those of the router."""
        numbers = range(self.count) if self.keys else (0,)
        return [self.tensor(part, number) for number in numbers for part in self.parts] + [n for n, _ in self.router]

    def around(self) -> list[str]:
        """Names of all modules that contain the mixture or its router; the model itself is the empty string."""
        return _around([self.name, *(name.rpartition(".")[0] for name, _ in self.router)])


@dataclass(frozen=True)
class Lookalike:
    """A module with the shapes of a mixture of experts that is none: its name, its number of parts, and the reason."""

    name: str
    count: int
    why: str

    def around(self) -> list[str]:
        """Names of all modules that contain it."""
        return _around([self.name])


def _around(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(own[:length]) for own in parts for length in range(len(own) + 1)))


def within(module: str, name: str) -> str:
    """The full name of something named relative to a module."""
    return f"{module}.{name}" if module else name


def find_mixtures(model: nn.Module, example_inputs: ExampleInputs) -> tuple[list[Mixture], list[Lookalike]]:
    """The mixtures of experts of a model, and modules that only look like one.

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
    """The first difference between the tensors of modules; an empty string if there is none."""
    for key, form in zip(keys, forms, strict=True):
        for part in (*forms[0], *form):
            first, own = (tuple(f[part]) if part in f else "none" for f in (forms[0], form))
            if first != own:
                return f"its parts differ: {keys[0]}.{part} {first}, {key}.{part} {own}"
    return ""


def _rows(module: nn.Module) -> tuple[int, tuple[str, ...]]:
    """The number of experts stacked in a module's own tensors, and the names of these tensors; 0 if there are none.

    At least two of the tensors must contain a matrix for each expert.
    """
    own = dict(module.named_parameters(recurse=False))
    stacks = [name for name, tensor in own.items() if tensor.ndim >= 3]
    counts = {len(own[name]) for name in stacks}
    if len(stacks) < 2 or len(counts) != 1:
        return 0, ()
    count = counts.pop()
    return count, (*stacks, *(n for n, tensor in own.items() if tensor.ndim < 3 and tensor.shape[:1] == (count,)))


def _near(mixture: Mixture, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors outside the experts: in the module that contains them, then in its parent, and so on."""
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
    """The mixture with each candidate router, likeliest first: tensors of a module, with a matrix among them."""
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
    """Tensors near a mixture with one number for each expert, such as a bias that corrects the router's choice."""
    near = list(_near(mixture, state))[-1]
    return [
        (name, tensor.shape.index(mixture.count))
        for name, tensor in near.items()
        if tensor.numel() == mixture.count and tensor.is_floating_point() and mixture.count in tensor.shape
    ]


_OTHER = {torch.float32: 1e-3, torch.float64: 1e-6}
_SURELY_OTHER = 1e-2  # too large for rounding in float32


class _Trial:
    """Runs a model with permuted experts, in float64 if float32 is not conclusive.

    Constant tensors (biases of zero, inputs of zeros) are replaced by random ones, because they would hide errors.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._model, self._inputs = model, example_inputs
        self._dtype: torch.dtype | None = None

    def first_that_holds(
        self, ways: Sequence[Mixture], numbers: Sequence[tuple[str, int]]
    ) -> tuple[Mixture | None, str]:
        """The first candidate that is a mixture, or the reason why none is.

        Those `numbers` that have to be permuted with the experts are added to its router.
        """
        reasons: list[tuple[float, str]] = []
        for mixture in ways:
            error, why = self._failure(mixture)
            wider = [replace(mixture, router=(*mixture.router, n)) for n in numbers if n not in mixture.router]
            if why:  # a router's bias in another module may be missing
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
        """The change of the outputs under permutation, and the reason why this is no mixture (empty if it is one).

        With `number`, that tensor is given a different value for each expert first.
        """
        names = [name for name, _ in mixture.router]
        told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        error, why = math.inf, ""
        for dtype in (torch.float32, torch.float64):
            try:
                both, alone = self._changes(mixture, number, dtype)
            except torch.OutOfMemoryError:
                raise
            except Exception as raised:  # an operation or a model that does not support the dtype
                return error, why or f"in another order of its parts it does not run: {type(raised).__name__}: {raised}"
            if both <= SAME[dtype] and alone >= _OTHER[dtype]:
                return both, ""
            error, why = both, "its parts change nothing in the outputs of these example inputs"
            if not both <= SAME[dtype]:
                why = f"in another order its {mixture.count} parts and {told} give other outputs (by {both:.1e})"
            if both > _SURELY_OTHER:
                break
        return error, why

    def _changes(self, mixture: Mixture, number: tuple[str, int] | None, dtype: torch.dtype) -> tuple[float, float]:
        """Relative changes of the outputs if experts and router are permuted together, and if only the experts are."""
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
            outputs(rebuild(self._model, state | other, clone=True), self._typed_inputs)
            for other in ({}, moved | followed, moved)
        )
        return relative_error(both, expected), relative_error(alone, expected)

    def _convert(self, dtype: torch.dtype) -> None:
        """Convert tensors and inputs to another dtype; only one dtype is kept at a time."""
        if self._dtype != dtype:
            self._dtype = dtype
            self._state, self._typed_inputs = probed(self._model, self._inputs, dtype)

    @staticmethod
    def _generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)
