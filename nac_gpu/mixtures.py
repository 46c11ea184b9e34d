"""Where a model's experts are: parts of equal form among which a router chooses for every input.

They are found by form, not by name: a list of modules with the same tensors, or a module whose own tensors have one
row for each expert; and beside them tensors, the router's, with an entry for each. Whether that is what it looks like
is tried: in another order, experts and router together must give the same outputs, and experts alone others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.forward import ExampleInputs
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.trial import converted, lively, outputs, relative_error


@dataclass(frozen=True)
class Mixture:
    """Experts of which a router chooses some for every input.

    Attributes:
        name: of the module that holds the experts, and nothing else if they are listed.
        block: name of the module that holds experts and router.
        count: how many experts there are.
        listed: they are modules in a list; else each is a row of common tensors.
        parts: names of an expert's tensors, within the expert if they are listed, else within the module.
        router: names of the tensors that have an entry for each expert, and the dimension.
    """

    name: str
    block: str
    count: int
    listed: bool
    parts: tuple[str, ...]
    router: tuple[tuple[str, int], ...]

    def tensor(self, part: str, number: int = 0) -> str:
        """The name of the tensor that holds a part of an expert."""
        return within(self.name, f"{number}.{part}" if self.listed else part)

    def expert(self, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """An expert's tensors by part."""
        found = {part: state[self.tensor(part, number)] for part in self.parts}
        return found if self.listed else {part: tensor[number] for part, tensor in found.items()}

    def written(self, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors by name that hold these experts."""
        if self.listed:
            return {self.tensor(part, i): expert[part] for i, expert in enumerate(experts) for part in self.parts}
        return {self.tensor(part): torch.stack([expert[part] for expert in experts]) for part in self.parts}

    def names(self) -> list[str]:
        """All of its tensors."""
        numbers = range(self.count) if self.listed else (0,)
        return [self.tensor(part, number) for number in numbers for part in self.parts] + [n for n, _ in self.router]


def within(module: str, name: str) -> str:
    """The full name of what has this name within a module."""
    return f"{module}.{name}" if module else name


def find_mixtures(model: nn.Module, example_inputs: ExampleInputs) -> tuple[list[Mixture], dict[str, str]]:
    """The mixtures of experts of a model; and, by the name of a module that only looked like one, why it is none.

    Args:
        model: not changed.
        example_inputs: what it is called with.
    """
    found, others = [], {}
    trial: _Trial | None = None
    for name, module in model.named_modules():
        ways = list(_ways(model, name, module))
        if not ways:
            continue
        trial = trial or _Trial(model, example_inputs)
        why = ""
        for mixture in ways:
            why = trial.failure(mixture)
            if not why:
                found.append(mixture)
                break
        else:
            others[name] = why
    return found, others


def _ways(model: nn.Module, name: str, module: nn.Module) -> Iterator[Mixture]:
    """What a module's experts and their router may be, the likeliest first."""
    state = tensors(model)
    listed = isinstance(module, nn.ModuleList)
    parts = _alike(module, name, state) if listed else _rows(module)
    if not parts:
        return
    count = len(module) if listed else len(module.get_parameter(parts[0]))
    inside = within(name, "")
    own = {other for other in state if other.startswith(inside)} if listed else {within(name, part) for part in parts}
    block = name
    for _ in range(3):
        if not listed or block != name:
            prefix = within(block, "")
            router = [
                (other, tensor.shape.index(count))
                for other, tensor in state.items()
                if other.startswith(prefix) and other not in own and count in tensor.shape and tensor.ndim <= 2
            ]
            by_module: dict[str, list[tuple[str, int]]] = {}
            for other, dim in router:
                by_module.setdefault(other.rpartition(".")[0], []).append((other, dim))
            for chosen in (*by_module.values(), *([router] if len(by_module) > 1 else [])):
                yield Mixture(name, block, count, listed, parts, tuple(chosen))
        if not block:
            return
        block = block.rpartition(".")[0]


def _alike(experts: nn.ModuleList, name: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tensors that all modules of a list have, in the same shapes; none if they differ, or share some."""
    forms = [{part: tensor.shape for part, tensor in tensors(expert).items()} for expert in experts]
    if len(forms) < 2 or not forms[0] or any(form != forms[0] for form in forms):
        return ()
    if any(within(name, f"{number}.{part}") not in state for number in range(len(forms)) for part in forms[0]):
        return ()
    return tuple(forms[0])


def _rows(module: nn.Module) -> tuple[str, ...]:
    """A module's own tensors that have a row for each expert: several matrices each, and what else has as many rows."""
    own = dict(module.named_parameters(recurse=False))
    counts = {len(tensor) for tensor in own.values() if tensor.ndim >= 3}
    stacks = [name for name, tensor in own.items() if tensor.ndim >= 3]
    if len(stacks) < 2 or len(counts) != 1 or counts == {1}:
        return ()
    count = counts.pop()
    return (*stacks, *(name for name, tensor in own.items() if tensor.ndim < 3 and tensor.shape[:1] == (count,)))


_SAME = {torch.float32: 1e-5, torch.float64: 1e-8}  # relative
_OTHER = {torch.float32: 1e-3, torch.float64: 1e-6}


class _Trial:
    """Runs a model with its experts in another order, in float64 where float32 does not tell."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._model, self._inputs = model, example_inputs
        self._runs: dict[torch.dtype, tuple[nn.Module, ExampleInputs, list[Tensor]]] = {}

    def failure(self, mixture: Mixture) -> str:
        """Why this is no mixture of experts; nothing if it is one."""
        why = ""
        for dtype in (torch.float32, torch.float64):
            try:
                both, alone = self._change(mixture, dtype, True), self._change(mixture, dtype, False)
            except Exception as error:  # an operation that this type has not, or a model that does not take it
                why = why or f"it does not run in another order of its parts: {type(error).__name__}: {error}"
                continue
            if both <= _SAME[dtype] and alone >= _OTHER[dtype]:
                return ""
            why = (
                f"in another order its {mixture.count} parts and {', '.join(name for name, _ in mixture.router)} give "
                f"other outputs (relative change {both:.1e})"
                if both > _SAME[dtype]
                else "its parts change nothing in the outputs of these example inputs"
            )
        return why

    def _change(self, mixture: Mixture, dtype: torch.dtype, router: bool) -> float:
        """The relative change of the outputs where the experts have changed places, and the router's entries too."""
        model, inputs, expected = self._run(dtype)
        state = tensors(model)
        order = [*range(1, mixture.count), 0]
        state |= mixture.written([mixture.expert(state, number) for number in order])
        if router:
            for name, dim in mixture.router:
                state[name] = state[name].index_select(dim, torch.tensor(order, device=state[name].device))
        return relative_error(outputs(rebuild(model, state, share=True), inputs), expected)

    def _run(self, dtype: torch.dtype) -> tuple[nn.Module, ExampleInputs, list[Tensor]]:
        if dtype not in self._runs:
            model, inputs = self._model, self._inputs
            if any(parameter.dtype != dtype for parameter in model.parameters()):
                model, inputs = converted(model, inputs, dtype)
            generator = torch.Generator().manual_seed(0)
            inputs = pytree.tree_map(lambda value: lively(value, generator), inputs)
            self._runs[dtype] = model, inputs, outputs(model, inputs)
        return self._runs[dtype]
