#!/usr/bin/env bash
# Numbers, behaviour and times on a machine with a GPU, in one command, under 8 minutes and without a network.
#
#   benchmarks/gpu_check.sh [FOLDER]       default benchmarks/results/<date>-<device>
#   WHEEL='dist/bkind3d-*.whl' benchmarks/gpu_check.sh FOLDER
#
# FOLDER then holds info.txt (date, GPU, commit, versions), numerics.csv, checks.csv, training.csv, largest_volume.csv,
# times/ (see docs/benchmarks.md), a log of each stage, stages.csv and report.txt. A stage that fails or takes too long does not keep
# the next from running; the exit status is 1 if any did. On a GPU all but the times run side by side. From the
# environment:
#   WHEEL      a wheel of bkind3d to be tested, installed into FOLDER/venv; by default this tree is
#   DEVICE     cuda (default), or cpu to try the script itself on tiny sizes
#   PYTHON     python3 (default): an interpreter with torch, and triton where its kernels are wanted
#   DEADLINE   seconds for everything, 470 by default; BUDGET those for the times, 180
#   SANITIZERS tools of compute-sanitizer, "memcheck racecheck synccheck" by default; initcheck is another
#   COMMIT     of this tree, where there is no git to ask
#   ARGS       further arguments of python -m benchmarks
set -u
[ $# -gt 1 ] && { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
tree=$(realpath "$(dirname "$0")/..")
device=${DEVICE:-cuda} deadline=${DEADLINE:-470}
out=$(realpath -m "${1:-$tree/benchmarks/results/$(date -u +%F)-$device}")
python=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}: name another with PYTHON="; exit 2; }
read -ra tools <<< "${SANITIZERS:-memcheck racecheck synccheck}"
read -ra arguments <<< "${ARGS:-}"
COMMIT=$(git -C "$tree" rev-parse HEAD 2> /dev/null) || COMMIT=${COMMIT:-unknown}
export COMMIT
wheel=${WHEEL:+$(compgen -G "$WHEEL" | head -n 1)}
[ -n "${WHEEL:-}" ] && { wheel=$(realpath -e "$wheel") || exit 2; }
[ -e "$out/info.txt" ] && { echo "$out holds results already: choose another folder"; exit 2; }
mkdir -p "$out/work" || exit 2

# Compiled once for all stages but the times, which measure compilation.
export TRITON_CACHE_DIR=$out/work/triton TORCHINDUCTOR_CACHE_DIR=$out/work/inductor
export PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET

# One of two values, for CUDA and for the CPU; seconds left; the smaller number.
cap() { if [ "$device" = cuda ]; then echo "$1"; else echo "$2"; fi; }
left() { echo $((deadline - SECONDS)); }
least() { if [ "$1" -lt "$2" ]; then echo "$1"; else echo "$2"; fi; }

echo stage,outcome,seconds > "$out/stages.csv"
note() {  # NAME OUTCOME SECONDS
    echo "$1,$2,$3" >> "$out/stages.csv"
    echo "== $1: $2, $3 s"
}
failures() { awk -F, 'NR > 1 && $2 != "passed" && $2 !~ /^skipped/ { printf " %s", $1 }' "$out/stages.csv"; }
stage() {  # NAME SECONDS COMMAND...: run, show and keep the output
    local name=$1 seconds start=$SECONDS status
    seconds=$(least "$2" "$(left)")
    shift 2
    if [ "$seconds" -lt 5 ]; then
        note "$name" "not run: no time left" 0
        return
    fi
    echo "== $name"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) note "$name" passed $((SECONDS - start)) ;;
        124 | 137) note "$name" "stopped after $seconds s" $((SECONDS - start)) ;;
        *) note "$name" "failed with status $status" $((SECONDS - start)) ;;
    esac
}
# A stage in which no time counts: on a GPU beside the others; `wait` waits for them.
beside() { if [ "$device" = cuda ]; then stage "$@" & else stage "$@"; fi; }

packages() { echo "$out"/venv/lib/python3*/site-packages; }
install_wheel() {  # the wheel beside the packages of $python, whichever kind of environment that is
    "$python" -m venv --without-pip --system-site-packages "$out/venv" || return
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
        > "$(packages)/parent.pth" || return
    "$python" -m pip --python "$out/venv/bin/python" install --quiet --disable-pip-version-check --no-index --no-deps \
        --ignore-installed "$wheel" || return
    PYTHONPATH=$(packages) "$out/venv/bin/python" -c \
        'import sys, bkind3d_kernels; assert bkind3d_kernels.__file__.startswith(sys.prefix)'
}
export -f install_wheel packages
export out wheel python

# `python -m` puts the working folder first on its path: it holds the benchmarks, and the kernels only if the tree's are
# meant.
cd "$out/work" || exit 2
ln -s "$tree/benchmarks" benchmarks
base=$python
[ -n "$wheel" ] && stage install 60 bash -c install_wheel
if [ -n "$wheel" ] && [ -z "$(failures)" ]; then
    python=$out/venv/bin/python
    export PYTHONPATH=$(packages)${PYTHONPATH:+:$PYTHONPATH}  # before a tree that it may name
else
    [ -n "$wheel" ] && echo "The wheel cannot be tested: this tree is."
    wheel=
    ln -s "$tree/bkind3d_kernels" bkind3d_kernels
fi

information() {
    echo "date     $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "commit   $COMMIT$(git -C "$tree" diff --quiet HEAD 2> /dev/null || echo ', perhaps with changes')"
    echo "tested   ${wheel:-$tree}"
    command -v nvidia-smi > /dev/null \
        && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
    "$python" -c 'from importlib import metadata as m; print(*(f"{d.name} {d.version}" for d in m.distributions()
        if d.name in ("torch", "triton", "numpy", "bkind3d")), sep="\n")'
    "$python" -m bkind3d_kernels.info
}
export -f information
export tree
stage info 60 bash -c information
cp "$out/info.log" "$out/info.txt"

numerics=$(cap 110 30) checks=$(cap 120 60)
beside numerics "$numerics" "$python" -m benchmarks.numerics --device "$device" --seconds $((numerics - 10)) \
    --out "$out/numerics.csv" $(cap "" "--dtype float32")
beside checks "$checks" "$python" -m benchmarks.device_checks --device "$device" --seconds $((checks - 10)) \
    --out "$out/checks.csv"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
if [ "$device" = cpu ]; then
    stage sanitizer-cases 30 "$python" -m benchmarks.sanitizer_cases --seconds 1
elif [ -z "$sanitizer" ]; then
    note sanitizer "skipped: compute-sanitizer is absent" 0
else
    for tool in "${tools[@]}"; do
        # Without the caching allocator each tensor is an allocation of its own, whose end the tool knows. No scene
        # begins in the last 25 seconds, which are for importing torch and for the scene that runs.
        beside "$tool" "$checks" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
            --error-exitcode 99 --target-processes application-only \
            "$python" -m benchmarks.sanitizer_cases --device cuda --seconds $((checks - 25))
    done
fi
wait

# Steps of training need the packages of the extra `train` beside torch.
training=$(cap 150 60)
[ -z "$wheel" ] && ln -s "$tree/bkind3d" bkind3d
lacks=$("$python" -c "import bkind3d.losses, bkind3d.models.methods" 2>&1)
if [[ $lacks == *ModuleNotFoundError* ]]; then
    note training "skipped: ${lacks##*Error: }" 0
else
    stage training "$training" "$python" -m benchmarks.training --device "$device" --seconds $((training - 20)) \
        --out "$out/training.csv" $(cap "" "--tiny")
fi

# The times leave a minute for what follows, and 25 seconds to start and to draw.
budget=$(least "${BUDGET:-180}" $(($(left) - 85)))
[ "$device" = cpu ] && arguments=(--quick --rounds 3 "${arguments[@]}")
stage times $((budget + 25)) env -u TRITON_CACHE_DIR -u TORCHINDUCTOR_CACHE_DIR "$python" -m benchmarks \
    --device "$device" --budget-seconds "$budget" --out "$out/times" "${arguments[@]}"

volume=$(cap 45 2)
stage largest-volume $((volume + 15)) "$python" -m benchmarks.largest_volume --device "$device" \
    --seconds "$volume" --out "$out/largest_volume.csv" $(cap "" "--memory-limit-gb 0.1")

cd "$tree" || exit 2
rm -rf "$out/work" "$out/venv"
echo
echo "== results in $out"
"$base" -m benchmarks.gpu_report "$out" | tee "$out/report.txt"
if [ -n "$(failures)" ]; then
    echo "FAILED:$(failures)"
    exit 1
fi
echo "all stages passed"
