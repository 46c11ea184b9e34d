"""Index of the weights that make channels, and of the BatchNorm directly after each; built once for all groups."""

from collections.abc import Iterable

import torch

from nac_gpu.tracing.atoms import Slot
from nac_gpu.tracing.recorder import Normalisation, Notes


class Makers:
    """The weights, biases and BatchNorms of all productions of a recorded pass.

    Attributes:
        slots: for each production, the slot of its weight whose atoms name the channels.
        biases: for each production, the name of the bias added in the same operation, or None.
        behind: for each production, the number of the BatchNorm directly after it, if nothing else reads its output;
            else None.
        norms: the normalisations.
    """

    def __init__(self, notes: Notes) -> None:
        def slot(atoms: torch.Tensor) -> Slot:
            return notes.atoms.slot_at(int(atoms[0]))

        self.slots = [slot(production.atoms) for production in notes.productions]
        self.biases = [None if p.bias is None else slot(p.bias).tensor for p in notes.productions]
        self.norms: list[Normalisation] = notes.normalisations
        self._uses: dict[tuple[str, int], list[int]] = {}  # numbers of productions, by weight and dimension
        for number, made in enumerate(self.slots):
            self._uses.setdefault((made.tensor, made.dim), []).append(number)
        of_source: dict[int | None, list[int]] = {}
        same: dict[tuple[str | None, ...], list[int]] = {}  # numbers of normalisations, by the names of their tensors
        for number, norm in enumerate(self.norms):
            of_source.setdefault(norm.source, []).append(number)
            same.setdefault(norm.tensors, []).append(number)
        # Numbers of normalisations by the name of a tensor; of several with all tensors in common, only the first.
        self._with: dict[str, list[int]] = {}
        for tensors, numbers in same.items():
            for name in tensors:
                if name is not None:
                    self._with.setdefault(name, []).append(numbers[0])
        self.behind: list[int | None] = []
        for number, (made, production) in enumerate(zip(self.slots, notes.productions, strict=True)):
            found = of_source.get(number, [])
            once = len(self._uses[made.tensor, made.dim]) == len(found) == notes.uses.get(number, 0) == 1
            norm = self.norms[found[0]] if once else None
            own = norm is not None and len(same[norm.tensors]) == 1 and torch.equal(norm.channels, production.atoms)
            self.behind.append(found[0] if own else None)

    def norms_with(self, names: Iterable[str]) -> list[int]:
        """Numbers of the normalisations that use one of these tensors; of several with the same tensors, the first."""
        return sorted({number for name in names for number in self._with.get(name, ())})

    def first_uses(self, makers: Iterable[tuple[str, int]]) -> list[int]:
        """Numbers of the productions in which these dimensions of weights first make channels, ascending."""
        return sorted(self._uses[maker][0] for maker in makers if maker in self._uses)
