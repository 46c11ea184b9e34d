"""The copies test of some groups on example inputs: what is merged must give what the network of copies gives.

All neurons of a cluster are overwritten with copies of the first; merging copies must not change the outputs. If it
does, or if the smaller network does not run, the layers tell where: their outputs are compared one after another.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import Deviation, homes_of, merged
from nac_gpu.merging.copies import copy_neurons, random_assignments
from nac_gpu.network.ambient import cut_short
from nac_gpu.network.comparing import outputs, relative_error, tells
from nac_gpu.network.copying import Attributes, rebuild
from nac_gpu.network.costs import Cost, flop_counter
from nac_gpu.network.kept_numbers import reads_of
from nac_gpu.network.probes import Probe
from nac_gpu.network.reaching import tensors_in
from nac_gpu.tracing.graph import Choice

_FAR = 100  # how much farther from each other than outputs the results of layers may be


@dataclass(frozen=True)
class Measured:
    """Cost and shapes of a smaller network that passed.

    Attributes:
        cost: of the network.
        shapes: of its tensors, by name.
    """

    cost: Cost
    shapes: Mapping[str, torch.Size]


@dataclass(frozen=True)
class Failure:
    """Why a smaller network did not pass.

    Attributes:
        reason: shown to the user.
        raised: it did not run; otherwise its outputs differ.
        place: name of the layer where it was first seen, empty for the model itself; None if only the outputs tell.
        done: names of the layers that had run until then and agreed, in order.
    """

    reason: str
    raised: bool = False
    place: str | None = None
    done: tuple[str, ...] = ()

    def moved(self, then: "Measured | Failure") -> bool:
        """Whether another attempt got further than this one."""
        if isinstance(then, Measured):
            return True
        if len(then.done) != len(self.done):
            return len(then.done) > len(self.done)
        if then.place is None or self.place is None:
            return then.place is None and self.place is not None
        # With as many layers done, a module's own code has got less far than a module inside of it.
        return then.place != self.place and not _inside(self.place, then.place)


class _DivergedError(BaseException):  # which the model's code does not catch
    """A layer of the smaller network gives something else than in the network of copies; says by how much."""


class Bench:
    """The network of copies for some groups, with its outputs; parts of the groups are merged and compared.

    Args:
        probe: the model and its inputs.
        choices: the groups.
        deviation: as for `Merger`.
        auxiliary: also compare the outputs of auxiliary heads.
        seed: of the choice of copies.

    Raises:
        Exception: the network of copies does not run.
    """

    def __init__(
        self, probe: Probe, choices: Sequence[Choice], deviation: Deviation, *, auxiliary: bool, seed: int
    ) -> None:
        self._probe, self._auxiliary = probe, auxiliary
        self._deviation: Deviation = deviation
        self._labels = dict(zip((c.group.name for c in choices), random_assignments(choices, seed), strict=True))
        self._copies = dict(probe.state)
        for choice in choices:
            self._copies = copy_neurons(self._copies, choice.group, self._labels[choice.group.name])
        self._groups = {choice.group.name: choice.group for choice in choices}
        self._latest: tuple[frozenset[str], dict[str, Tensor]] = frozenset(), self._copies  # merged groups, and tensors
        self._expected = self._answers(self._network(self._copies))
        self._layers: list[tuple[str, list[Tensor]]] | None = None
        if not any(tells(value) for value in self._expected):
            self.watch()

    def watch(self) -> None:
        """From now on, compare what the layers give, too."""
        seen: list[tuple[str, list[Tensor]]] = []

        def keep(name: str, found: list[Tensor]) -> None:
            seen.append((name, [value.detach().clone() for value in found]))

        network = self._network(self._copies)
        with _Watch(network, keep, []):
            self._answers(network)
        self._layers = seen

    @property
    def watching(self) -> bool:
        """Whether layers are compared."""
        return self._layers is not None

    def attempt(self, choices: Sequence[Choice]) -> Measured | Failure:
        """Merge some of the groups all at once, and compare."""
        labels = [self._labels[choice.group.name] for choice in choices]
        counter, running, done = flop_counter(), [], []
        compared: set[str] = set()
        kept = _kept(self._copies, choices, labels)

        def compare(name: str, found: list[Tensor]) -> None:
            if self._layers is not None and len(done) < len(self._layers):
                known, expected = self._layers[len(done)]
                # neither counting FLOPs nor changing dtypes
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    error = _layer_error(found, expected, kept.get(name)) if known == name else float("inf")
                if error is not None and not error <= _FAR * self._probe.tolerance:
                    raise _DivergedError(f"{error:.1e}")
                if error is not None:
                    compared.add(name)
            done.append(name)

        try:
            state = self._merged(choices)
            small = self._smaller(state, choices)
            with cut_short(), _Watch(small, compare, running):
                found = self._answers(small, counter)
        except _DivergedError as error:
            where = running[-1] or "the model itself"
            return Failure(f"{_CHANGED} (relative error {error} in {where})", False, running[-1], tuple(done))
        except Exception as error:  # the user's code may raise anything at a width that it does not expect
            reason = f"the smaller network does not run: {type(error).__name__}: {error}"
            return Failure(reason, True, running[-1] if running else "", tuple(done))
        error = relative_error(found, self._expected)
        if not error <= self._probe.tolerance:
            return Failure(f"{_CHANGED} (relative error {error:.1e})", False, None, tuple(done))
        if not any(tells(value) for value in self._expected):
            unseen = [c for c in choices if not any(_module(m.tensor) in compared for m in _read(c))]
            if unseen:
                where = _module(_read(unseen[0])[0].tensor)
                return Failure("no output is a floating number that could be compared", False, where, tuple(done))
        cost = Cost(sum(parameter.numel() for parameter in small.parameters()), counter.get_total_flops())
        return Measured(cost, {name: tensor.shape for name, tensor in state.items()})

    def trains(self, choices: Sequence[Choice]) -> str | None:
        """The error that the smaller network raises in training mode, if the network of copies raises none."""
        state = self._merged(choices)
        why = self._probe.training_error(self._smaller(state, choices))
        if why is None or self._probe.training_error(self._network(self._copies)) is not None:
            return None
        return why

    def _merged(self, choices: Sequence[Choice]) -> dict[str, Tensor]:
        """Smaller tensors. Those that no other groups than before have a part in are taken from the attempt before."""
        before, state = self._latest
        now = {choice.group.name: choice for choice in choices}
        other = [group for name, group in self._groups.items() if (name in now) != (name in before)]
        touched = {member.tensor for group in other for member in group.members}
        near = [choice for choice in choices if any(member.tensor in touched for member in choice.group.members)]
        labels = [self._labels[choice.group.name] for choice in near]
        made = merged(self._copies, near, labels, self._deviation)
        state = {name: made[name] if name in touched else tensor for name, tensor in state.items()}
        self._latest = frozenset(now), state
        return state

    def reads(self) -> frozenset[tuple[str, str]]:
        """The (module, attribute) that the network of copies reads as it runs, in training mode, too."""
        network = self._network(self._copies)
        with reads_of(network) as found:
            self._answers(network)
            self._probe.training_error(network)
        return frozenset(found)

    def _smaller(self, state: Mapping[str, Tensor], choices: Sequence[Choice]) -> nn.Module:
        return self._network(state, attributes(self._probe.model, choices))

    def _network(self, state: Mapping[str, Tensor], values: Attributes | None = None) -> nn.Module:
        return rebuild(self._probe.model, state, values, clone=True)

    def _answers(self, network: nn.Module, counter: Any = None) -> list[Tensor]:
        """All outputs of a network; the counter counts the FLOPs of the eval mode only."""
        with self._probe.types():
            if counter is None:
                found = outputs(network, self._probe.inputs)
            else:
                with counter:
                    found = outputs(network, self._probe.inputs)
            if self._auxiliary:
                found += outputs(network, self._probe.inputs, auxiliary=True)
        return found


_CHANGED = "merging identical neurons changed the outputs"


def suspects(choices: Sequence[Choice], failure: Failure) -> list[Choice]:
    """The groups in the order in which they are suspected to have caused a failure.

    First those that the layer reads where it was seen, then those that it makes, then those of the layers before.
    """
    ago = {name: number for number, name in enumerate(dict.fromkeys(reversed(failure.done)))}

    def far(choice: Choice) -> tuple[int, int]:
        best = (3, len(ago))
        for member in choice.group.members:
            module = _module(member.tensor)
            if module == failure.place:
                best = min(best, (0 if member.role == "sum" else 1, 0))
            elif failure.place is not None and _inside(module, failure.place):
                best = min(best, (2, ago.get(module, len(ago))))
            else:
                best = min(best, (3, ago.get(module, len(ago))))
        return best

    return sorted(choices, key=far)


class _Watch:
    """A context that hands on what each layer of a network gives, and keeps the names of the running modules.

    Args:
        network: the network.
        take: is called with a layer's name and the tensors that it gives. Layers are modules that contain no others.
        running: names of the running modules, the innermost last.
    """

    def __init__(self, network: nn.Module, take: Callable[[str, list[Tensor]], None], running: list[str]) -> None:
        self._network, self._take, self._running = network, take, running
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._network.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            self._hooks.append(module.register_forward_pre_hook(self._enter(name)))
            leaf = not any(True for _ in module.children())
            self._hooks.append(module.register_forward_hook(self._leave(name, leaf)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str) -> Any:
        return lambda module, given: self._running.append(name)

    def _leave(self, name: str, leaf: bool) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if leaf:
                self._take(name, list(tensors_in(output)))
            self._running.pop()

        return hook


def _kept(state: Mapping[str, Tensor], choices: Sequence[Choice], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """By the name of a layer, which of the channels that it makes are kept, bool [channels]."""
    masks: dict[str, Tensor] = {}
    for choice, own in zip(choices, labels, strict=True):
        away = homes_of(own) != torch.arange(len(own))
        for member in choice.group.members:
            if member.role == "mean" and member.tensor.endswith("weight"):
                all_kept = torch.ones(state[member.tensor].shape[member.dim], dtype=torch.bool)
                masks.setdefault(_module(member.tensor), all_kept)[member.index[away].flatten()] = False
    return masks


def _layer_error(found: Sequence[Tensor], expected: Sequence[Tensor], kept: Tensor | None) -> float | None:
    """How far what a layer gives is from what it gives in the network of copies; None if that cannot be told."""
    if len(found) != len(expected):
        return float("inf")
    wanted = []
    for now, then in zip(found, expected, strict=True):
        if now.ndim != then.ndim:
            return None
        differ = [dim for dim in range(now.ndim) if now.shape[dim] != then.shape[dim]]
        sizes = [(len(kept), int(kept.sum()))] if kept is not None else []
        if differ and [(then.shape[dim], now.shape[dim]) for dim in differ] != sizes:
            return None
        if differ:
            assert kept is not None, "checked above"
            then = then.index_select(differ[0], kept.nonzero().flatten().to(then.device))
        wanted.append(then)
    if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return None
    if len(wanted) == 1 and wanted[0].is_floating_point() and wanted[0].numel():  # the usual case, in fewer passes
        apart, largest = (found[0] - wanted[0]).abs().max(), wanted[0].abs().max()
        error = float(apart / largest)
        if math.isfinite(error):
            return error
    return relative_error(found, wanted) if any(tells(value) for value in wanted) else None


def _inside(module: str, other: str) -> bool:
    return other == "" or module.startswith(f"{other}.")


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _read(choice: Choice) -> list[Any]:
    return [member for member in choice.group.members if member.role == "sum"]
