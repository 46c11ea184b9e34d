"""Atoms: the union-find, roles, slots; compact planes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nac_gpu.tracing.atoms import CHANNELS, MEAN, NONE, SUM, Atoms, compact, varying


@given(
    size=st.integers(1, 30),
    edges=st.lists(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=10), max_size=5),
)
def test_classes_are_connected_components(size: int, edges: list[list[tuple[int, int]]]) -> None:
    atoms = Atoms()
    atoms.of("w", 0, size)
    component = list(range(size))
    for batch in edges:
        pairs = [(a % size, b % size) for a, b in batch]
        if pairs:
            left, right = torch.tensor(pairs).T
            atoms.unite(left, right)
        for a, b in pairs:
            old, new = max(component[a], component[b]), min(component[a], component[b])
            component = [new if c == old else c for c in component]
    assert atoms.classes(CHANNELS).tolist() == component


def test_slots_are_numbered_on_first_use() -> None:
    atoms = Atoms()
    first, second = atoms.of("a", 0, 3), atoms.of("a", 1, 2)
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4]
    assert atoms.of("a", 0, 3).tolist() == [0, 1, 2]
    assert atoms.count == 5


def test_roles_add_up() -> None:
    atoms = Atoms()
    atoms.of("a", 0, 3)
    atoms.role(torch.tensor([0, 1]), MEAN)
    atoms.role(torch.tensor([1, 2]), SUM)
    assert atoms.roles().tolist() == [MEAN, MEAN | SUM, SUM]


def test_freezing_ignores_places_without_a_label() -> None:
    atoms = Atoms()
    atoms.of("a", 0, 3)
    atoms.freeze(torch.tensor([NONE, 2]), "why")
    assert [(found.atoms.tolist(), found.reason) for found in atoms.separations] == [([2], "why")]


@pytest.mark.parametrize(
    ("plane", "shape"),
    [
        (torch.arange(3).reshape(1, 3, 1).expand(2, 3, 4), (1, 3, 1)),
        (torch.arange(6).reshape(2, 3), (2, 3)),
        (torch.zeros(2, 2, dtype=torch.int64), (1, 1)),
    ],
)
def test_compact(plane: torch.Tensor, shape: tuple[int, ...]) -> None:
    small = compact(plane)
    assert small is not None
    assert small.shape == shape
    assert torch.equal(small.expand(plane.shape), plane)
    assert varying(small) == tuple(d for d, s in enumerate(shape) if s > 1)


def test_compact_of_nothing() -> None:
    assert compact(torch.full((2, 3), NONE)) is None
