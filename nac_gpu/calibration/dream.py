"""Dreams: synthetic inputs made from a trained network, for use without data.

BatchNorm stores the mean and variance that every channel had on the training data. Noise is optimised by gradient
descent until its channel statistics match them (Yin et al., "Dreaming to Distill", CVPR 2020; Cai et al., "ZeroQ",
CVPR 2020). The result does not look like an image, but its activations are correlated as those of images are.

A network without stored statistics (no normalisation, or LayerNorm, which computes them from the input) still tells
something about its inputs. Gradients of the first layer are sums of inputs, so its weights span the directions in which
the inputs vary. Inputs are drawn as random linear combinations of these weights. They are centred on the small input
whose pre-activations best cancel the biases, because trained neurons tend to be balanced where the data lie. Such
inputs are good enough for compensation, but not for comparing neurons.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.precision import multiplies_bfloat16
from nac_gpu.network.running import ExampleInputs, call, call_on, evaluating

BATCH = 64
COUNT = 256  # inputs; fewer where they are large
POSITIONS = 4096  # output positions of the first layer that random combinations of weights should cover
STEPS = 60
_DRAWN = 512  # batch size of random combinations of weights
_STIFFNESS = 0.3  # ridge penalty on the input that cancels the biases, relative to the neurons' squared norms
_LIVELINESS = 0.3  # standard deviation of the first layer's outputs, relative to its neurons' norms
_ITERATIONS = 50  # of conjugate gradients
_RATE = 0.1  # learning rate of Adam, relative to the standard deviation of the inputs
# Mean and standard deviation of the first noise: normalised images, pixels in [0, 1], pixels in [0, 255].
_SCALES = ((0.0, 1.0), (0.45, 0.25), (115.0, 65.0))


def has_statistics(model: nn.Module) -> bool:
    """Whether the model has BatchNorm with running statistics."""
    return bool(_norms(model))


def why_not(model: nn.Module, example_inputs: ExampleInputs) -> str | None:
    """The reason why no inputs can be dreamed up for a model, or None if they can."""
    if not isinstance(example_inputs, Tensor) or not example_inputs.is_floating_point() or example_inputs.ndim < 2:
        return "its input is not one floating tensor [batch, ...]"
    if _norms(model):
        return None
    return None if _first_layer(model, example_inputs) is not None else "no layer reads its input as it is"


def dream(
    model: nn.Module, inputs: Tensor, *, count: int | None = None, seed: int = 0, ranks: Ranks = ALONE
) -> list[Tensor]:
    """Synthetic inputs whose channel statistics match the running statistics of BatchNorm.

    Without BatchNorm: random linear combinations of the first layer's weights, centred where its biases cancel.

    Args:
        model: one for which `why_not` returns None; not changed.
        inputs: an example, [batch, ...]; defines shape, dtype and device.
        count: number of inputs; by default 256, down to 64 for large images. Without BatchNorm, enough for 4096 output
            positions of the first layer, but at most 4096.
        seed: of the noise; the global random state is not touched.
        ranks: the processes that divide the batches among them.

    Returns:
        Batches of inputs.

    Raises:
        RuntimeError: no gradient reaches the inputs.
        RankError: another rank failed or was lost.
    """
    generator = torch.Generator().manual_seed(seed)
    if not _norms(model):
        return _drawn(model, inputs, count, generator)
    count = usual_count(inputs) if count is None else count
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    noises = [_noise((size, *inputs.shape[1:]), generator).to(inputs) for size in sizes]
    with evaluating(model), torch.enable_grad():
        return list(ranks.share(noises, lambda noise: _dreamed(model, noise)))


def usual_count(inputs: Tensor) -> int:
    """The default number of dreamed inputs, 64 to 256: fewer for larger inputs."""
    return max(BATCH, min(COUNT, COUNT * 64 * 64 // max(math.prod(inputs.shape[2:]), 1)))


def _first_layer(model: nn.Module, inputs: Tensor) -> nn.Module | None:
    """The first linear layer or convolution that is called with the model's input, possibly flattened."""
    found: list[nn.Module] = []
    inputs = inputs.detach().clone()

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        reads = bool(given) and isinstance(given[0], Tensor)
        if reads and given[0].untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr():
            found.append(module)

    kinds = nn.Linear | nn.modules.conv._ConvNd
    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, kinds)]
    try:
        with evaluating(model):
            call_on(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _drawn(model: nn.Module, inputs: Tensor, count: int | None, generator: torch.Generator) -> list[Tensor]:
    """Batches of random linear combinations of the first layer's weights, centred where its biases cancel."""
    layer = _first_layer(model, inputs)
    assert layer is not None, "why_not() was asked"
    made: list[Tensor] = []

    def keep(_: nn.Module, __: Any, result: Tensor) -> None:
        made.append(result)

    hook = layer.register_forward_hook(keep)

    def first(x: Tensor) -> Tensor:
        made.clear()
        call(model, x)
        return made[0]

    def zeros(size: int) -> Tensor:
        return torch.zeros((size, *inputs.shape[1:]), dtype=inputs.dtype, device=inputs.device)

    try:
        with evaluating(model):
            norm = layer.get_parameter("weight").flatten(1).norm(dim=1).square().mean().sqrt()
            nothing, spatial = first(zeros(1)), isinstance(layer, nn.modules.conv._ConvNd)
            if count is None:
                positions = nothing[0].numel() // max(nothing.shape[1 if spatial else -1], 1)
                count = min(POSITIONS, max(usual_count(inputs), POSITIONS // max(positions, 1)))
            centre = _centre(first, zeros(1), _STIFFNESS * norm.square())
            size = min(count, _DRAWN)
            batches = []
            for _ in range(0, count, size):
                white = torch.randn((size, *nothing.shape[1:]), generator=generator)
                drawn = (_pink(white) if spatial else white).to(nothing)
                sums = _transposed(first, zeros(size), drawn)
                deviation = (first(sums) - nothing).std()
                batches.append(centre + sums * (_LIVELINESS * norm / deviation))
    finally:
        hook.remove()
    return batches


def _transposed(first: Callable[[Tensor], Tensor], zeros: Tensor, values: Tensor) -> Tensor:
    """The transposed weights of the first layer times values of its outputs: the shape of the inputs."""
    with torch.enable_grad():
        inputs = zeros.clone().requires_grad_()
        (sums,) = torch.autograd.grad(first(inputs), inputs, values)
    return sums


def _centre(first: Callable[[Tensor], Tensor], zeros: Tensor, stiffness: Tensor) -> Tensor:
    """The input x that minimises `|W x + b|^2 + stiffness |x|^2`, by conjugate gradients: [1, ...].

    Args:
        first: the first layer, `W x + b`.
        zeros: one input of zeros.
        stiffness: a scalar.
    """
    nothing = first(zeros)
    x, residual = zeros, -_transposed(first, zeros, nothing)
    direction, size = residual, residual.square().sum()
    least = 1e-10 * size
    for _ in range(_ITERATIONS):
        if size <= least:
            break
        image = _transposed(first, zeros, first(direction) - nothing) + stiffness * direction
        step = size / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return x


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise of unit standard deviation with a spatial 1/f amplitude spectrum, as in natural images.

    Args:
        shape: [batch, channels, ...].
        generator: on the CPU.
    """
    if len(shape) < 3:
        return torch.randn(shape, generator=generator)
    shared = torch.randn((shape[0], 1, *shape[2:]), generator=generator)
    own = torch.randn(shape, generator=generator)
    white = math.sqrt(0.9) * shared + math.sqrt(0.1) * own  # colour channels of images are correlated
    return _pink(white)


def _pink(white: Tensor) -> Tensor:
    """White noise filtered to unit standard deviation and a spatial 1/f amplitude spectrum."""
    space = tuple(range(2, white.ndim))
    squared = torch.zeros(())
    for dim in space:
        squared = squared[..., None] + torch.fft.fftfreq(white.shape[dim]).square()
    amplitude = squared.clamp_min(1 / max(white.shape[2:]) ** 2).rsqrt()
    noise = torch.fft.ifftn(torch.fft.fftn(white, dim=space) * amplitude, dim=space).real
    return noise / noise.std()


def _dreamed(model: nn.Module, noise: Tensor) -> Tensor:
    """One batch of noise, optimised to match the statistics of BatchNorm."""
    errors: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm), "hooked below"
        assert module.running_mean is not None, "checked when it was hooked"
        assert module.running_var is not None, "it has a running mean"
        values = given[0].float() if given[0].dtype != torch.float64 else given[0]
        over = [dim for dim in range(values.ndim) if dim != 1]
        mean, variance = values.mean(over), values.var(over, correction=0)
        deviation = (module.running_var.to(values.dtype) + module.eps).sqrt()
        off = (mean - module.running_mean.to(values.dtype)) / deviation
        stretched = (variance + module.eps).sqrt() / deviation - 1
        errors.append(off.square().mean() + stretched.square().mean())

    def error(inputs: Tensor) -> Tensor:
        errors.clear()
        fast = inputs.dtype == torch.float32 and multiplies_bfloat16(inputs.device)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=fast):
            layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
            call(model, inputs.contiguous(memory_format=layout) if fast else inputs)
        return torch.stack(errors).sum()

    hooks = [module.register_forward_pre_hook(look) for module in _norms(model)]
    try:
        with torch.no_grad():
            found = [float(error(mean + scale * noise)) for mean, scale in _SCALES]
        mean, scale = _SCALES[found.index(min(found))]
        inputs = (mean + scale * noise).requires_grad_()
        optimizer = torch.optim.Adam([inputs], lr=_RATE * scale, betas=(0.9, 0.99))
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * scale * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            (inputs.grad,) = torch.autograd.grad(error(inputs), inputs)
            optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs.detach()
