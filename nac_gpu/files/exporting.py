"""Export for other programs: PyTorch's exported programs and ONNX, checked by running them."""

import contextlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.files.atomic import atomically
from nac_gpu.network.ambient import ordinary, undisturbed
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.copying import copied
from nac_gpu.network.precision import without_tf32
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, call, evaluating
from nac_gpu.network.unwrapping import unwrapped


@undisturbed()
def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Write a model in eval mode as an exported program (`.pt2`) or as ONNX (`.onnx`), and check it by running it.

    Args:
        model: not changed; wrappers are removed.
        path: of the file; its suffix defines the format.
        example_inputs: what the model is called with; the first dimension of every tensor is the batch.
        dynamic_batch: the exported model accepts batches of any size.
        tolerance: largest allowed deviation of the exported model's outputs, relative to their largest value.

    Returns:
        The largest relative deviation, on the example inputs and, with `dynamic_batch`, on a batch of three.

    Raises:
        ValueError: another suffix, a deviation above `tolerance` (no file is written then), or a model that cannot be
            exported.
        ImportError: onnx, onnxscript or onnxruntime is not installed.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> nac_gpu.export(model, "model.pt2", torch.randn(1, 8)) < 1e-4
    True
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, expected .pt2 or .onnx")
    model = copied(unwrapped(model)[0])
    example_inputs = ordinary(example_inputs)
    args, kwargs = _arguments(model, example_inputs)
    if dynamic_batch:  # torch.export treats a size of 1 as a constant
        args, kwargs = _batched((args, kwargs), 2)
    with evaluating(model), without_tf32(), atomically(path) as partial:
        write = _write_program if path.suffix == ".pt2" else _write_onnx
        target = partial.with_suffix(path.suffix)
        try:
            write(model, args, kwargs, target, dynamic_batch)
            runner = _program if path.suffix == ".pt2" else _onnx_session
            run = runner(target)
            tried = [(args, kwargs), _batched((args, kwargs), 3)] if dynamic_batch else [(args, kwargs)]
            error = max(_deviation(model, run, *inputs) for inputs in tried)
            if not error <= tolerance:
                raise ValueError(
                    f"{path}: outputs of the exported model deviate by {error:.1e}, expected at most {tolerance:.0e}"
                )
            target.replace(partial)
        finally:
            target.unlink(missing_ok=True)
    return error


def _arguments(model: nn.Module, example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of `forward`, the latter in the order of its signature."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        order = list(inspect.signature(model.forward).parameters)
        known = sorted(example_inputs, key=lambda name: order.index(name) if name in order else len(order))
        return (), {name: example_inputs[name] for name in known}
    return tuple(example_inputs), {}


def _batched(inputs: Any, size: int) -> Any:
    """The inputs with another batch size."""

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.repeat(-(-size // len(value)), *[1] * (value.ndim - 1))[:size]

    return pytree.tree_map(change, inputs)


def _shapes(args: Any, kwargs: Mapping[str, Any], dynamic_batch: bool) -> Any:
    """The dynamic shapes for `torch.export`: the batch dimension of every tensor, or None."""
    if not dynamic_batch:
        return None
    batch = torch.export.Dim("batch", min=1)

    def change(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.ndim else None

    return (*(pytree.tree_map(change, a) for a in args), *(pytree.tree_map(change, v) for v in kwargs.values()))


def _write_program(model: nn.Module, args: Any, kwargs: Any, path: Path, dynamic_batch: bool) -> None:
    torch.export.save(_exported(model, args, kwargs, dynamic_batch), path)


def _exported(model: nn.Module, args: Any, kwargs: Any, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = _shapes(args, kwargs, dynamic_batch)
    if shapes is not None and kwargs:
        order = list(inspect.signature(model.forward).parameters)
        shapes = dict(zip([*order[: len(args)], *kwargs], shapes, strict=True))
    try:
        with _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "; try dynamic_batch=False" if dynamic_batch else ""
        raise ValueError(f"{type(model).__name__} cannot be exported: {said[0]}{remedy}") from error


def _write_onnx(model: nn.Module, args: Any, kwargs: Any, path: Path, dynamic_batch: bool) -> None:
    try:
        import onnxruntime  # noqa: F401 -- runs the exported model
        import onnxscript  # noqa: F401 -- torch.onnx needs it
    except ImportError as error:
        raise ImportError(f"ONNX needs packages: pip install 'nac-gpu[export]' ({error})") from error
    program = _exported(model, args, kwargs, dynamic_batch)
    with _quiet():
        made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False)
        assert made is not None, "the dynamo exporter returns the program"
        made.save(str(path), external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which print and warn about their own implementation."""
    level = logging.getLogger("torch").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch").setLevel(level)


def _program(path: Path) -> Any:
    module = torch.export.load(path).module()
    return lambda args, kwargs: [value.detach().cpu() for value in tensors_in(module(*args, **kwargs))]


def _onnx_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(args: Any, kwargs: Any) -> list[Tensor]:
        given = [
            value.detach().cpu().numpy() for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)
        ]
        found: Any = session.run(None, dict(zip(names, given, strict=True)))
        return [torch.from_numpy(value) for value in found]

    return run


def _deviation(model: nn.Module, run: Any, args: Any, kwargs: Any) -> float:
    """The largest difference of any output, as a share of its largest value."""
    expected = [value.cpu().double() for value in tensors_in(call(model, args or kwargs))]
    found = [value.double() for value in run(args, kwargs)]
    return relative_error(found, expected) if len(found) == len(expected) else math.inf
