"""Models for other programs: PyTorch's exported programs and ONNX, checked by running them."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.files.atomic import atomically
from nac_gpu.network.precision import without_tf32
from nac_gpu.network.running import ExampleInputs, call, evaluating, tensors_in
from nac_gpu.network.unwrapping import unwrapped


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> float:
    """Write a model in eval mode as an exported program (`.pt2`) or as ONNX (`.onnx`), and run what was written.

    Args:
        model: not changed; wrappers are taken off.
        path: of the file; its ending decides.
        example_inputs: what it is called with; the first dimension of every tensor is the batch.
        dynamic_batch: batches of any size may be given to what is written.
        tolerance: how far its outputs may be from the model's, as a share of their largest value.

    Returns:
        How far they are, at most, for the example and, with `dynamic_batch`, for a batch of three.

    Raises:
        ValueError: another ending, outputs that deviate by more than `tolerance` (no file is written then), or a model
            that cannot be exported.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, expected .pt2 or .onnx")
    model, _ = unwrapped(model)
    args, kwargs = _arguments(model, example_inputs)
    if dynamic_batch:  # a size of 1 would be taken for a constant
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
                    f"{path}: what was written deviates by {error:.1e} from the model, expected at most {tolerance:.0e}"
                )
            target.replace(partial)
        finally:
            target.unlink(missing_ok=True)
    return error


def _arguments(model: nn.Module, example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of `forward`."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        order = list(inspect.signature(model.forward).parameters)
        known = sorted(example_inputs, key=lambda name: order.index(name) if name in order else len(order))
        return (), {name: example_inputs[name] for name in known}
    return tuple(example_inputs), {}


def _batched(inputs: Any, size: int) -> Any:
    """The inputs with a batch of another size."""

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.repeat(-(-size // len(value)), *[1] * (value.ndim - 1))[:size]

    return pytree.tree_map(change, inputs)


def _shapes(args: Any, kwargs: Mapping[str, Any], dynamic_batch: bool) -> Any:
    """For `torch.export`: which sizes may change."""
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
        import onnxruntime  # noqa: F401 -- it checks what is written
        import onnxscript  # noqa: F401 -- torch needs it
    except ImportError as error:
        raise ImportError(f"ONNX needs packages: pip install 'nac-gpu[export]' ({error})") from error
    program = _exported(model, args, kwargs, dynamic_batch)
    with _quiet():
        made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False)
        assert made is not None, "the newer exporter gives the program"
        made.save(str(path), external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print and warn about their own insides."""
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
    expected = [value.cpu() for value in tensors_in(call(model, args or kwargs))]
    found = run(args, kwargs)
    if [value.shape for value in found] != [value.shape for value in expected]:
        return float("inf")
    errors = [0.0]
    for ours, theirs in zip(expected, found, strict=True):
        scale = float(ours.double().abs().max()) if ours.numel() else 0.0
        errors.append(float((ours.double() - theirs.double()).abs().max()) / scale if scale else 0.0)
    return max(errors)
