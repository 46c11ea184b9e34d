"""Reading and writing safetensors files one tensor at a time.

The package safetensors maps whole files into memory and writes all tensors at once. Here the memory has to hold only
one tensor, however large the files are.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nac_gpu.network.deferred import Deferred
from nac_gpu.network.state import content

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_INDEX = "model.safetensors.index.json"
_AGAIN = "download or copy it again"
#: A safetensors file, a folder of them, or several files.
Weights = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Entry:
    """The location of a tensor in a file.

    Attributes:
        path: of the file.
        dtype: of the tensor.
        shape: of the tensor.
        start: offset of its first byte in the file.
        state: of the file when it was opened, see `_state`.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    state: tuple[int, int]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, copied to the CPU.

        Raises:
            OSError: the file is gone, or was changed since it was opened.
        """
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        content = mmap.mmap(-1, self.size)  # not from the heap, which would fragment
        with self.path.open("rb", buffering=0) as file:
            if _state(os.fstat(file.fileno())) != self.state:
                raise OSError(f"{self.path} was changed since it was opened; open the model again")
            file.seek(self.start)
            rest = memoryview(content)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise OSError(f"{self.path} is truncated, {len(rest)} bytes are missing; {_AGAIN}")
                rest = rest[count:]
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)

    def deferred(self, device: torch.device) -> Deferred:
        """The tensor as a deferred one, which is read whenever it is needed."""
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return Deferred.of(lambda: self.read().to(device), like, device)


def entries(weights: Weights) -> dict[str, Entry]:
    """All tensors of some files, by name.

    Args:
        weights: a file; a folder with `model.safetensors.index.json`, or with files that end in `.safetensors`; or
            several files.

    Raises:
        FileNotFoundError: no such file or folder, a folder without safetensors files, or a file named in the index is
            missing.
        ValueError: a file is truncated, damaged or not a safetensors file; a tensor is in two files, or not in the
            file that the index names.
    """
    if not isinstance(weights, str | Path):
        return _united([Path(path) for path in weights])
    path = Path(weights)
    if not path.is_dir():
        return file_entries(path)
    if (path / _INDEX).is_file():
        return _indexed(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{path} has no files that end in .safetensors; save the model with safetensors (of transformers: "
            "save_pretrained)"
        )
    return _united(files)


def _united(files: Sequence[Path]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path in files:
        for name, entry in file_entries(path).items():
            if name in found:
                raise ValueError(f"{name} is in {found[name].path} and in {path}, expected it in one; name the files")
            found[name] = entry
    return found


def _indexed(folder: Path) -> dict[str, Entry]:
    try:
        places: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {file: folder / file for file in places.values()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / _INDEX} is not the index of a model, it lacks or spoils {error}") from error
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        names = [name for name, file in places.items() if folder / file == missing[0]]
        raise FileNotFoundError(
            f"{missing[0]} is missing, one of {len(files)} files, with {names[0]} and {len(names) - 1} other tensors; "
            f"{_AGAIN}"
        )
    inside = {file: file_entries(path) for file, path in files.items()}
    for name, file in places.items():
        if name not in inside[file]:
            raise ValueError(f"{files[file]} lacks {name}, which {_INDEX} says is there; {_AGAIN}")
    return {name: inside[file][name] for name, file in places.items()}


def file_entries(path: Path) -> dict[str, Entry]:
    """All tensors of one file, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, damaged or not a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with path.open("rb") as file:
        state = _state(os.fstat(file.fileno()))
        size = state[0]
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path} is not a safetensors file, or was cut off within its header; {_AGAIN}")
        header = file.read(length)
    found: dict[str, Entry] = {}
    try:
        parts: dict[str, Any] = json.loads(header)
        parts.pop(_METADATA, None)
        for name, part in parts.items():
            begin, end = part["data_offsets"]
            found[name] = Entry(path, _DTYPES[part["dtype"]], tuple(part["shape"]), 8 + length + begin, state)
            if begin < 0 or end - begin != found[name].size:
                raise ValueError(f"{end - begin} bytes for {name}, which has {found[name].size}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file, its header lacks or spoils {error}; {_AGAIN}") from error
    for name, entry in found.items():
        if entry.start + entry.size > size:
            raise ValueError(
                f"{path} was cut off: {name} would end at byte {entry.start + entry.size:,}, the file at {size:,}; "
                f"{_AGAIN}"
            )
    return found


def _state(found: os.stat_result) -> tuple[int, int]:
    """Size and time of modification, which tell whether a file was changed."""
    return found.st_size, found.st_mtime_ns


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; deferred tensors are loaded one after the other.

    Args:
        path: of the file.
        tensors: by name.
        metadata: kept in the header.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(_header(tensors, metadata))
        for _, tensor in _in_order(tensors):
            file.write(content(tensor))  # not bound to a name, so it is freed before the next one


def relabel(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a file that `write` wrote with these tensors by metadata of the same length."""
    with path.open("rb+") as file:
        file.write(_header(tensors, metadata))


def _in_order(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in file order: wide dtypes first, so that every offset is a multiple of its tensor's item size."""
    yield from sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    parts: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in _in_order(tensors):
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        parts[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(parts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
