"""Centroids, summed connections, BatchNorm: against the equations written out."""

import pytest
import torch
from networks import network, randomised
from torch import Tensor, nn

from nac_gpu.calibration.neurons import neuron_vectors
from nac_gpu.merging.centroids import Deviation, Merger
from nac_gpu.network.comparing import outputs
from nac_gpu.network.copying import rebuild
from nac_gpu.network.state import tensors
from nac_gpu.tracing.graph import Group
from nac_gpu.tracing.trace import record


def two_layers() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return randomised(model), torch.randn(4, 5, dtype=torch.float64)


def merged(
    model: nn.Module, inputs: Tensor, labels: Tensor, deviation: Deviation = "centroid"
) -> tuple[nn.Module, Group]:
    group = record(model, inputs).groups[0]
    merger = Merger(tensors(model), deviation)
    merger.merge(group, labels)
    return rebuild(model, merger.finish()), group


def test_producers_keep_the_mean_and_consumers_the_sum() -> None:
    model, inputs = two_layers()
    small, _ = merged(model, inputs, torch.tensor([0, 1, 0, 2, 1, 0]))
    clusters = [[0, 2, 5], [1, 4], [3]]
    w, b, v = model[0].weight, model[0].bias, model[2].weight
    assert torch.allclose(small[0].weight, torch.stack([w[c].mean(0) for c in clusters]), rtol=1e-14)
    assert torch.allclose(small[0].bias, torch.stack([b[c].mean() for c in clusters]), rtol=1e-14)
    assert torch.allclose(small[2].weight, torch.stack([v[:, c].sum(1) for c in clusters], 1), rtol=1e-14)
    assert torch.equal(small[2].bias, model[2].bias)


def test_a_centroid_can_be_weighted_and_the_sum_stays_plain() -> None:
    model, inputs = two_layers()
    group = record(model, inputs).groups[0]
    labels, masses = torch.tensor([0, 1, 0, -1, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 9.0, 2.0, 4.0])
    merger = Merger(tensors(model))
    merger.merge_made(group, labels, masses)
    merger.merge_read(group, labels)
    small = rebuild(model, merger.finish())
    w, v = model[0].weight, model[2].weight
    expected = torch.stack([(w[0] + 3 * w[2] + 4 * w[5]) / 8, (w[1] + w[4]) / 2])
    assert torch.allclose(small[0].weight, expected, rtol=1e-14)
    assert torch.allclose(small[2].weight, torch.stack([v[:, [0, 2, 5]].sum(1), v[:, [1, 4]].sum(1)], 1), rtol=1e-14)


@pytest.mark.parametrize("deviation", ["restored", "centroid"])
def test_clusters_of_one_are_bitwise_unchanged(deviation: Deviation) -> None:
    model, inputs = network("vgg16")
    labels = torch.tensor([0, 1, 0, 2, 3, 4, 5, 6])
    small, group = merged(model, inputs, labels, deviation)
    alone = torch.tensor([3, 4, 5, 6, 7])
    for member in group.members:
        before = model.state_dict()[member.tensor].index_select(member.dim, alone)
        after = small.state_dict()[member.tensor].index_select(member.dim, labels[alone])
        assert torch.equal(before, after)


def test_a_label_of_minus_one_removes_a_neuron_and_its_connections() -> None:
    model, inputs = two_layers()
    small, _ = merged(model, inputs, torch.tensor([-1, 0, -1, 1, 2, 3]))
    kept = [1, 3, 4, 5]
    assert torch.equal(small[0].weight, model[0].weight[kept])
    assert torch.equal(small[2].weight, model[2].weight[:, kept])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_layer_with_batchnorm_computes_the_centroid_of_the_folded_neurons(affine: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6, affine=affine), nn.Linear(6, 6)).double()
    if affine:
        randomised(model)
    else:
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    model.eval()
    inputs = torch.randn(7, 5, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2, 1, 0])
    small, _ = merged(model, inputs, labels)
    before, after = model[:2](inputs), small[:2](inputs)
    for cluster in range(3):
        assert torch.allclose(after[:, cluster], before[:, labels == cluster].mean(1), rtol=1e-10, atol=1e-12)


def test_statistics_after_merging_are_those_of_the_merged_channel() -> None:
    """White inputs: covariances of the channels are the weights' inner products, and the estimate is exact."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    randomised(model)
    model[1].running_mean.copy_(model[0].bias)
    model[1].running_var.copy_(model[0].weight.square().sum(1))
    inputs = torch.randn(200_000, 5, dtype=torch.float64, generator=generator)
    small, _ = merged(model.eval(), inputs[:2], torch.tensor([0, 0, 1, 2, 1, 0]))
    with torch.no_grad():
        channels = small[0](inputs)
    assert torch.allclose(small[1].running_mean, channels.mean(0), atol=0.02)
    assert torch.allclose(small[1].running_var, channels.var(0), rtol=0.02)


@pytest.mark.parametrize("affine", [True, False])
def test_restored_channels_deviate_as_their_members_did(affine: bool) -> None:
    """White inputs again: after BatchNorm, a channel's deviation is its gain, and the mean its bias."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=affine), nn.Linear(6, 2)).double()
    if affine:
        randomised(model)
    model[1].running_mean.copy_(model[0].bias.detach())
    model[1].running_var.copy_(model[0].weight.detach().square().sum(1))
    inputs = torch.randn(200_000, 5, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 0, 1, 2, 1, 0])
    small, _ = merged(model.eval(), inputs[:2], labels, "restored")
    with torch.no_grad():
        before, after = model[:2](inputs), small[:2](inputs)
    for cluster in range(3):
        members = before[:, labels == cluster]
        assert after[:, cluster].std() == pytest.approx(float(members.std(0).mean()), rel=0.01)
        assert after[:, cluster].mean() == pytest.approx(float(members.mean()), abs=0.01)


def test_a_channel_that_batchnorm_switches_off_stays_off() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()).eval()
    with torch.no_grad():
        model[1].weight[:3] = 0
    inputs = torch.randn(3, 5, dtype=torch.float64)
    small, _ = merged(model, inputs, torch.tensor([0, 0, 1, 2]))
    before, after = model[:2](inputs), small[:2](inputs)
    assert torch.allclose(after[:, 0], before[:, :2].mean(1))
    assert torch.allclose(after[:, 1:], before[:, 2:])


def test_layers_see_the_merged_inputs_of_the_layer_before() -> None:
    model, inputs = network("dbn")
    first, second, _ = record(model, inputs).groups
    merger = Merger(tensors(model))
    labels = torch.arange(500) // 5
    merger.merge(first, labels)
    points = neuron_vectors(merger.state, second)
    columns = torch.stack([model[3].weight[:, labels == c].sum(1) for c in range(100)], 1)
    assert torch.allclose(points[:, 0:500:5], columns, atol=1e-6)
    assert torch.equal(points[:, -1], model[3].bias)
    distances = torch.cdist(points, points)
    expected = torch.cdist(*[torch.cat([columns, model[3].bias[:, None]], 1)] * 2)
    assert torch.allclose(distances, expected, atol=1e-3)


def test_neuron_vectors_fold_batchnorm_in() -> None:
    model, inputs = network("vgg19")
    group = record(model, inputs).groups[0]
    conv, norm = model.features[0], model.features[1]
    slope = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = neuron_vectors(tensors(model), group)
    assert torch.allclose(folded[:, :-1], slope[:, None] * conv.weight.flatten(1), rtol=1e-5, atol=1e-7)
    assert torch.allclose(folded[:, -1], norm.bias - slope * norm.running_mean, rtol=1e-5, atol=1e-6)
    bare = neuron_vectors(tensors(model), group, fold=False)
    assert torch.equal(bare, conv.weight.flatten(1))


def test_half_precision_is_summed_in_float32() -> None:
    model, inputs = two_layers()
    model, inputs = model.to(torch.bfloat16), inputs.to(torch.bfloat16)
    small, _ = merged(model, inputs, torch.zeros(6, dtype=torch.int64))
    expected = model[2].weight.float().sum(1, keepdim=True).to(torch.bfloat16)
    assert torch.equal(small[2].weight, expected)
    assert small[0].weight.dtype == torch.bfloat16
    assert outputs(small, inputs)[0].dtype == torch.bfloat16
