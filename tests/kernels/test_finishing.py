import pytest
import torch

from nac_gpu.kernels import Batch, Clusters, finish, squared_distances_batch
from nac_gpu.kernels.finishing import finish_torch

SIZES = (2, 7, 1, 30)


def problems(place, seed=0):
    """Points on a line of several problems: their costs, their clusters without neighbours, and where they lie."""
    batch = Batch.of([(n, 1) for n in SIZES], place)
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64).to(place)
    clusters = Clusters.of_points(torch.ones_like(points))
    return squared_distances_batch(points, clusters.masses, batch), clusters, batch


@pytest.mark.parametrize("made_at", [0.0, 0.3], ids=["points", "clusters"])
def test_equals_its_twin(made_at, place):
    """Also where clusters come from elsewhere, with what they were made at and rounds before."""
    costs, clusters, batch = problems(place)
    other_costs, other, _ = problems(place)
    for state in (clusters, other):
        state.made_at += made_at * torch.arange(len(state.made_at), device=place) % 1.0
        state.rounds = 5
    finish(costs, clusters, batch)
    finish_torch(other_costs, other, batch)
    made = torch.ones(len(clusters.point), dtype=torch.bool, device=place)
    made[torch.tensor(SIZES, device=place).cumsum(0) - 1] = False  # the last point of a problem is never merged away
    for found, expected in zip(clusters.merges, other.merges, strict=True):
        torch.testing.assert_close(found[made], expected[made], rtol=1e-12, atol=0)
    assert (clusters.merges.round[made] >= 5).all()


@pytest.mark.parametrize("implementation", [finish, finish_torch], ids=["chosen", "twin"])
@pytest.mark.parametrize("made_at", [(5.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 70.0), (1.0, 1.0, 1.0)], ids=str)
def test_no_merge_is_lower_than_those_before_it(made_at, implementation, place):
    """0, 2 and 6 on a line: 0 and 2 merge at 2, and with 6 at 50 / 3, unless their parts were made higher up."""
    points = torch.tensor([0.0, 2, 6], dtype=torch.float64, device=place)
    clusters = Clusters.of_points(torch.ones_like(points))
    clusters.made_at[:] = torch.tensor(made_at, device=place)
    batch = Batch.of([(3, 1)], place)
    implementation(squared_distances_batch(points, clusters.masses, batch), clusters, batch)
    first = max(2.0, *made_at[:2])
    assert clusters.merges.partner[:2].tolist() == [1, 2]
    assert clusters.merges.cost[:2].tolist() == pytest.approx([first, max(50 / 3, first, made_at[2])])
