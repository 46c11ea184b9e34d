"""Fine-tuning: a short training loop in mixed precision, resumable, with optional distillation from the original."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nac_gpu.files.atomic import atomically
from nac_gpu.network.ambient import ordinary, undisturbed
from nac_gpu.network.moving import to_device
from nac_gpu.network.precision import multiplies_bfloat16
from nac_gpu.network.running import call, device_of, modes_kept
from nac_gpu.network.unwrapping import unwrapped
from nac_gpu.training.loss import Objective

Precision = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class Epoch:
    """The record of one pass over the data.

    Attributes:
        number: 1 for the first.
        loss: mean over the batches of this process.
        learning_rate: at the end of the epoch.
        seconds: duration of the training, without callbacks.
        measured: numbers that the callbacks returned, by name.
    """

    number: int
    loss: float
    learning_rate: float
    seconds: float
    measured: Mapping[str, float] = field(default_factory=dict)


Callback = Callable[[nn.Module, Epoch], Mapping[str, float] | None]


@undisturbed(defaults=False)
@torch.enable_grad()
def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    learning_rate: float = 0.01,
    warmup: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    max_norm: float | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    teacher: nn.Module | None = None,
    distillation: float = 0.5,
    temperature: float = 2.0,
    precision: Precision = "auto",
    steps_per_epoch: int | None = None,
    checkpoint: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    seed: int = 0,
) -> list[Epoch]:
    """Train a model in place, for instance after `nac_gpu.compress`.

    The learning rate rises linearly, then falls linearly to zero. Weight decay applies to weights, but not to biases
    and the parameters of normalisations (all parameters with one dimension). To train on several processes, wrap the
    model in `DistributedDataParallel` and give the loader a `DistributedSampler`; rank 0 writes the checkpoint.

    Args:
        model: trained on its device; parameters that do not require gradients are not changed.
        loader: batches of one epoch, such as a DataLoader. A batch is a pair (inputs, targets), or a mapping of keyword
            arguments (with "labels") for models of transformers; with a teacher, inputs alone are enough. `set_epoch`
            of the loader or its sampler is called if there is one.
        epochs: passes over the data.
        learning_rate: its maximum.
        warmup: share of the steps in which the learning rate rises.
        momentum: of SGD with Nesterov's momentum, the default optimizer.
        weight_decay: of the weights.
        optimizer: called with parameter groups and `lr=`, such as `torch.optim.AdamW`.
        max_norm: gradients are clipped to this norm, over all parameters together.
        loss: function of outputs and targets that returns a scalar. By default the `loss` of the outputs if there is
            one, else cross-entropy.
        teacher: the network for distillation, such as the original; it is not trained.
        distillation: the teacher's share of the loss, in [0, 1]: `temperature ** 2` times the Kullback-Leibler
            divergence of the softened class probabilities (Hinton et al. 2015).
        temperature: divides the logits for distillation.
        precision: of the forward pass: "bfloat16" (autocast), "float32" (the dtype of the weights), or "auto", which is
            bfloat16 if the hardware supports it.
        steps_per_epoch: number of batches in an epoch; needed for loaders without length.
        checkpoint: file written after every epoch. The same call resumes from it; if it is complete, the model is only
            loaded.
        settings: other settings that the training depends on, such as the augmentation, as plain values. They are
            saved in the checkpoint, and resuming with other settings is an error.
        callbacks: called with the model and the epoch after each epoch; the numbers by name that they return are added
            to the epoch. They may change the model's mode.
        progress: show a progress bar (needs tqdm).
        seed: of dropout and of loaders that shuffle with the global random state, which is restored at the end.

    Returns:
        All epochs, including those of a run that was resumed. The model's mode is restored.

    Raises:
        ValueError: options out of range, no trainable parameters, parameters made in inference mode, a loss that is not
            finite, or a checkpoint that was made with other options.
        TypeError: a loader without length, or batches or outputs of an unsupported type.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> data = [(torch.randn(16, 8), torch.randint(4, (16,)))]
    >>> [epoch.number for epoch in nac_gpu.finetune(model, data, epochs=2)]
    [1, 2]
    """
    options = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "max_norm": max_norm,
        "distillation": distillation if teacher is not None else None,
        "temperature": temperature if teacher is not None else None,
        "seed": seed,
        **(settings or {}),
    }
    _check(epochs, learning_rate, warmup, distillation, temperature, precision)
    plain, _ = unwrapped(model)
    if any(parameter.is_inference() for parameter in plain.parameters()):
        raise ValueError("the parameters were made in inference mode and cannot be trained; use copy.deepcopy(model)")
    device = device_of(plain)
    groups = _parameter_groups(plain, weight_decay)
    chosen = optimizer or _sgd(momentum, device)
    stepper = chosen(groups, lr=learning_rate)
    length = _length(loader, steps_per_epoch)
    steps = epochs * length
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: _rate(step, steps, warmup))
    done: list[Epoch] = []
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        done = _resume(path, plain, stepper, scheduler, options, device)
    cuda = [device] if device.type == "cuda" else []
    objective = Objective(loss, teacher, distillation, temperature)
    with torch.random.fork_rng(cuda), modes_kept(model), modes_kept(teacher):
        if teacher is not None:
            teacher.eval()
        for number in range(len(done) + 1, epochs + 1):
            torch.manual_seed(seed * 1000 + number - 1)  # so that a resumed run equals an uninterrupted one
            start = time.perf_counter()
            model.train()
            total = torch.zeros((), device=device)
            for batch in _batches(loader, number, epochs, length, progress):
                with _autocast(precision, device):
                    outputs, inputs, targets = _forward(model, to_device(ordinary(batch), device, non_blocking=True))
                    value = objective(outputs, inputs, targets)
                value.backward()
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
                stepper.step()
                stepper.zero_grad(set_to_none=True)
                scheduler.step()
                total += value.detach()
            mean = float(total) / length
            if not math.isfinite(mean):
                raise ValueError(
                    f"the loss of epoch {number} is {mean}, expected a finite one; lower learning_rate="
                    f"{learning_rate:g}" + ("" if path is None else f" (the previous epoch is in {path})")
                )
            epoch = Epoch(number, mean, float(scheduler.get_last_lr()[0]), time.perf_counter() - start)
            for callback in callbacks:
                measured = dict(epoch.measured) | dict(callback(model, epoch) or {})
                epoch = Epoch(number, mean, epoch.learning_rate, epoch.seconds, measured)
            done.append(epoch)
            if path is not None and _first_process():
                last = number == epochs
                _keep(path, plain, None if last else (stepper, scheduler), done, options)
    return done


def _check(
    epochs: int, learning_rate: float, warmup: float, distillation: float, temperature: float, precision: str
) -> None:
    if epochs < 1:
        raise ValueError(f"epochs={epochs}, expected at least 1")
    for name, value in (("learning_rate", learning_rate), ("temperature", temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}, expected a number above 0")
    for name, value in (("warmup", warmup), ("distillation", distillation)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}, expected a share, 0 to 1")
    if precision not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"unknown precision {precision!r}, expected auto, bfloat16 or float32")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires gradients, expected some to train")
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _sgd(momentum: float, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    def make(groups: Any, lr: float) -> torch.optim.Optimizer:
        fused = device.type in ("cpu", "cuda")
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)

    return make


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, relative to its maximum."""
    rise = max(1, round(steps * warmup))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def _length(loader: Iterable[Any], steps_per_epoch: int | None) -> int:
    if steps_per_epoch is not None:
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch}, expected at least 1")
        return steps_per_epoch
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        kind = "a tensor" if isinstance(loader, Tensor) else type(loader).__name__
        raise TypeError(f"loader is {kind}, expected batches: a list of them, or a DataLoader")
    try:
        length = len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise TypeError(
            f"the loader ({type(loader).__name__}) has no length, which the learning rate depends on; give "
            "steps_per_epoch="
        ) from error
    if length < 1:
        raise ValueError("the loader has no batch, expected at least one")
    return length


def _batches(loader: Iterable[Any], number: int, epochs: int, length: int, progress: bool) -> Iterator[Any]:
    """The batches of an epoch, after `set_epoch` of the loader or its sampler."""
    for place in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        told = getattr(place, "set_epoch", None)
        if callable(told):
            told(number - 1)
    batches: Iterable[Any] = islice(loader, length)
    if progress:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        batches = tqdm(batches, desc=f"epoch {number}/{epochs}", total=length, unit="step", leave=False)
    seen = 0
    for batch in batches:
        seen += 1
        yield batch
    if seen < length:
        raise ValueError(
            f"the loader gave {seen} batches in epoch {number}, expected {length}; a generator can be used only once"
        )


def _autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    low = precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()


def _forward(model: nn.Module, batch: Any) -> tuple[Any, Any, Any]:
    """The outputs of the model on a batch, the inputs, and the targets (None without targets)."""
    if isinstance(batch, Mapping):
        return call(model, batch), batch, batch.get("labels")
    if isinstance(batch, list | tuple):
        if len(batch) != 2:
            raise TypeError(f"a batch has {len(batch)} parts, expected two: inputs and targets")
        return call(model, batch[0]), batch[0], batch[1]
    if isinstance(batch, Tensor):
        return call(model, batch), batch, None
    raise TypeError(f"a batch is {type(batch).__name__}, expected (inputs, targets), a mapping or a tensor")


def _first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _keep(path: Path, model: nn.Module, moving: Any, done: Sequence[Epoch], options: Mapping[str, Any]) -> None:
    optimizer, scheduler = (None, None) if moving is None else (each.state_dict() for each in moving)
    state = {
        "options": dict(options),
        "epochs": [asdict(epoch) for epoch in done],
        "model": model.state_dict(),
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    with atomically(path) as partial:
        torch.save(state, partial)


def _resume(
    path: Path, model: nn.Module, optimizer: Any, scheduler: Any, options: Mapping[str, Any], device: torch.device
) -> list[Epoch]:
    """Load a checkpoint into model, optimizer and scheduler, and return its epochs."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        made, epochs = state["options"], [Epoch(**epoch) for epoch in state["epochs"]]
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of nac_gpu.finetune: {error}; remove it to start anew") from error
    if made != options:
        names = [name for name in {**made, **options} if made.get(name) != options.get(name)]
        other, now = ({name: each.get(name) for name in names} for each in (made, options))
        raise ValueError(f"{path} was made with {other}, not {now}: remove it to start anew")
    model.load_state_dict(state["model"])
    if len(epochs) < options["epochs"]:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    return epochs
