# What gpu_check.sh and gpu_sanitise.sh share: steps with limits, and a path on which this checkout comes first.
# Sourced with `steps` set and the script's own argument; goes to the root of the checkout.

output=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
cd "$(dirname "$0")/.." || exit
mkdir -p "$output" || exit

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
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
    ((${LIMIT:-0} > 0 && limit > LIMIT)) && limit=$LIMIT
    printf '\n=== %s (at most %s s)\n' "$name" "$limit"
    # An interrupt first: Python then says how far it came. What does not end by itself within 5 s is killed.
    timeout --signal=INT --kill-after=5 "$limit" "$@" || status=$?
    case $status in
        0) ;;
        124 | 137) failed+=("$name: stopped after $limit s") ;;
        *) failed+=("$name: exit status $status") ;;
    esac
    printf '=== %s: exit status %s after %s s\n' "$name" "$status" "$((SECONDS - start))"
}

chosen() { # chosen NAME: whether this step is to be run
    [[ " $steps " == *" $1 "* ]]
}

finish() { # say what failed; the exit status
    printf '\n=== %s s in all\n' "$SECONDS"
    ((${#failed[@]})) || { echo "all steps passed" && return; }
    printf 'FAILED %s\n' "${failed[@]}"
    return 1
}

# This checkout is what is checked, whatever is installed, and nothing is installed: a folder that looks as the package
# does once installed goes first on the path, with what wheels/ holds (an ignored folder, for packages that a machine
# without a network lacks), and the current folder, which has no nac_gpu.kernels, does not (Python 3.11 and later).
site=$(mktemp -d) || exit
trap 'rm -rf "$site"' EXIT
mkdir "$site/nac_gpu" && ln -s "$PWD"/nac_gpu/[!_]* "$PWD/nac_gpu/__init__.py" "$site/nac_gpu/" && ln -s "$PWD/kernels" "$site/nac_gpu/kernels" || exit
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] && { "$python" -m zipfile -e "$wheel" "$site" || echo "$wheel was not unpacked"; }
done
export PYTHONPATH=$site:$PWD/experiments${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
