"""Compressed models as safetensors files with a manifest, without pickle, and with a hash against damage.

The tensors are stored as in any safetensors file, under the names of the model's state dict. The manifest in the header
contains the original's shapes and the plan, so that the code that builds the original can build the compressed model,
too. A hash detects any changed bit.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.files.atomic import atomically, atomically_folder
from nac_gpu.files.folders import check_saved, not_a_folder
from nac_gpu.files.opening import built, built_without_parameters
from nac_gpu.files.origin import Origin, origin_of, restore, shorten
from nac_gpu.files.shards import file_entries, relabel, write
from nac_gpu.network.copying import rebuild
from nac_gpu.network.machine import package_version
from nac_gpu.network.state import content, is_open, shapes_of, tensors
from nac_gpu.network.unwrapping import computed, unwrapped
from nac_gpu.planning.plans import Plan

FORMAT = 1
_MANIFEST, _HASH = "nac_gpu", "nac_gpu_sha256"


def save(model: nn.Module, path: str | Path) -> None:
    """Write a compressed model to a file, or a model of transformers to a folder for `from_pretrained`.

    The write is atomic: if the process stops, the file is either the old one or the complete new one.

    Args:
        model: made by `nac_gpu.compress`, perhaps fine-tuned since; wrappers are removed.
        path: a file that ends in `.safetensors`. Any other name is a folder, which must not exist yet: for models of
            transformers whose configuration can express the widths.

    Raises:
        ValueError: the model was not made by `nac_gpu.compress` (for example, it was rebuilt from a state dict), or
            its configuration cannot express its widths.
        FileExistsError: the folder exists already.
        OSError: the file cannot be written.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = nac_gpu.compress(model, torch.zeros(1, 8), width=0.25, calibration="none")
    >>> nac_gpu.save(small, "small.safetensors")
    """
    path = Path(path)
    model, _ = unwrapped(model)
    origin = origin_of(model)
    if origin is None:
        raise ValueError(
            f"{type(model).__name__} was not made by nac_gpu.compress, expected a compressed model; save others with "
            "safetensors.torch.save_model"
        )
    if path.suffix == ".safetensors":
        _save_file(model, origin, path)
    elif hasattr(model, "save_pretrained"):
        _save_folder(model, origin, path)
    else:
        raise not_a_folder(model, str(path))


def load(path: str | Path, factory: Callable[[], nn.Module], *, device: torch.device | str | None = None) -> nn.Module:
    """Read a compressed model. No code in the file is executed.

    Args:
        path: a file written by `save`.
        factory: builds the original architecture; its weights do not matter.
        device: of the loaded model; by default the CPU.

    Returns:
        The compressed model in eval mode, with the dtypes of the file.

    Raises:
        ValueError: the file is damaged, was not written by `save`, or by a newer version; or the factory builds another
            network.
        FileNotFoundError: no such file.
        ImportError: safetensors is not installed.

    >>> def build():
    ...     return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = nac_gpu.compress(build(), torch.zeros(1, 8), width=0.25, calibration="none")
    >>> nac_gpu.save(small, "small.safetensors")
    >>> nac_gpu.load("small.safetensors", build)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    path = Path(path)
    manifest, stored = read(path)
    model = _architecture(factory)
    try:
        plan = Plan.from_json(json.dumps(manifest["plan"]))
        shapes = {name: tuple(shape) for name, shape in manifest["original"]["shapes"].items()}
        attributes, configs = ({m: _tuples(v) for m, v in manifest[part].items()} for part in ("attributes", "configs"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: its manifest lacks or spoils {error}; expected what nac_gpu.save wrote") from error
    _check_factory(path, shapes, shapes_of(model))
    shortened = manifest.get("shortened", {})  # missing in files of earlier versions
    shorten(model, shortened)
    own = tensors(model)
    unknown = [name for name in stored if name not in own]
    absent = [name for name in _names(model) if name not in stored]
    if unknown or absent:
        where = "the file" if unknown else "the factory's network"
        raise ValueError(
            f"{path}: {(unknown + absent)[0]} is only in {where}, expected the same tensors in both; give the factory "
            "of the original"
        )
    state = {name: stored.get(name, tensor).to(device or "cpu") for name, tensor in own.items()}
    small = rebuild(model, state)
    restore(small, Origin(shapes, attributes, configs, plan, shortened, manifest.get("seed", 0)))
    return small.eval()


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a file, on the CPU.

    Raises:
        ValueError: the file is damaged, was not written by `save`, or by a newer version.
        FileNotFoundError: no such file.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or was cut off or damaged: {error}") from error
    if _MANIFEST not in header or _HASH not in header:
        raise ValueError(f"{path} has no manifest of nac_gpu, expected a file that nac_gpu.save wrote")
    whole = header.get("format") == "pt" and len(header) == 3
    if not whole or _digest(header[_MANIFEST], found) != header[_HASH]:
        raise ValueError(f"{path} is damaged: its contents do not have the hash that they were saved with")
    manifest = json.loads(header[_MANIFEST])
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {manifest.get('format')}, written by nac_gpu {manifest.get('version')}; this "
            f"version reads format {FORMAT}: upgrade nac_gpu"
        )
    return manifest, found


def _architecture(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's network without wrappers and parametrisations; its values do not matter.

    Parameters get values only if the factory or a parametrisation cannot do without.
    """
    model, _ = unwrapped(built_without_parameters(factory))
    try:
        return computed(model)[0]
    except Exception:  # of any kind: parametrisations are code of the user
        return computed(unwrapped(built(factory))[0])[0]


def _save_file(model: nn.Module, origin: Origin, path: Path) -> None:
    names = _names(model)
    own = tensors(model)
    changed = [
        name
        for name, shape in origin.shapes.items()
        if name in own and tuple(own[name].shape) != shape and name not in names
    ]
    values = {name: own[name] for name in (*names, *changed)}
    manifest = json.dumps(
        {
            "format": FORMAT,
            "version": package_version(),
            "torch": str(torch.__version__),
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "original": {"sha256": _fingerprint(origin.shapes), "shapes": origin.shapes},
            "widths": origin.plan.widths,
            "attributes": origin.attributes,
            "configs": origin.configs,
            "shortened": origin.shortened,
            "seed": origin.seed,
            "plan": asdict(origin.plan),
        }
    )
    header = {"format": "pt", _MANIFEST: manifest, _HASH: "0" * 64}
    with atomically(path) as partial:
        _write(partial, values, header, path)
        written = {name: entry.deferred(torch.device("cpu")) for name, entry in file_entries(partial).items()}
        relabel(partial, values, {**header, _HASH: _digest(manifest, written)})


def _write(partial: Path, values: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> None:
    try:
        write(partial, values, header)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _save_folder(model: Any, origin: Origin, path: Path) -> None:
    """Save with the model's own `save_pretrained`, if its configuration builds a network of these shapes."""
    check_saved(model, origin.plan, origin.shapes, path.name)
    with atomically_folder(path) as partial:
        if is_open(model):
            for settings in (model.config, getattr(model, "generation_config", None)):
                if settings is not None:
                    settings.save_pretrained(partial)
            own = tensors(model)
            values = {name: own[name] for name in _names(model)}
            _write(partial / "model.safetensors", values, {"format": "pt"}, path)
            return
        model.save_pretrained(partial)


def _names(model: nn.Module) -> list[str]:
    """The names in the state dict, with tied tensors only once."""
    kept = set(model.state_dict())
    return [name for name in tensors(model) if name in kept]


def _check_factory(path: Path, shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> None:
    for name in (*shapes, *own):
        if shapes.get(name) != own.get(name):
            raise ValueError(
                f"{path} was made from a network with {name} of the shape {shapes.get(name)}, but the factory's has "
                f"{own.get(name)}; give the factory of the original"
            )


def _fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 of the names and shapes of an architecture's tensors."""
    return hashlib.sha256(
        json.dumps(sorted((name, list(shape)) for name, shape in shapes.items())).encode()
    ).hexdigest()


def _digest(manifest: str, values: Mapping[str, Tensor]) -> str:
    """SHA-256 of a manifest and of names, types, shapes and bytes of tensors."""
    found = hashlib.sha256(manifest.encode())
    for name, tensor in sorted(values.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(content(tensor))
    return found.hexdigest()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists turned into tuples: JSON has no tuples, but modules keep sizes in them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of models need safetensors: pip install safetensors") from error
    return safetensors
