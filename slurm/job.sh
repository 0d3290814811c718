# shellcheck shell=bash
# What the batch scripts share; they source it:
#
#   take_task ARGUMENTS...                                  # sets `arguments`
#   run_job SIGNAL "$PYTHON" -u train.py "${arguments[@]}"  # SIGNAL asks this command to end
#
# A script may define `progress`, which prints something that changes when the job gets further.

PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-3} # so many in a row may bring no progress; then the job gives up

# Torch would start a thread for every core of the machine where a site does not bind jobs to CPUs.
gpus=${SLURM_GPUS_ON_NODE:-1}
threads=$(((${SLURM_CPUS_PER_TASK:-1} + gpus - 1) / gpus))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

# SLURM_JOB_ID of an array's last task is the number of the array: scontrol would requeue all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
log=$(readlink "/proc/$$/fd/1")

say() {
    echo "$SLURM_JOB_NAME $job: $*"
}

refuse() {
    say "error: $*" >&2
    exit 2
}

# Which file the newest checkpoint of a training is.
progress() {
    local run
    run=$(grep -so 'run folder .*' "$log" | tail -n 1)
    stat -c 'checkpoint %i.%Y' "${run#run folder }/checkpoint/checkpoint.pth.tar" 2>/dev/null ||
        echo "no checkpoint"
}

# The words before the first flag are the list of a job array: its task i, counted from 0, has the
# i-th in the place of every {} of the other arguments.
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
    [[ ${SLURM_ARRAY_TASK_COUNT:-$((last + 1))} -eq $((last + 1)) ]] || refuse "--array has" \
        "$SLURM_ARRAY_TASK_COUNT tasks, the list ${#list[@]} words: ${list[*]}"
    [[ $task -le $last ]] || refuse "--array has task $task, the list only 0-$last: ${list[*]}"
    arguments=("${arguments[@]//"{}"/"${list[task]}"}")
}

# Run a command and end with its exit status. Slurm sends USR1 to this shell before the time limit:
# then the command is asked to end, and the job is requeued unless the command had finished.
run_job() {
    local signal=$1 child="" requeue="" status
    shift
    [[ -x $(command -v "$PYTHON") ]] || refuse "PYTHON=$PYTHON is no program, seen from $PWD"
    trap 'requeue=yes; [[ -z $child ]] || kill -"$signal" "$child" 2>/dev/null' USR1
    start "$@"
    # When Slurm ends a job it sends TERM to every process of it, so the command has had it too.
    # Whether the job is requeued is then up to Slurm: we would bring back what a user cancelled.
    trap 'requeue=no' TERM
    "$@" &
    child=$!
    [[ $requeue != yes ]] || kill -"$signal" "$child"
    while kill -0 "$child" 2>/dev/null; do # a trap ends `wait` before the command has ended
        wait "$child"
    done
    wait "$child"
    status=$?
    # For the grace time of a preemption Slurm stops the tasks of srun and does not tell this shell.
    [[ $status -ne 75 ]] || requeue=${requeue:-yes}
    if [[ $requeue == yes && $status -ne 0 ]]; then
        trap '' TERM # with which Slurm ends the job that it requeues
        say "stopped with exit status $status; to be requeued"
        scontrol requeue "$job" || say "was not requeued; submit it again, it continues" >&2
    fi
    exit "$status"
}

# Log a start with the progress it has found, or cancel the job after RESTARTS restarts in a row, by
# whomever, that all found the same.
start() {
    local found again=${SLURM_RESTART_COUNT:-0} same
    found="with [$(progress)]"
    same=$(grep -sF "$SLURM_JOB_NAME $job: start " "$log" | tail -n $((RESTARTS + 1)) |
        grep -cF "$found")
    if [[ $again -gt $RESTARTS && $same -gt $RESTARTS ]]; then
        say "error: gave up after $RESTARTS restarts without progress" >&2
        trap '' TERM
        scancel "$job" # a site may have Slurm requeue what fails; what is cancelled stays so
        exit 1
    fi
    say "start $((again + 1)) on ${SLURM_JOB_NODELIST:-$HOSTNAME} $found: $(printf '%q ' "$@")"
}
