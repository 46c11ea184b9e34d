"""Wrappers and computed weights are taken off, the original keeps them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import nac_gpu as nac
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.unwrapping import computed, unwrapped

INPUTS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(layer)


def spectral_norm(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer)


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "old_spectral_norm": torch.nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("way", WAYS)
def test_computed_weights_become_plain_ones(way: str) -> None:
    model = layers()
    WAYS[way](model[2])  # type: ignore[operator]
    model.eval()
    before, expected = bits(model), model(INPUTS).detach()
    plain, said = computed(model)
    assert [name for name, _ in plain.named_parameters()] != [name for name, _ in model.named_parameters()]
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in layers().named_parameters()}
    assert not any("weight_" in name for name in plain.state_dict())
    assert relative_error([plain(INPUTS).detach()], [expected]) < 1e-6
    assert len(said) == 1
    assert said[0].startswith("2.weight: its ")
    after = bits(model)
    assert list(before) == list(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert relative_error([model(INPUTS).detach()], [expected]) == 0
    small = nac.compress(model, INPUTS, width=0.5)
    assert isinstance(small[2], nn.Linear)  # type: ignore[index]
    assert type(small[2]) is nn.Linear  # type: ignore[index]
    assert small[2].weight.shape == (4, 5)  # type: ignore[index]
    assert said[0] in str(nac.plan(model, INPUTS, width=0.5))


def test_two_parametrisations_of_one_layer_and_frozen_weights() -> None:
    model = layers()
    model[0].requires_grad_(False)
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[0], "bias", dim=0)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    plain, said = computed(model)
    assert len(said) == 2
    assert not plain[0].weight.requires_grad  # type: ignore[index, union-attr]
    assert plain[2].weight.requires_grad  # type: ignore[index, union-attr]


def test_plain_networks_are_not_copied() -> None:
    model = layers()
    assert computed(model) == (model, ())
    assert unwrapped(model) == (model, ())


def test_data_parallel_and_compiled_modules() -> None:
    model = layers()
    for wrapped, kind in ((nn.DataParallel(model), "DataParallel"), (torch.compile(model), "OptimizedModule")):
        inner, said = unwrapped(wrapped)  # type: ignore[arg-type]
        assert inner is model
        assert said == (f"{kind} was taken off; wrap the smaller network again",)
        small = nac.compress(wrapped, INPUTS, width=0.5)  # type: ignore[arg-type]
        assert type(small) is nn.Sequential
        with torch.no_grad():
            assert relative_error([copy.deepcopy(small)(INPUTS)], [small(INPUTS)]) == 0


def test_distributed_data_parallel(tmp_path: object) -> None:
    store = torch.distributed.FileStore(f"{tmp_path}/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(layers())
        assert type(nac.compress(wrapped, INPUTS, width=0.5)) is nn.Sequential
    finally:
        torch.distributed.destroy_process_group()
