"""Which weights make channels, and which BatchNorm stands right behind each: looked up once for all groups."""

from collections.abc import Iterable

import torch

from nac_gpu.tracing.atoms import Slot
from nac_gpu.tracing.recorder import Normalisation, Notes


class Makers:
    """What the record's productions and normalisations say of the tensors.

    Attributes:
        slots: by the number of a production, where its weight names the channels.
        biases: by the number of a production, the name of the bias added in the same operation, or None.
        behind: by the number of a production, that of the one BatchNorm that takes its bare result and nothing else
            does, or None.
        norms: the normalisations.
    """

    def __init__(self, notes: Notes) -> None:
        def slot(atoms: torch.Tensor) -> Slot:
            return notes.atoms.slot_at(int(atoms[0]))

        self.slots = [slot(production.atoms) for production in notes.productions]
        self.biases = [None if p.bias is None else slot(p.bias).tensor for p in notes.productions]
        self.norms: list[Normalisation] = notes.normalisations
        self._uses: dict[tuple[str, int], list[int]] = {}  # productions by weight and dimension
        for number, made in enumerate(self.slots):
            self._uses.setdefault((made.tensor, made.dim), []).append(number)
        of_source: dict[int | None, list[int]] = {}
        same: dict[tuple[str | None, ...], list[int]] = {}  # normalisations by their tensors
        for number, norm in enumerate(self.norms):
            of_source.setdefault(norm.source, []).append(number)
            same.setdefault(norm.tensors, []).append(number)
        self._with: dict[str, list[int]] = {}  # by the name of a tensor, the first normalisation with the same tensors
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
        """Numbers of the normalisations that have one of these tensors; of those with the same tensors, the first."""
        return sorted({number for name in names for number in self._with.get(name, ())})

    def first_uses(self, makers: Iterable[tuple[str, int]]) -> list[int]:
        """Numbers of the productions in which these dimensions of weights first make channels, ascending."""
        return sorted(self._uses[maker][0] for maker in makers if maker in self._uses)
