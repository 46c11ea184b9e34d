"""Compile every kernel for GPUs that need not be there, and print what became of it: a JSON line a kernel.

    python tests/support/compile_ahead.py

Registers a thread, bytes spilled, bytes of shared memory, instructions, barriers, the matrix instructions, and the
length of the loop that holds them. Run in a process of its own, because a process that interprets kernels cannot
compile them.
"""

import contextlib
import io
import json
import re
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nac_gpu.kernels import (
    centroids,
    clusters,
    distances,
    finishing,
    merging,
    neighbours,
    packing,
    products,
    searching,
    seeding,
)

CAPABILITIES = (80, 90)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
MATRIX = dict.fromkeys(
    "points centroids costs packed wide norms distances masses draws scratch products".split(), "*{float}"
)
SLOTS = dict.fromkeys(
    "masses nearest_cost made_at cost masses_after nearest_cost_after".split(),
    "*{float}",
)
NUMBERS = dict.fromkeys(
    (
        "table padded_table nearest point size alive partner round listed keep rows searched slot position "
        "nearest_after centres"
    ).split(),
    "*i64",
)
SIZES = dict.fromkeys("m n d k left round_number first_round tiles first candidates".split(), "i32")
KINDS = MATRIX | SLOTS | NUMBERS | SIZES | {"has_close": "*i32"}
#: Arguments that are tuples of the tensors above.
GROUPS = {
    "clusters": clusters.Slots,
    "after": clusters.Slots,
    "merges": clusters.Merges,
    "inputs": searching._Inputs,
    "outputs": searching._Outputs,
}


def dots(panels: bool) -> dict[str, object]:
    """Constants of the kernels that make tiles of distances."""
    return {"TILE": products.TILE, "DEPTH": products.DEPTH, "PANELS": panels}


TILE_OPTIONS = {"num_warps": products.WARPS, "num_stages": products.STAGES, "enable_fp_fusion": True}
EXACT = {"enable_fp_fusion": False}

#: kernel, its constants (those of the dtype are added), its launch options
KERNELS = [
    (
        products._pad_kernel,
        {"COPIES": True, "ROWS": products._PAD_ROWS, "COLUMNS": products._PAD_COLUMNS},
        {"enable_fp_fusion": True},
    ),
    (products._product_kernel, {"SIDE": products.DEPTH}, {"num_warps": 1}),
    *((distances._distances_kernel, {"WEIGHTED": True} | dots(panels), TILE_OPTIONS) for panels in (False, True)),
    (
        distances._close_kernel,
        {"WEIGHTED": True, "TILE": products.TILE, "DEPTH": distances._PAIR_DEPTH, "FEW": distances._FEW_PAIRS},
        {"num_warps": products.WARPS, "enable_fp_fusion": True},
    ),
    (searching._search_kernel, dots(False), TILE_OPTIONS),
    (searching._search_kernel, dots(True) | {"TILE": searching._PANEL_TILE}, TILE_OPTIONS),
    (searching._exact_search_kernel, {"TILE": products.TILE}, {"num_warps": products.WARPS, "enable_fp_fusion": True}),
    (merging._merge_kernel, {"COLUMNS": merging._COLUMNS}, {"num_warps": merging._WARPS} | EXACT),
    (centroids._merge_centroids_kernel, {"DIMENSIONS": centroids._DIMENSIONS}, EXACT),
    (neighbours._update_kernel, {"EVERY": False, "COLUMNS": neighbours._COLUMNS}, EXACT),
    (packing._pack_kernel, {"COLUMNS": packing._COLUMNS}, EXACT),
    (packing._pack_slots_kernel, {"SLOTS": packing._SLOTS}, {"num_warps": packing._SLOT_WARPS} | EXACT),
    (
        finishing._finish_kernel,
        {"SLOTS": finishing.MOST_SLOTS, "ROWS": finishing._ROWS, "COLUMNS": finishing._COLUMNS},
        {"num_warps": finishing._WARPS} | EXACT,
    ),
    (
        seeding._seed_kernel,
        {"CANDIDATES": 16, "COLUMNS": seeding._COLUMNS},
        {"num_warps": seeding._WARPS, "enable_fp_fusion": False},
    ),
]


def main() -> None:
    work = [(number, float_type) for number in range(len(KERNELS)) for float_type in DTYPES]
    with ProcessPoolExecutor(max_workers=2) as pool:
        for rows in pool.map(compiled, work):
            for row in rows:
                print(json.dumps(row), flush=True)


def compiled(work):
    """A kernel in one type, for every GPU."""
    number, float_type = work
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    (kernel, constants, options), dtype, rows = KERNELS[number], DTYPES[float_type], []
    own = {"CLOSE": products.close_share(dtype), "EXACT": searching._EXACT[dtype], "LARGEST": torch.finfo(dtype).max}
    constants = constants | {name: value for name, value in own.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind(name, float_type) for name in kernel.arg_names}
    places = [place for i, name in enumerate(kernel.arg_names) for place in pointers(signature[name], i)]
    aligned = {place: [["tt.divisibility", 16]] for place in places}
    for capability in CAPABILITIES:
        row = {"kernel": kernel.__name__, "dtype": float_type, "sm": capability}
        if "PANELS" in constants:
            row["products"] = "panels" if constants["PANELS"] else "tiles"
        rows.append(row | compile_one(kernel, signature, constants, aligned, options, capability))
    return rows


def kind(name, float_type):
    """The type of an argument, of a tuple those of its fields."""
    if name in GROUPS:
        return GROUPS[name](*(kind(field, float_type) for field in GROUPS[name]._fields))
    return KINDS[name].format(float=float_type)


def pointers(kind, *place):
    """Where the pointers of an argument are: the number of the argument, and in a tuple that of the field."""
    if isinstance(kind, tuple):
        return [found for i, one in enumerate(kind) for found in pointers(one, *place, i)]
    return [place] if "*" in kind else []


def compile_one(kernel, signature, constants, attributes, options, capability):
    """What the compiler says of a kernel, and its instructions."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(io.StringIO()):
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        instructions, labels = disassembled(compiled.asm["sass"])
    log = heard.getvalue()
    numbers = {key: re.findall(pattern, log) for key, pattern in PATTERNS.items()}
    matrix = sorted({found for line in instructions for found in re.findall(r"[DHI]MMA\.\w+", line)})
    return {key: max((int(number) for number in found), default=None) for key, found in numbers.items()} | {
        "shared": compiled.metadata.shared,
        "instructions": len(instructions),
        "barriers": sum("BAR." in line for line in instructions),
        "matrix_instructions": matrix,
        "product_loop": shortest_loop(instructions, labels, "MMA") if matrix else None,
    }


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
}


def disassembled(sass):
    """The instructions of a kernel, without what pads it, and before which of them each label stands."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := re.fullmatch(r"(\.?L\w+):", line.strip()):
            labels[label.group(1)] = len(instructions)
        elif "\t" in line and "\tNOP" not in line:
            instructions.append(line.split("\t")[1])
    return instructions, labels


def shortest_loop(instructions, labels, word):
    """The instructions of the innermost loop that has this word in it, and how many of them have; None without one."""
    found = []
    for end, line in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(\.?L\w+)", line)
        start = labels.get(jump.group(1), len(instructions)) if jump else len(instructions)
        body = instructions[start : end + 1]
        if any(word in each for each in body):
            found.append((len(body), sum(word in each for each in body)))
    return min(found, default=None)


if __name__ == "__main__":
    main()
