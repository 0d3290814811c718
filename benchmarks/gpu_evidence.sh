#!/usr/bin/env bash
# What this project claims of a GPU, measured on one: tests, speed, and trained networks.
#
#   benchmarks/gpu_evidence.sh DATA_DIR    # holds cifar10, cifar100 and dtd, as for train.py
#   benchmarks/gpu_evidence.sh --smoke     # the same steps on digits, on a CPU, some 3 minutes
#
# A call ends after LIMIT seconds (540), since such machines are often lent for minutes, with exit
# status 75 while steps are left: the same command goes on, with a training from its checkpoint.
# Each step that is done has a record RESULTS/STEP.json (RESULTS is results/gpu) and is skipped;
# remove it to have it repeated. Tables and figures are in RESULTS/gpu_evidence, curves of the
# trainings in RESULTS/networks/*/1--*/log.jsonl. Exit status 0: all done; 1: a step failed.
#
# To go on elsewhere, where only files of at most 16 MB travel (a ResNet-18 in training has 92 MB):
#
#   tar -C results/gpu --exclude=features --exclude='checkpoint_*' --exclude='model_best*' -c . |
#       split -b 15M - state.                                              # there
#   mkdir -p results/gpu && cat state.* | tar -C results/gpu -x            # and on the next machine
set -u

if [ $# -ne 1 ] || { [ "$1" != --smoke ] && [ ! -d "$1" ]; }; then
    echo "gpu_evidence.sh: error: expected a folder of image sets or --smoke, not '$*'" >&2
    exit 2
fi
table=gpu_evidence seeds=3 results=results/gpu bench=() detection=()
where=(--data-dir "$(realpath -- "$1")" --no-download)
if [ "$1" = --smoke ]; then
    table=gpu_smoke seeds=1 results=results/gpu_smoke where=()
    bench=(--size 8 --batch-size 4 --steps 1 --repeats 1 --warmup 0)
    detection=(--rows 99 --dims 6 --scored 20 --sets 2 --repeats 1)
fi
results=$(realpath -m -- "${RESULTS:-$(dirname "$0")/../$results}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python} limit=${LIMIT:-540} failed=()
reproduce=("$python" reproduce.py "benchmarks/$table.yaml" --results-dir "$results" "${where[@]}")
mkdir -p "$results" || exit

# step NAME COMMAND...: run a command in what is left of the time, unless its record is there
step() {
    local name=$1 began=$SECONDS log=$results/$1.log status
    local record=$results/$name.json left=$((limit - began))
    shift
    [ -e "$record" ] && return
    [ "$left" -lt 30 ] && stop "$name"
    echo "== $name: $*"
    timeout --preserve-status --kill-after=30 "$left" "$@" | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) ;;
        75) stop "$name" ;;
        137 | 143) # cut off: the next call has more time, unless this one was all its own
            [ "$began" -gt 60 ] && stop "$name" ;;&
        *)
            echo "== $name failed with exit status $status" >&2
            failed+=("$name")
            return ;;
    esac
    [ -e "$record" ] && return # the benchmarks write it themselves
    "$python" -c 'import json, sys; print(json.dumps(dict(zip(sys.argv[1::2], sys.argv[2::2]))))' \
        command "$*" seconds_of_last_call $((SECONDS - began)) commit "$(git rev-parse HEAD)" \
        gpu "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null)" \
        output "$(tail -n 40 "$log")" >"$record.part" && mv "$record.part" "$record"
}

stop() {
    echo "== time is over before the end of $1; the same command goes on"
    exit 75
}

step tests "$python" -m pytest -q -m gpu
for arch in resnet18 resnet50; do
    step "bench_step_$arch" "$python" benchmarks/bench_step.py --arch "$arch" --fast --profile \
        --record "$results/bench_step_$arch.json" "${bench[@]}"
done
step bench_detection "$python" benchmarks/bench_detection.py \
    --record "$results/bench_detection.json" "${detection[@]}"

clusters=_m10
"$python" -c "import faiss" 2>/dev/null || clusters= # which k-means needs
for network in simclr18 supcon18 simclr50; do
    step "$network" "${reproduce[@]}" --seeds 1 \
        --only "$network" ${clusters:+"$network$clusters"} "${network}_k1" "${network}_k5"
done
step precision "${reproduce[@]}" --seeds "$seeds" --only fp32 fast
"${reproduce[@]}" --seeds "$seeds" --report || failed+=(table)

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
