"""Dreams: synthetic inputs made from a trained network, for use without data.

BatchNorm stores the mean and variance that every channel had on the training data. Noise is optimised by gradient
descent until its channel statistics match them (Yin et al., "Dreaming to Distill", CVPR 2020; Cai et al., "ZeroQ",
CVPR 2020). The result does not look like an image, but its activations are correlated as those of images are.

A network without stored statistics (no normalisation, or LayerNorm, which computes them from the input) still tells
something about its inputs. Gradients of the first layer are sums of inputs, so its weights span the directions in which
the inputs vary. A third of the inputs are random linear combinations of these weights. They are centred on the small
input whose pre-activations best cancel the biases, because trained neurons tend to be balanced where the data lie. What
is fitted to such inputs alone need not hold on images, so the others are dead leaves and pink noise of their mean and
deviation.

Both ways run the model with gradients and in batches of their own, which its code may not expect. The careful variants
avoid that as far as possible: see `dream` and `draw`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.calibration.noise import dead_leaves, image_noise, pink
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.gradients import GradientsKept
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
    model: nn.Module,
    inputs: Tensor,
    *,
    count: int | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
    careful: int | None = None,
    steps: int | None = None,
) -> list[Tensor]:
    """Synthetic inputs whose channel statistics match the running statistics of BatchNorm.

    Without BatchNorm: inputs like the first layer's weights, see `draw`.

    Args:
        model: one for which `why_not` returns None; not changed.
        inputs: an example, [batch, ...]; defines shape, dtype and device.
        count: number of inputs; by default 256, down to 64 for large images.
        seed: of the noise; the global random state is not touched.
        ranks: the processes that divide the batches among them.
        careful: the model is run on this many inputs at once, and neither in bfloat16 nor without gradients where its
            code switches them off.
        steps: of gradient descent, by default 60. With none, the noise is only scaled to fit, which needs no gradient.

    Returns:
        Batches of inputs.

    Raises:
        Exception: anything that the model's code raises.
        RuntimeError: no gradient reaches the inputs.
        ValueError: the inputs that were made are not finite.
        RankError: another rank failed or was lost.
    """
    if not _norms(model):
        return draw(model, inputs, count=count, seed=seed, careful=careful)
    generator = torch.Generator().manual_seed(seed)
    count = usual_count(inputs) if count is None else count
    size = BATCH if careful is None else max(1, BATCH // careful) * careful
    sizes = [min(size, count - start) if careful is None else size for start in range(0, count, size)]
    noises = [image_noise((size, *inputs.shape[1:]), generator).to(inputs) for size in sizes]
    with evaluating(model), torch.enable_grad():
        made = list(
            ranks.share(noises, lambda noise: _dreamed(model, noise, careful, STEPS if steps is None else steps))
        )
    return _divided(made, careful)


def draw(
    model: nn.Module,
    inputs: Tensor,
    *,
    count: int | None = None,
    seed: int = 0,
    careful: int | None = None,
) -> list[Tensor]:
    """Random linear combinations of the first layer's weights, and in turn with them dead leaves and pink noise.

    Args:
        model: not changed.
        inputs: an example, [batch, ...]; defines shape, dtype and device.
        count: number of inputs; by default enough for 4096 output positions of the first layer, but at most 4096.
        seed: of the sums; the global random state is not touched.
        careful: the layer alone is run, and batches have this size.

    Returns:
        Batches of inputs.

    Raises:
        Exception: anything that the model's code raises.
        RuntimeError: no gradient reaches the inputs.
        ValueError: no layer reads the inputs as they are, or those that were made are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        batches = _drawn(model, inputs, count, generator, careful is not None)
    for batch in batches:
        over = [dim for dim in range(batch.ndim) if dim != 1]
        deviation, mean = torch.std_mean(batch.float(), over, keepdim=True)
        for place, noise in enumerate((dead_leaves, image_noise), 1):
            rows = batch[place::3]
            rows.copy_(mean + deviation * noise(tuple(rows.shape), generator).to(mean))
    return _divided(batches, careful)


def _divided(batches: list[Tensor], size: int | None) -> list[Tensor]:
    return batches if size is None else [small for batch in batches for small in batch.split(size)]


def _finite(inputs: Tensor) -> Tensor:
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("the inputs that were made are not finite")
    return inputs


def usual_count(inputs: Tensor) -> int:
    """The default number of dreamed inputs, 64 to 256: fewer for larger inputs."""
    return max(BATCH, min(COUNT, COUNT * 64 * 64 // max(math.prod(inputs.shape[2:]), 1)))


def _first_layer(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor] | None:
    """The first linear layer or convolution that is called with the model's input, possibly as another view of it.

    Returns:
        The layer, and what it is called with.
    """
    found: list[tuple[nn.Module, Tensor]] = []
    inputs = inputs.detach().clone()

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        reads = bool(given) and isinstance(given[0], Tensor)
        if reads and given[0].untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr():
            found.append((module, given[0]))

    kinds = nn.Linear | nn.modules.conv._ConvNd
    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, kinds)]
    try:
        with evaluating(model):
            call_on(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


@contextlib.contextmanager
def _within(model: nn.Module, layer: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """The outputs of the first layer for inputs of the model, by running the whole model."""
    made: list[Tensor] = []

    def keep(_: nn.Module, __: Any, result: Tensor) -> None:
        made.append(result)

    def first(x: Tensor) -> Tensor:
        made.clear()
        call(model, x)
        return made[0]

    hook = layer.register_forward_hook(keep)
    try:
        yield first
    finally:
        hook.remove()


@contextlib.contextmanager
def _alone(layer: nn.Module, given: Tensor, size: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """The same by running the layer alone.

    Args:
        layer: the first layer.
        given: what it is called with: a view of contiguous inputs.
        size: how many inputs those are; `first` takes multiples of it.
    """

    def first(x: Tensor) -> Tensor:
        parts = (part.contiguous() for part in x.split(size))
        views = (part.as_strided(given.shape, given.stride(), given.storage_offset()) for part in parts)
        return torch.cat([layer(view) for view in views])

    yield first


def _drawn(
    model: nn.Module, inputs: Tensor, count: int | None, generator: torch.Generator, careful: bool
) -> list[Tensor]:
    """Batches of random linear combinations of the first layer's weights, centred where its biases cancel."""
    found = _first_layer(model, inputs.detach().clone(memory_format=torch.contiguous_format) if careful else inputs)
    if found is None:
        raise ValueError("no layer reads the input as it is")
    layer, given = found
    least = len(inputs) if careful else 1

    def zeros(size: int) -> Tensor:
        return torch.zeros((size, *inputs.shape[1:]), dtype=inputs.dtype, device=inputs.device)

    with _alone(layer, given, least) if careful else _within(model, layer) as first:
        norm = layer.get_parameter("weight").flatten(1).norm(dim=1).square().mean().sqrt()
        nothing, spatial = first(zeros(least)), isinstance(layer, nn.modules.conv._ConvNd)
        rows = len(nothing) // least
        if count is None:
            positions = nothing[0].numel() // max(nothing.shape[1 if spatial else -1], 1)
            count = min(POSITIONS, max(usual_count(inputs), POSITIONS // max(positions, 1)))
        centre = _centre(first, zeros(least), _STIFFNESS * norm.square())[:1]
        size = math.ceil(min(count, _DRAWN) / least) * least
        batches = []
        for _ in range(0, count, size):
            white = torch.randn((size * rows, *nothing.shape[1:]), generator=generator)
            drawn = (pink(white) if spatial else white).to(nothing)
            sums = _transposed(first, zeros(size), drawn)
            deviation = (first(sums) - nothing[:1]).std()
            batches.append(_finite(centre + sums * (_LIVELINESS * norm / deviation)))
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


class _Mismatch:
    """How far the statistics of the inputs of BatchNorm are from those that it keeps.

    Args:
        parts: how many passes see a part of the inputs each; the statistics are those of all parts.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self.clear()

    def clear(self) -> None:
        """Begin with new inputs."""
        self._errors: list[Tensor] = []
        self._seen: list[list[tuple[nn.Module, Tensor]]] = []

    def begin(self) -> None:
        """The pass of the next part begins."""
        self._seen.append([])

    def look(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook that is called before BatchNorm."""
        given: Tensor = args[0] if args else next(iter(named.values()))
        if self._parts == 1:
            self._errors.append(self._of(module, given))
        else:
            self._seen[-1].append((module, given.clone()))  # the model may change it afterwards

    def total(self) -> Tensor:
        """The sum over all calls of BatchNorm, a scalar."""
        for calls in zip(*self._seen, strict=True):
            self._errors.append(self._of(calls[0][0], torch.cat([given for _, given in calls])))
        if not self._errors:
            raise ValueError("no BatchNorm with statistics is run")
        return torch.stack(self._errors).sum()

    def _of(self, module: nn.Module, given: Tensor) -> Tensor:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm), "hooked by _dreamed()"
        assert module.running_mean is not None, "checked when it was hooked"
        assert module.running_var is not None, "it has a running mean"
        values = given.float() if given.dtype != torch.float64 else given
        over = [dim for dim in range(values.ndim) if dim != 1]
        mean, variance = values.mean(over), values.var(over, correction=0)
        deviation = (module.running_var.to(values.dtype) + module.eps).sqrt()
        off = (mean - module.running_mean.to(values.dtype)) / deviation
        stretched = (variance + module.eps).sqrt() / deviation - 1
        return off.square().mean() + stretched.square().mean()


def _dreamed(model: nn.Module, noise: Tensor, part: int | None, steps: int) -> Tensor:
    """One batch of noise, optimised to match the statistics of BatchNorm.

    Args:
        model: in eval mode.
        noise: a batch.
        part: how many inputs the model is run on at once, see `careful` of `dream`.
        steps: of gradient descent.
    """
    parts = 1 if part is None else len(noise) // part
    mismatch = _Mismatch(parts)

    def error(inputs: Tensor) -> Tensor:
        mismatch.clear()
        fast = part is None and inputs.dtype == torch.float32 and multiplies_bfloat16(inputs.device)
        kept = contextlib.nullcontext() if part is None else GradientsKept()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=fast), kept:
            layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
            for own in inputs.chunk(parts) if parts > 1 else (inputs,):
                mismatch.begin()
                call(model, own.contiguous(memory_format=layout) if fast else own)
        return mismatch.total()

    hooks = [module.register_forward_pre_hook(mismatch.look, with_kwargs=True) for module in _norms(model)]
    try:
        with torch.no_grad():
            found = [float(error(mean + scale * noise)) for mean, scale in _SCALES]
        mean, scale = _SCALES[found.index(min(found))]
        inputs = (mean + scale * noise).requires_grad_()
        optimizer = torch.optim.Adam([inputs], lr=_RATE * scale, betas=(0.9, 0.99))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _RATE * scale * 0.5 * (1 + math.cos(math.pi * step / steps))
            (inputs.grad,) = torch.autograd.grad(error(inputs), inputs)
            optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return _finite(inputs.detach())
