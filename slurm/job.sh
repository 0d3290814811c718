# shellcheck shell=bash
# What the batch scripts share. They source it; nobody submits it.
#
# They set PYTHON and RESTARTS and define `progress LOG`, which prints one word that changes when
# the program has got further. Then: take_task ARGUMENTS...; run_job SCRIPT "${arguments[@]}".
# `launcher` may hold words to start Python by, `stop` the signal that asks those for an end.

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID} # the last task's SLURM_JOB_ID would mean the whole array to scontrol
log=$(readlink "/proc/$$/fd/1")
state=slurm/logs/$SLURM_JOB_NAME-$job.restarts
launcher=()
stop=TERM

say() {
    echo "$SLURM_JOB_NAME $job: $*"
}

refuse() {
    say "error: $*" >&2
    exit 2
}

processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-}} # on a node; train.py has one for each GPU
[[ ${processes:-1} =~ ^[1-9][0-9]*$ ]] || refuse "PROCESSES=$processes is no number of processes"
# On its share of a node torch would start a thread for every core of the machine
threads=$((${SLURM_CPUS_PER_TASK:-1} / ${processes:-1}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# The `progress` of a training: which file its newest checkpoint is.
newest_checkpoint() {
    local run
    run=$(sed -n 's/.*run folder //p' "$1" | tail -n 1)
    stat -c %i.%Y "$run/checkpoint/checkpoint.pth.tar" 2>/dev/null || echo none
}

# The words before the first flag are the list of a job array: its task i, counted from 0, has the
# i-th in the place of every {} of the other arguments. Sets `arguments`.
take_task() {
    local list=() task=${SLURM_ARRAY_TASK_ID:-} last
    while [[ $# -gt 0 && $1 != -* ]]; do
        list+=("$1")
        shift
    done
    arguments=("$@")
    last=$((${#list[@]} - 1))
    if [[ -z $task ]]; then
        [[ $last -lt 0 ]] || refuse "the list '${list[*]}' needs sbatch --array=0-$last"
        return
    fi
    [[ $last -ge 0 && "$*" == *"{}"* ]] || refuse "an array needs a list before the first flag," \
        "and {} where each task takes its own of it: 1 2 3 --seed {}"
    [[ $task -le $last ]] || refuse "--array has task $task, the list only 0-$last: ${list[*]}"
    arguments=("${arguments[@]//"{}"/"${list[task]}"}")
}

# Run a script and hand the job's signals on to it. End with its exit status; requeue the job first
# if the time limit was near and the script has stopped for it.
run_job() {
    local child="" caught="" time_is_up="" status stuck=0 before=""
    local again=${SLURM_RESTART_COUNT:-0}
    [[ -x $(command -v "$PYTHON") ]] || refuse "PYTHON=$PYTHON is no program, seen from $PWD"
    trap 'caught=1 time_is_up=1; [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null' USR1
    trap 'caught=1; [[ -n $child ]] || exit 143; kill -"$stop" "$child" 2>/dev/null' TERM

    # `stuck` counts restarts in a row, by whomever, that found what the start before them found
    [[ $again -eq 0 || ! -f $state ]] || read -r stuck before <"$state"
    if [[ $again -gt 0 && $before == "$(progress "$log")" ]]; then
        stuck=$((stuck + 1))
    else
        stuck=0
    fi
    before=$(progress "$log")
    [[ $stuck -le $RESTARTS ]] || give_up
    echo "$stuck $before" >"$state"

    say "start $((again + 1)) on ${SLURM_JOB_NODELIST:-$HOSTNAME}: $PYTHON -u ${*@Q}"
    "${launcher[@]}" "$PYTHON" -u "$@" &
    child=$!
    [[ -z $time_is_up ]] || kill -USR1 "$child"
    caught=1
    while [[ -n $caught ]]; do # a trap ends `wait` before the child has ended
        caught=""
        wait "$child"
        status=$?
    done

    [[ $status -ne 0 ]] || rm -f "$state"
    if [[ -n $time_is_up && ($status -eq 75 || $status -eq $((128 + $(kill -l USR1)))) ]]; then
        [[ $stuck -lt $RESTARTS || $before != "$(progress "$log")" ]] || give_up
        trap '' TERM # with which Slurm ends the job that it requeues
        say "stopped for the time limit with exit status $status; to be requeued"
        scontrol requeue "$job" || say "was not requeued; submit it again, it continues" >&2
    fi
    exit "$status"
}

give_up() {
    say "error: gave up after $RESTARTS restarts without progress" >&2
    rm -f "$state"
    trap '' TERM
    scancel "$job" # a site may have Slurm requeue what fails; what is cancelled stays so
    exit 1
}
