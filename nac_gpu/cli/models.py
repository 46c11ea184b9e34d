"""Finding models by name: torchvision, timm, transformers, exported programs, and functions."""

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.cli.texts import Reader, reader_of
from nac_gpu.network.running import ExampleInputs

#: Mean and standard deviation of each channel, for pixels in [0, 1].
Scale = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as given by the user.
        build: builds the model; its weights are random unless `trained`.
        inputs: returns example inputs for the model, or None if they are not known.
        scale: normalisation of its images.
        trained: `build` returns trained weights.
        untrained: builds the architecture without trained weights; None if that is not possible.
        reader: opens its tokenizer; None if it is no folder of transformers.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], ExampleInputs] | None = None
    scale: Scale | None = None
    trained: bool = False
    untrained: Callable[[], nn.Module] | None = None
    reader: Callable[[], Reader] | None = None


def find(name: str, pretrained: bool = False) -> Source:
    """The source that a name refers to.

    Args:
        name: `torchvision:NAME`, `timm:NAME`, a folder of Hugging Face's transformers, an exported program (`.pt2`), or
            `package.module:function`, a function or class that is called without arguments.
        pretrained: use (and download) the trained weights of torchvision or timm.

    Raises:
        ValueError: the name has another form, or there is no such model.
        ImportError: the library of the model is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "torchvision" and rest:
        return _torchvision(name, rest, pretrained)
    if kind == "timm" and rest:
        return _timm(name, rest, pretrained)
    if pretrained:
        raise ValueError(f"--pretrained is for torchvision: and timm:, not for {name}; give --weights")
    path = Path(name)
    if path.suffix == ".pt2":
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        return Source(name, lambda: _program(path), trained=True)
    if path.is_dir():
        return _transformers(name, path)
    if rest and not path.exists():
        factory = _factory(name, kind, rest)
        return Source(name, factory, untrained=factory)
    raise ValueError(
        f"unknown model {name!r}, expected torchvision:NAME, timm:NAME, a folder with config.json, a file .pt2, or "
        "package.module:function"
    )


def _program(path: Path) -> nn.Module:
    """The network of an exported program, with `train` and `eval` allowed; they have no effect on it."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # torch logs the whole traceback, too
        module = torch.export.load(path).module()
    except Exception as error:
        said = first_line(error).partition(". Please")[0]  # its warnings are not shown
        raise ValueError(f"{path} cannot be read as an exported program: {said}") from error
    finally:
        logging.disable(before)
    for method in ("train", "eval"):  # torch sets them on the instance, to raise an error
        vars(module).pop(method, None)
    return module


def _torchvision(name: str, rest: str, pretrained: bool) -> Source:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"{name} needs torchvision: pip install torchvision") from error
    try:
        weights: Any = models.get_model_weights(rest)
    except ValueError as error:
        raise ValueError(f"torchvision has no model {rest!r}; it has {_like(rest, models.list_models())}") from error
    best = weights.DEFAULT if len(weights) else None
    preset: Any = best.transforms() if best is not None else None
    size = getattr(preset, "crop_size", [224])[0]
    scale = (tuple(preset.mean), tuple(preset.std)) if hasattr(preset, "mean") else None

    def build() -> nn.Module:
        more = {"init_weights": False} if rest in ("googlenet", "inception_v3") and not pretrained else {}
        return models.get_model(rest, weights=best if pretrained else None, **more)

    untrained = None if pretrained else build
    return Source(name, build, lambda _: torch.zeros(1, 3, size, size), scale, pretrained, untrained)


def _timm(name: str, rest: str, pretrained: bool) -> Source:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} needs timm: pip install timm") from error
    if not timm.is_model(rest):
        raise ValueError(f"timm has no model {rest!r}; it has {_like(rest, timm.list_models())}")

    def inputs(model: nn.Module) -> ExampleInputs:
        config: Any = model.pretrained_cfg
        return torch.zeros(1, *config["input_size"])

    known: Any = timm.get_pretrained_cfg(rest, allow_unregistered=True)
    scale = (tuple(known.mean), tuple(known.std)) if known is not None else None

    def build() -> nn.Module:
        return timm.create_model(rest, pretrained=pretrained)

    return Source(name, build, inputs, scale, pretrained, None if pretrained else build)


def _transformers(name: str, path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, expected a folder that save_pretrained wrote")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{name} needs transformers: pip install transformers") from error
    config: Any = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    architecture = (config.architectures or [None])[0]
    cls: Any = getattr(transformers, architecture, None) if architecture else transformers.AutoModel
    if cls is None:
        raise ValueError(f"{path}: config.json names {architecture}, which this version of transformers does not have")

    def build() -> nn.Module:
        return cls.from_pretrained(path, local_files_only=True)

    def inputs(model: nn.Module) -> ExampleInputs:
        own: Any = model
        if getattr(own, "main_input_name", "") == "pixel_values":
            vision = getattr(config, "vision_config", config)
            size, channels = vision.image_size, getattr(vision, "num_channels", 3)
            return {"pixel_values": torch.zeros(1, channels, *([size] * 2 if isinstance(size, int) else size))}
        return dict(own.dummy_inputs)

    weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))

    def untrained() -> nn.Module:
        return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)

    def reader() -> Reader:
        return reader_of(path, cls, config)

    return Source(name, build if weights else untrained, inputs, None, weights, untrained, reader)


def _factory(name: str, module: str, function: str) -> Callable[[], nn.Module]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # find modules in the working directory, as `python -m` does
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # code of the user runs
        raise ValueError(f"{name}: {module} cannot be imported: {_told(error)}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: {module} has no {function}")
        found = getattr(found, part)

    def build() -> nn.Module:
        try:
            model = found if isinstance(found, nn.Module) else found()
        except (Exception, SystemExit) as error:  # code of the user
            raise ValueError(f"{name}, called without arguments, raised {_told(error)}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} gives {type(model).__name__}, expected a torch.nn.Module")
        return model

    return build


def load_weights(model: nn.Module, path: Path) -> None:
    """Load trained weights into a model.

    Args:
        model: changed in place.
        path: a state dict as `.safetensors` or from `torch.save`, by itself or in a checkpoint under "state_dict" or
            "model". Prefixes "module." and "_orig_mod." of names are ignored.

    Raises:
        ValueError: a file of another type, or of another model.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--weights {path} cannot be read as weights: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"--weights {path} holds no state dict, expected tensors by name")
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"--weights {path} is of another model: {' '.join(lines[1:3])[:400]}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without advice for programmers; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _like(name: str, known: list[str]) -> str:
    import difflib

    return ", ".join(difflib.get_close_matches(name, known, 5, 0.4) or known[:5])
