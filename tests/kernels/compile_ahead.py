"""Compile every kernel for GPUs that need not be there, and print what the assembler says: a JSON line a kernel.

    python tests/kernels/compile_ahead.py

Run in a process of its own, because a process that interprets kernels cannot compile them.
"""

import contextlib
import io
import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nac_gpu.kernels import centroids, distances, finishing, merging, neighbours, packing, searching

CAPABILITIES = (80, 90)
MATRIX = dict.fromkeys("points centroids costs packed".split(), "*{float}")
SLOTS = dict.fromkeys(
    ("masses nearest_cost made_at merge_cost cost masses_after nearest_cost_after made_at_after").split(),
    "*{float}",
)
NUMBERS = dict.fromkeys(
    (
        "table nearest point size alive partner merge_round merge_size scratch keep rows count slot position "
        "nearest_after point_after size_after"
    ).split(),
    "*i64",
)
SIZES = dict.fromkeys("m n d left round_number first_round tiles".split(), "i32")
KINDS = MATRIX | SLOTS | NUMBERS | SIZES
TILES = {"CLOSE": 5e-4, "TILE": distances.TILE, "DEPTH": distances.TILE_DEPTH}
TILE_OPTIONS = {
    "num_warps": distances.TILE_WARPS,
    "num_stages": distances.TILE_STAGES,
    "enable_fp_fusion": True,
}

#: kernel, its constants, its launch options
KERNELS = [
    (distances._distances_kernel, {"WEIGHTED": True, "LARGEST": 1e300} | TILES, TILE_OPTIONS),
    (searching._search_kernel, TILES, TILE_OPTIONS),
    (
        merging._merge_kernel,
        {"COLUMNS": merging._COLUMNS},
        {"num_warps": merging._WARPS, "enable_fp_fusion": False},
    ),
    (centroids._merge_centroids_kernel, {"DIMENSIONS": centroids._DIMENSIONS}, {"enable_fp_fusion": False}),
    (neighbours._update_kernel, {"EVERY": False, "COLUMNS": neighbours._COLUMNS}, {"enable_fp_fusion": False}),
    (packing._pack_kernel, {"COLUMNS": packing._COLUMNS}, {"enable_fp_fusion": False}),
    (packing._pack_slots_kernel, {"COLUMNS": packing._COLUMNS}, {"enable_fp_fusion": False}),
    (
        finishing._finish_kernel,
        {"SLOTS": finishing.MOST_SLOTS, "ROWS": finishing._ROWS, "COLUMNS": finishing._COLUMNS},
        {"num_warps": finishing._WARPS, "enable_fp_fusion": False},
    ),
]


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    for kernel, constants, options in KERNELS:
        for float_type in ("fp64", "fp32"):
            signature = {
                name: "constexpr" if name in constants else KINDS[name].format(float=float_type)
                for name in kernel.arg_names
            }
            pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if "*" in signature[n]}
            for capability in CAPABILITIES:
                log = compile_one(kernel, signature, constants, pointers, options, capability)
                print(json.dumps({"kernel": kernel.__name__, "dtype": float_type, "sm": capability} | log), flush=True)


def compile_one(kernel, signature, constants, attributes, options, capability):
    """Registers a thread, bytes spilled, bytes of shared memory, and matrix instructions."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    log = heard.getvalue()
    numbers = {key: re.findall(pattern, log) for key, pattern in PATTERNS.items()}
    return {key: max((int(number) for number in found), default=None) for key, found in numbers.items()} | {
        "shared": compiled.metadata.shared,
        "matrix_instructions": len(re.findall(r"mma\.sync|wgmma\.mma", compiled.asm["ptx"])),
    }


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
}

if __name__ == "__main__":
    main()
