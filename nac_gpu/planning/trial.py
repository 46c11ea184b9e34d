"""The trial: before a plan is returned, the copies test checks on the example inputs that each group can be merged.

Some neurons of every group are overwritten with copies of others. Merging copies must not change the outputs. If it
does, or if the smaller network does not run (because a size is hard-coded in the model), the group is left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nac_gpu.merging.attributes import attributes, guesses
from nac_gpu.merging.copies import copy_neurons, merged_copies, random_assignments
from nac_gpu.network.comparing import outputs, relative_error
from nac_gpu.network.copying import rebuild
from nac_gpu.network.costs import Cost, flop_counter
from nac_gpu.network.probes import SAME, probed
from nac_gpu.network.running import ExampleInputs
from nac_gpu.tracing.graph import Choice, Group, LeftAlone

_WIDEST = 1e-4  # relative error that float32 may make where an operation has no float64


@dataclass(frozen=True)
class Measured:
    """Cost and shapes of a smaller network that passed the trial.

    Attributes:
        cost: of the network.
        shapes: of its tensors, by name.
    """

    cost: Cost
    shapes: Mapping[str, torch.Size]


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        choices: the groups that can be merged, all together, with the attributes that have to follow them. Units
            (heads, groups) that cannot be merged are replaced by their channels.
        measured: the network of these choices; None if no group can be merged.
        refused: groups that cannot be merged, and why.
    """

    choices: tuple[Choice, ...]
    measured: Measured | None
    refused: tuple[LeftAlone, ...] = ()


class Trial:
    """Tests groups on the example inputs, and caches the results.

    Args:
        model: not changed.
        example_inputs: as for `record`. Constant inputs and parameters are replaced by random ones, because they would
            hide errors.
        auxiliary: also compare the outputs of auxiliary heads.
        seed: of the choice of copies.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False, seed: int = 0
    ) -> None:
        self._outcomes: dict[tuple[Any, ...], Outcome] = {}
        self._passed: dict[tuple[Any, ...], Measured] = {}
        self._model, self._inputs, self._seed = model, example_inputs, seed
        self._auxiliary = auxiliary
        self._modules = dict(model.named_modules())
        double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
        # float64 if float32 is not conclusive, and float32 again if an operation does not support float64.
        self._next = [] if double else [torch.float64, torch.float32]
        self._set_dtype(torch.float64 if double else torch.float32)

    def run(self, choices: Sequence[Choice]) -> Outcome:
        """Find out which of these groups can be merged to these widths.

        All groups are tried at once; if that fails, in parts. Finally all groups that passed are tried together, and
        the cost of that network is measured.
        """
        asked = tuple((choice.group.name, choice.group.size, choice.width) for choice in choices)
        if asked not in self._outcomes:
            self._outcomes[asked] = self._outcome(choices)
        return self._outcomes[asked]

    def _outcome(self, choices: Sequence[Choice]) -> Outcome:
        likely = [choice if choice.group.attributes else self._guessed(choice, 0) for choice in choices]
        place = {
            group.name: at for at, choice in enumerate(choices) for group in (*choice.group.otherwise, choice.group)
        }
        refused: list[LeftAlone] = []
        good = sorted(self._good(likely, refused), key=lambda choice: place[choice.group.name])
        if not good:
            return Outcome((), None, tuple(refused))
        together = self._tried(good)
        if isinstance(together, str):
            why = f"together with the other groups: {together}"
            refused += [LeftAlone(choice.group.name, choice.group.size, why) for choice in good]
            return Outcome((), None, tuple(refused))
        return Outcome(tuple(good), together, tuple(refused))

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._passed.clear()  # the test is stricter in float64
        self._state, self._lively_inputs = probed(self._model, self._inputs, dtype, self._seed)

    def _tried(self, choices: Sequence[Choice]) -> Measured | str:
        """Merge these groups all at once: the measured network, or the reason why that fails."""
        asked = tuple((c.group.name, c.group.size, c.group.attributes, c.width) for c in choices)
        if asked in self._passed:
            return self._passed[asked]
        found = self._compared(choices)
        if isinstance(found, Measured):
            self._passed[asked] = found
        return found

    def _compared(self, choices: Sequence[Choice]) -> Measured | str:
        """As `_tried`, without the cache.

        float32 comes first, because it takes half the time. If the difference could be more than rounding, this trial
        and all later ones use float64.
        """
        labels = random_assignments(choices, self._seed)
        try:
            expected = self._answers(self._with_copies(choices, labels))
        except Exception:  # an operation that does not support this dtype
            if not self._next:
                raise
            return self._again(choices)
        counter = flop_counter()
        try:
            # The first neuron of each cluster is unchanged in the network of copies, so the original state can be used.
            merged = merged_copies(self._state, [choice.group for choice in choices], labels)
            small = rebuild(self._model, merged, attributes(self._model, choices), share=True)
            found = self._answers(small, counter)
        except Exception as error:  # the user's code may raise anything at a width that it does not expect
            return f"the smaller network does not run: {type(error).__name__}: {error}"
        error = relative_error(found, expected)
        if self._dtype == torch.float32 and self._next and not error <= SAME[self._dtype]:
            return self._again(choices)
        if not error <= (_WIDEST if self._dtype == torch.float32 else SAME[self._dtype]):
            return f"merging identical neurons changed the outputs (relative error {error:.1e})"
        cost = Cost(sum(parameter.numel() for parameter in small.parameters()), counter.get_total_flops())
        return Measured(cost, {name: tensor.shape for name, tensor in merged.items()})

    def _with_copies(self, choices: Sequence[Choice], labels: Sequence[torch.Tensor]) -> nn.Module:
        """The network in which all neurons of a cluster are copies of the first."""
        state = self._state
        for choice, own in zip(choices, labels, strict=True):
            state = copy_neurons(state, choice.group, own)
        return rebuild(self._model, state, share=True)

    def _answers(self, network: nn.Module, counter: Any = None) -> list[torch.Tensor]:
        """All outputs of a network; the counter counts the FLOPs of the eval mode only."""
        if counter is None:
            found = outputs(network, self._lively_inputs)
        else:
            with counter:
                found = outputs(network, self._lively_inputs)
        if self._auxiliary:
            found += outputs(network, self._lively_inputs, auxiliary=True)
        return found

    def _again(self, choices: Sequence[Choice]) -> Measured | str:
        """Repeat the comparison in the next dtype, which all later trials use, too."""
        self._set_dtype(self._next.pop(0))
        return self._compared(choices)

    def _good(self, choices: Sequence[Choice], refused: list[LeftAlone]) -> list[Choice]:
        """The choices that can be merged, found by bisection; the others are added to `refused`."""
        if not choices:
            return []
        found = self._tried(choices)
        if isinstance(found, Measured):
            return list(choices)
        kinds: dict[str, list[Choice]] = {}
        for choice in choices:
            kinds.setdefault(self._kind(choice.group), []).append(choice)
        if len(kinds) > 1:
            return [choice for alike in kinds.values() for choice in self._good(alike, refused)]
        if choices[0].group.units or len(choices) == 1:
            return self._good_alike(choices, found, refused)
        half = len(choices) // 2
        return self._good(choices[:half], refused) + self._good(choices[half:], refused)

    def _kind(self, group: Group) -> str:
        """A key for groups that are expected to pass or fail together: units in modules of one class, or channels."""
        return " ".join(sorted({type(self._modules.get(name, self._model)).__qualname__ for name in group.units}))

    def _good_alike(self, choices: Sequence[Choice], why: str, refused: list[LeftAlone]) -> list[Choice]:
        """Units of one kind: the attributes that work for the first are tried for all."""
        first = choices[0]
        if len(choices) > 1:
            found = self._tried([first])
            why = found if isinstance(found, str) else ""
        ways = list(guesses(self._modules, first.group))[1:] if why else []
        for number, attributes_too in enumerate(ways, 1):
            other = replace(first, group=replace(first.group, attributes=attributes_too))
            if isinstance(self._tried([other]), Measured):
                same = [self._guessed(choice, number) for choice in choices]
                all_pass = len(same) == 1 or isinstance(self._tried(same), Measured)
                return same if all_pass else self._one_by_one(same, refused)
        if not why:
            return self._one_by_one(choices, refused)
        rest = [
            Choice(other, max(1, round(choice.width / choice.group.size * other.size)))
            for choice in choices
            for other in choice.group.otherwise
        ]
        good = self._good(rest, refused)
        kept = {choice.group.name for choice in good}
        for group in (choice.group for choice in choices):
            if not any(other.name in kept for other in group.otherwise):
                refused.append(LeftAlone(group.name, group.size, why))
        return good

    def _guessed(self, choice: Choice, number: int) -> Choice:
        """The choice with the attributes of a guess, by number; the last guess if there are fewer."""
        found = list(guesses(self._modules, choice.group))
        return replace(choice, group=replace(choice.group, attributes=found[min(number, len(found) - 1)]))

    def _one_by_one(self, choices: Sequence[Choice], refused: list[LeftAlone]) -> list[Choice]:
        return [good for choice in choices for good in self._good([choice], refused)]
