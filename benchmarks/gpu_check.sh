#!/usr/bin/env bash
# Numbers and times on a machine with a GPU, in one command and under 8 minutes; it needs no network.
#
#   benchmarks/gpu_check.sh [FOLDER]        default benchmarks/results/gpu
#
# FOLDER then holds info.txt, numerics.csv, numerics.log, times/ (see docs/benchmarks.md) and times.log. A stage that
# fails does not keep the next from running; the exit status is 1 if any did. From the environment:
#   DEVICE   cuda (default), or cpu to try the script itself on tiny sizes
#   PYTHON   python3 (default): an interpreter with torch, and triton where its kernels are wanted
#   BUDGET   seconds for the times, 270 by default
#   ARGS     further arguments of python -m benchmarks
set -u
[ $# -gt 1 ] && { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
cd "$(dirname "$0")/.." || exit 2
device=${DEVICE:-cuda} python=${PYTHON:-python3} budget=${BUDGET:-270}
read -ra arguments <<< "${ARGS:-}"
[ "$device" = cpu ] && arguments+=(--quick)
[ -e "$out/info.txt" ] && { echo "$out holds results already: choose another folder"; exit 2; }
mkdir -p "$out" || exit 2
"$python" -c "import torch" || { echo "$python has no torch: name another with PYTHON="; exit 2; }

failed=()
stage() {  # NAME SECONDS COMMAND...: run, show and keep the output; remember a failure
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: status $status, $((SECONDS - start)) s"
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

{
    date -u +%Y-%m-%dT%H:%M:%SZ
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    "$python" -m bkind3d_kernels.info
} > "$out/info.txt" 2>&1 || failed+=(info)
cat "$out/info.txt"
stage numerics 120 "$python" -m benchmarks.numerics --device "$device" --out "$out/numerics.csv"
stage times $((budget + 60)) "$python" -m benchmarks --device "$device" --budget-seconds "$budget" \
    --out "$out/times" ${arguments[@]+"${arguments[@]}"}

echo
echo "== results in $out"
"$python" - "$out" <<'PYTHON'
import csv
import sys
from pathlib import Path

out = Path(sys.argv[1])
if (out / "numerics.csv").exists():
    rows = list(csv.DictReader((out / "numerics.csv").open()))
    print(f"numerics: {sum(row['status'] == 'passed' for row in rows)} of {len(rows)} passed")
if (out / "times" / "results.csv").exists():
    print(f"{'operation':<17}{'workload':<15}{'competitor':<11}{'forward':>11}{'both':>11}  x reference")
    rows = [row for row in csv.DictReader((out / "times" / "results.csv").open())]
    for row in rows:
        if row["mode"] != "both":
            continue
        same = [r for r in rows if all(r[k] == row[k] for k in ("op", "workload", "variant", "competitor"))]
        forward = next(r for r in same if r["mode"] == "forward")
        cells = [f"{1e3 * float(r['median_s']):.3g} ms" if r["median_s"] else r["status"] for r in (forward, row)]
        print(f"{row['op']:<17}{row['workload']:<15}{row['competitor']:<11}{cells[0]:>11}{cells[1]:>11}"
              f"  {row['ratio_to_reference'] or row['reason'][:60]}")
PYTHON
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all stages passed"
