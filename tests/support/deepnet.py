"""A deep residual network, written to safetensors shards one block at a time; run as a script, it is compressed."""

import json
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nac_gpu as nac


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, size // 2), nn.Linear(size // 2, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def deep(blocks: int, size: int) -> nn.Sequential:
    return nn.Sequential(*(Block(size) for _ in range(blocks)))


def write_shards(folder: Path, blocks: int, size: int) -> int:
    """One file a block and an index; how many bytes the weights have."""
    folder.mkdir()
    places: dict[str, str] = {}
    count = 0
    for number in range(blocks):
        torch.manual_seed(number)
        state = {f"{number}.{name}": tensor for name, tensor in Block(size).state_dict().items()}
        save_file(state, folder / f"{number}.safetensors")
        places |= dict.fromkeys(state, f"{number}.safetensors")
        count += sum(tensor.nbytes for tensor in state.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return count


def in_memory(folder: Path, blocks: int, size: int) -> nn.Module:
    model = deep(blocks, size)
    for file in folder.glob("*.safetensors"):
        model.load_state_dict(load_file(file), strict=False)
    return model


def memory(kind: str) -> int:
    """Bytes of address space that the process has ("VmSize"), or had at most ("VmPeak")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def main(way: str, folder: Path, blocks: int, size: int, allowed: int) -> None:
    """Compress a model with so many bytes more than the process has once it has compressed a tiny one.

    The exit code is 3 where the model cannot be had, and 4 where it cannot be compressed.
    """
    tiny = folder.parent / f"tiny-{way}"
    write_shards(tiny, 1, 8)
    nac.save(
        nac.compress(nac.open_model(lambda: deep(1, 8), tiny), torch.ones(1, 8), width=0.5), tiny / "x.safetensors"
    )
    start = memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + allowed, start + allowed))
    code = 3
    try:
        model = nac.open_model(lambda: deep(blocks, size), folder) if way == "open" else in_memory(folder, blocks, size)
        code = 4
        nac.save(
            nac.compress(model, torch.ones(1, size), width=0.25, calibration="none"),
            folder.parent / f"{way}.safetensors",
        )
    except (MemoryError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(code)
    print(memory("VmPeak") - start)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
