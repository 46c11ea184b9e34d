"""Merging identical neurons changes nothing: the test that every architecture has to pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import LARGE, NETWORKS, network

from nac_gpu import compress
from nac_gpu.merging.centroids import Deviation, Merger
from nac_gpu.merging.copies import copy_neurons, random_labels
from nac_gpu.network.comparing import outputs, relative_error
from nac_gpu.network.copying import converted, rebuild
from nac_gpu.network.state import tensors
from nac_gpu.tracing.trace import record


def check(name: str, seed: int, share: float, deviation: Deviation = "restored") -> None:
    """Copies of random neurons, in every group at once, merge with no change; making the copies changed much."""
    model, inputs = converted(*network(name), torch.float64)
    groups = record(model, inputs).groups
    assert groups
    generator = torch.Generator().manual_seed(seed)
    labels = [random_labels(g.size, max(1, min(g.size - 1, round(share * g.size))), generator) for g in groups]
    copies = tensors(model)
    for group, chosen in zip(groups, labels, strict=True):
        copies = copy_neurons(copies, group, chosen)
    merger = Merger(copies, deviation)
    for group, chosen in zip(groups, labels, strict=True):
        merger.merge(group, chosen)
    expected = outputs(rebuild(model, copies), inputs)
    small = rebuild(model, merger.finish())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert relative_error(outputs(small, inputs), expected) < 1e-8
    assert relative_error(outputs(model, inputs), expected) > 1e-3


@pytest.mark.parametrize("name", [*NETWORKS, *LARGE])
def test_copies_merge_with_no_change(name: str) -> None:
    check(name, seed=0, share=0.5)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(list(NETWORKS)),
    seed=st.integers(0, 2**31),
    share=st.floats(0.01, 0.95),
    deviation=st.sampled_from(["restored", "centroid"]),
)
def test_random_choices_of_copies(name: str, seed: int, share: float, deviation: Deviation) -> None:
    check(name, seed, share, deviation)


@pytest.mark.parametrize("name", ["vgg16", "conv3d"])
@pytest.mark.parametrize("method", ["ward", "kmeans"])
def test_clustering_finds_the_copies(name: str, method: str, device: torch.device) -> None:
    """The whole way: copies are put in, `compress` to the number of different neurons finds them."""
    model, inputs = converted(*network(name), torch.float64)
    groups = record(model, inputs).groups
    generator = torch.Generator().manual_seed(3)
    widths = {g.name: max(1, g.size // 2) for g in groups}
    copies = tensors(model)
    for group in groups:
        copies = copy_neurons(copies, group, random_labels(group.size, widths[group.name], generator))
    copied = rebuild(model, copies).to(device)
    noise = torch.randn(64, *inputs.shape[1:], generator=generator, dtype=torch.float64)
    calibration = [noise.to(device)] if name == "vgg16" else "dream"  # which takes a minute for a VGG
    small = compress(copied, inputs.to(device), width=widths, method=method, calibration=calibration)
    assert relative_error(outputs(small, inputs.to(device)), outputs(copied, inputs.to(device))) < 1e-8


@pytest.mark.usefixtures("short_dreams")
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_width_is_the_same_network(name: str) -> None:
    model, inputs = network(name)
    same = compress(model, inputs, width=1.0)
    for (key, a), (other, b) in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b)
