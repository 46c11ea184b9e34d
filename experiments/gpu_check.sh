#!/usr/bin/env bash
# Everything that only a GPU can tell, in under ten minutes, the most important first: whether each kernel is right, where
# the time goes, the benchmarks, the tests, whole compressions, large problems. Each step is a process of its own with a
# limit of its own, what it found is written as it goes, and one that fails or hangs stops no other; the exit status is 1
# if any did. It needs torch, triton, numpy, scipy and pytest, installs nothing, and changes nothing but the output folder.
#
#     experiments/gpu_check.sh [OUTPUT_FOLDER]
#
# It leaves gpu_check.log (everything that was said), gpu_check.json (every check), linkage_cuda.json (the benchmarks).
#
# PYTHON   the interpreter (python3)
# DEVICE   cuda; cpu rehearses all steps with interpreted kernels at tiny sizes
# BUDGET   seconds for everything (570); what would begin later is not run and counts as failed
# LIMIT    seconds for any one step (each has its own)
# STEPS    which steps, by name (all)
set -uo pipefail
steps=${STEPS:-machine smoke times neurons vgg16 tests compress default large}
. "$(dirname "$0")/common/gpu_steps.sh"

run=("$python" experiments/gpu_steps.py)
options=(--output "$output" --device "$device")
tests=(tests/kernels tests/clustering/test_linkage.py tests/clustering/test_points.py tests/clustering/test_algorithms.py)
if [ "$device" = cpu ]; then
    options+=(--small)
    tests=(tests/kernels/test_packing.py)
    export TRITON_INTERPRET=1
fi

main() {
    chosen machine && step 20 machine bash -c 'nvidia-smi; command -v compute-sanitizer ncu; "$0" -c "
import platform, importlib.metadata as m
print(platform.python_version(), *sorted(f\"{d.name}=={d.version}\" for d in m.distributions()))"' "$python"
    chosen smoke && step 150 smoke "${run[@]}" smoke "${options[@]}"
    chosen times && step 70 times "${run[@]}" times "${options[@]}"
    chosen neurons && step 80 neurons "${run[@]}" bench --preset neurons "${options[@]}"
    chosen vgg16 && step 50 vgg16 "${run[@]}" bench --preset vgg16 "${options[@]}"
    # What compiles ahead of time needs no GPU.
    chosen tests && step 100 tests "$python" -m pytest "${tests[@]}" -q -p no:cacheprovider --continue-on-collection-errors \
        --ignore=tests/kernels/test_compile.py --ignore=tests/kernels/test_launch.py
    chosen compress && step 100 compress "${run[@]}" compress "${options[@]}"
    chosen default && step 140 default "${run[@]}" default "${options[@]}"
    chosen large && step 120 large "${run[@]}" bench --preset large "${options[@]}"
    finish
}

main 2>&1 | tee "$output/gpu_check.log"
exit "${PIPESTATUS[0]}"
