#!/usr/bin/env bash
# What takes longer than gpu_check.sh has time for, on a GPU and in under ten minutes: memory that is read outside of what
# was allocated (memcheck) or before anything wrote it (initcheck), by every kernel; how long compression takes.
#
#     experiments/gpu_sanitise.sh [OUTPUT_FOLDER]
#
# It leaves gpu_sanitise.log and compress_time.json. compress_time.py needs torchvision and tqdm.
#
# PYTHON, DEVICE, BUDGET, LIMIT as in gpu_check.sh; on a CPU the kernels are run without the checkers.
# STEPS    which steps, by name (memcheck initcheck compress_time)
set -uo pipefail
steps=${STEPS:-memcheck initcheck compress_time}
. "$(dirname "$0")/common/gpu_steps.sh"

run=("$python" experiments/gpu_steps.py)
options=(--output "$output" --device "$device")
if [ "$device" = cpu ]; then
    options+=(--small)
    export TRITON_INTERPRET=1
fi

main() {
    local tool checker
    for tool in memcheck initcheck; do
        chosen "$tool" || continue
        checker=(compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all)
        [ "$device" = cpu ] && checker=()
        # Without PyTorch's cache every tensor is an allocation of its own, whose bounds and bytes the tools know.
        step 180 "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${checker[@]}" "${run[@]}" kernels "${options[@]}"
    done
    chosen compress_time && step 200 compress_time "${run[@]}" compress_time "${options[@]}"
    finish
}

main 2>&1 | tee "$output/gpu_sanitise.log"
exit "${PIPESTATUS[0]}"
