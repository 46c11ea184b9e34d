"""Dreamed inputs have the statistics that BatchNorm keeps; drawn ones are sums of the first weights, or noise."""

import pytest
import torch
from networks import network
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration.dream import dream, why_not


def trained() -> nn.Sequential:
    """A network whose BatchNorm has seen inputs that are not noise."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5))
    ramp = torch.linspace(-1, 1, 12)
    for _ in range(200):
        slopes, levels = torch.randn(2, 32, 3, 1, 1)
        model(slopes * ramp + levels * ramp[:, None] + 0.3)
    return model.eval()


def off(model: nn.Module, inputs: Tensor) -> float:
    """How far the statistics of all channels are from those remembered."""
    errors: list[float] = []

    def look(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, deviation = given[0].mean((0, 2, 3)), given[0].std((0, 2, 3))
        known = norm.running_var.sqrt()
        errors.append(float(((mean - norm.running_mean) / known).square().mean()))
        errors.append(float((deviation / known - 1).square().mean()))

    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return sum(errors)


def test_dreams_have_the_statistics_that_are_remembered() -> None:
    model = trained()
    example = torch.zeros(1, 3, 12, 12)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    batches = dream(model, example, count=64, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert off(model, torch.cat(batches)) < 0.05 * off(model, torch.randn(64, 3, 12, 12))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again, other = dream(model, example, count=64, seed=3), dream(model, example, count=64, seed=4)
    assert torch.equal(batches[0], again[0])
    assert not torch.equal(batches[0], other[0])


def test_pixels_are_dreamed_where_the_network_takes_pixels() -> None:
    model = trained()
    first = model[0]
    with torch.no_grad():
        first.weight /= 255  # the same network for inputs in [0, 255], on average 115
        first.bias -= 115 * first.weight.sum((1, 2, 3))
    pixels = torch.cat(dream(model, torch.zeros(1, 3, 12, 12), count=64))
    assert 50 < float(pixels.std()) < 1000
    assert float(pixels.mean()) > 50


@pytest.mark.parametrize("name", ["dbn", "cnn"])
def test_draws_are_sums_of_the_first_weights(name: str) -> None:
    model, inputs = network(name)
    batches = dream(model, inputs, count=40)
    drawn = torch.cat(batches)
    assert drawn.shape == (40, *inputs.shape[1:])
    if name == "dbn":
        weight, drawn = model[1].weight.detach(), drawn[::3]  # the others are noise
        onto = torch.linalg.lstsq(weight.T, drawn.flatten(1).T).solution
        assert torch.allclose(weight.T @ onto, drawn.flatten(1).T, atol=1e-4)
        made = (drawn.flatten(1) @ weight.T).std(0).mean()
        assert 0.25 < float(made / weight.norm(dim=1).mean()) < 0.35


def test_draws_lie_about_what_cancels_the_biases() -> None:
    """Neurons that are balanced where the data lie say where that is: the ridge solution of W x = -b."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Sigmoid(), nn.Linear(30, 20), nn.Sigmoid(), nn.Linear(20, 3))
    data_mean = torch.rand(40)
    with torch.no_grad():
        model[0].bias.copy_(-model[0].weight @ data_mean)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    square = weight.square().sum(1).mean()
    expected = -weight.T @ torch.linalg.solve(weight @ weight.T + 0.3 * square * torch.eye(30).double(), bias)
    drawn = torch.cat(dream(model, torch.zeros(1, 40)))
    assert drawn.shape == (4096, 40)
    for noise in (drawn[1::3], drawn[2::3]):
        assert torch.allclose(noise.mean(0), drawn[::3].mean(0), atol=0.1)
    drawn = drawn[::3]
    error = (drawn.mean(0).double() - expected).norm() / expected.norm()
    assert error < 0.02
    assert torch.cosine_similarity(drawn.mean(0), data_mean, 0) > 0.8


def test_draws_of_images_are_smooth() -> None:
    model, inputs = network("cnn")
    drawn = torch.cat(dream(model, inputs, count=64))
    waves = torch.fft.fft2(drawn - drawn.mean(0)).abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(waves.shape[0]).abs()
    slow = (frequency[:, None] < 0.125) & (frequency < 0.125)
    assert waves[slow].mean() > 5 * waves[~slow].mean()


def test_a_third_of_drawn_images_have_edges_and_even_surfaces() -> None:
    """What is fitted to smooth inputs alone does not hold on images."""
    model, inputs = network("cnn")
    drawn = torch.cat(dream(model, inputs, count=63))
    even = [float((images.diff(dim=3) == 0).float().mean()) for images in (drawn[::3], drawn[1::3], drawn[2::3])]
    assert even[1] > 0.5 > 0.1 > max(even[0], even[2])
    smooth, leaves, pink = drawn[::3], drawn[1::3], drawn[2::3]
    for noise in (leaves, pink):
        assert torch.allclose(noise.mean((0, 2, 3)), smooth.mean((0, 2, 3)), atol=0.3 * float(smooth.std()))
        assert torch.allclose(noise.std((0, 2, 3)), smooth.std((0, 2, 3)), rtol=0.3)


def test_large_images_are_drawn_in_small_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    assert [len(batch) for batch in dream(model, torch.zeros(1, 3, 128, 128))] == [64]
    assert [len(batch) for batch in dream(model, torch.zeros(1, 3, 32, 32))] == [512, 512]


def test_normalisation_without_statistics_is_compensated_on_draws() -> None:
    """Transformers' hidden layers, say: merged neurons come nearer to the original on inputs that were never seen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip
    x = torch.randn(512, 5) @ torch.randn(5, 30)
    with torch.no_grad():
        drawn, plain = (
            (nac.compress(model, x[:1], width={"2": 24}, calibration=way)(x) - model(x)).square().mean()
            for way in ("dream", "none")
        )
    assert drawn < 0.5 * plain


def test_reasons_not_to_dream() -> None:
    image = torch.randn(1, 3, 8, 8)
    assert why_not(trained(), image) is None
    assert why_not(trained(), [image]) == "its input is not one floating tensor [batch, ...]"
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
    assert why_not(layers, image) is None
    assert why_not(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), image) == "no layer reads its input as it is"


def test_a_plan_says_what_it_judged_by() -> None:
    model = trained()
    example = torch.zeros(1, 3, 12, 12)
    assert "64 inputs dreamed up" not in str(nac.plan(model, example, width=0.5))
    assert "256 inputs dreamed up from the statistics of BatchNorm" in str(nac.plan(model, example, params=0.5))
    quick = str(nac.plan(model, example, params=0.5, calibration="none"))
    assert "neurons are compared by their weights, without compensation: calibration='none'" in quick
    given = [torch.randn(8, 3, 12, 12)]
    assert "activations: 8 inputs of calibration data" in str(nac.plan(model, example, params=0.5, calibration=given))
