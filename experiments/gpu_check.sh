#!/usr/bin/env bash
# Everything that only a GPU can tell, in under ten minutes: the tests there, memory and race checks, the benchmark, a
# profile. A step that fails stops no other; the exit status is 1 if any failed. It installs nothing and changes nothing
# but the output folder.
#
#     experiments/gpu_check.sh [OUTPUT_FOLDER]
#
# PYTHON   the interpreter (python3)
# TESTS    what pytest runs (tests/kernels tests/test_linkage.py tests/test_points.py tests/test_algorithms.py)
# PRESETS  of bench_linkage.py (neurons vgg16 large)
# BUDGET   seconds for everything (570); what would begin later is not run and counts as failed
set -uo pipefail
output=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
cd "$(dirname "$0")/.." || exit
mkdir -p "$output" || exit

python=${PYTHON:-python3}
read -ra tests <<<"${TESTS:-tests/kernels tests/test_linkage.py tests/test_points.py tests/test_algorithms.py}"
read -ra presets <<<"${PRESETS:-neurons vgg16 large}"
bench=("$python" experiments/bench_linkage.py --results "$output/linkage.json")
budget=${BUDGET:-570}
failed=()

step() { # step SECONDS NAME COMMAND...: run a command with a time limit, and remember whether it failed
    local limit=$1 name=$2 start=$SECONDS left=$((budget - SECONDS)) status=0
    shift 2
    if ((left <= 0)); then
        failed+=("$name: not run, the time was used up")
        return
    fi
    ((limit > left)) && limit=$left
    printf '\n=== %s (at most %s s)\n' "$name" "$limit"
    timeout --kill-after=5 "$limit" "$@" || status=$?
    case $status in
        0) ;;
        124 | 137) failed+=("$name: stopped after $limit s") ;;
        *) failed+=("$name: exit status $status") ;;
    esac
    printf '=== %s: exit status %s after %s s\n' "$name" "$status" "$((SECONDS - start))"
}

versions() { # what is installed, and that this library and its device operations can be imported
    "$python" - <<'PYTHON'
import platform
from importlib import metadata

print("python", platform.python_version())
packages = "torch triton numpy scipy fastcluster scikit-learn matplotlib tyro tqdm pytest hypothesis"
for package in packages.split():
    try:
        print(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print(package, "is not installed")
import torch

import nac_gpu
import nac_gpu.kernels

print("nac_gpu", nac_gpu.__version__, "from", nac_gpu.__path__[0])
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
PYTHON
}
export -f versions
export python

# This checkout is what is checked, whatever is installed, and nothing is installed: a folder that looks as the package
# does once installed goes first on the path, and the current folder, which has no nac_gpu.kernels, does not (Python
# 3.11 and later).
site=$(mktemp -d) || exit
trap 'rm -rf "$site"' EXIT
mkdir "$site/nac_gpu" && ln -s "$PWD"/nac_gpu/{*.py,cli,report} "$site/nac_gpu/" && ln -s "$PWD/kernels" "$site/nac_gpu/kernels" || exit
export PYTHONPATH=$site:$PWD/experiments${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

# SciPy takes long at thousands of dimensions: what has taken two seconds is not run again.
declare -A limits=([neurons]=100 [vgg16]=60 [large]=100)
declare -A options=(
    [neurons]="--providers scipy fastcluster naive nac_gpu floor --seconds 2"
    [vgg16]="--providers scipy nac_gpu floor --seconds 2"
    [large]="--providers scipy fastcluster nac_gpu floor --seconds 4 --peer-limit 4096 --oracle-limit 2048"
)

sanitise() { # memory and races, on a few points
    if ! command -v compute-sanitizer >/dev/null; then
        printf '\n=== compute-sanitizer is not on PATH: memory and races are not checked\n'
        return
    fi
    local tool
    for tool in memcheck racecheck; do
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds memcheck knows.
        step 50 "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" experiments/bench_linkage.py --preset quick --providers scipy nac_gpu --repetitions 1 \
            --device cuda --results "$output/$tool.json" --again
        rm -f "$output/$tool.json" # times under a checker mean nothing
    done
}

main() {
    local preset more
    step 10 "nvidia-smi" nvidia-smi
    step 40 "versions" bash -c versions
    step 120 "tests" "$python" -m pytest "${tests[@]}" -q -p no:cacheprovider
    sanitise
    for preset in "${presets[@]}"; do
        read -ra more <<<"${options[$preset]:-}"
        step "${limits[$preset]:-60}" "benchmark $preset" "${bench[@]}" --again --preset "$preset" "${more[@]}"
    done
    step 20 "trace" "$python" experiments/bench_linkage.py --preset "${presets[0]}" --trace "$output/trace.json.gz"
    step 30 "plot" "$python" experiments/bench_linkage.py --plot "$output/linkage.json"

    printf '\n=== %s s in all\n' "$SECONDS"
    ((${#failed[@]})) || { echo "all steps passed" && return; }
    printf 'FAILED %s\n' "${failed[@]}"
    return 1
}

main 2>&1 | tee "$output/gpu_check.log"
exit "${PIPESTATUS[0]}"
