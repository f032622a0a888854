# shellcheck shell=bash
# Sourced by the scripts of the stages: pre-flight, the run, requeue, one line of summary. Those in slurm/ set `root`, the
# source tree; those that `ovr slurm` writes set `interpreter`, and `root` only where the package is not installed.
# docs/slurm.md describes the OVR_* variables.

readonly EXIT_USER=2 EXIT_STOPPED=75 # as the stages leave: a user's mistake; stopped early, to be continued

scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"

say() { echo "$(date +%FT%T) $*"; }

in_slurm() { [ -n "${SLURM_JOB_ID:-}" ]; }

# Prints the value of key $1 among the arguments, the last one as Hydra takes it.
value_of() {
    local key="$1" argument value=""
    shift
    for argument; do
        case "$argument" in "$key="*) value="${argument#*=}" ;; esac
    done
    echo "$value"
}

# Sets `arguments`: the user's, with what environment variables say of paths.
read_arguments() {
    arguments=("$@")
    add_path run.dir "${OVR_RUN:-}"
    add_path model.path "${OVR_MODEL:-}"
    if [ -f "${OVR_DATA:-}/tokens.bin" ]; then # a tokenised set
        add_path data.tokenised "$OVR_DATA"
    elif [ -n "${OVR_DATA:-}" ]; then
        add_path data.sources "[{path: '${OVR_DATA//\'/\\\'}'}]" # in Hydra's quotes a quote is escaped
    fi
    run="$(value_of run.dir "${arguments[@]}")"
    if [ -z "$run" ]; then
        echo "No run folder: give run.dir=DIR as an argument or OVR_RUN=DIR, on a file system that all nodes share." >&2
        exit $EXIT_USER
    fi
}

add_path() {
    [ -z "$2" ] || [ -n "$(value_of "$1" "${arguments[@]}")" ] || arguments+=("$1=$2")
}

# Sets `mode`: what the run is to leave behind, checkpoints (train) or something else.
read_mode() {
    local argument
    mode=train
    for argument in "${arguments[@]}"; do
        case "$argument" in --rehearse | --rollout-only | --dry-run | only=rehearsal | only=rollout) mode=other ;; esac
    done
}

# Sets OVR_LIMIT_S, the seconds until the job's time limit (empty: it has none), and OVR_WARNING_S, how long before it
# the ranks are told to save and leave. The pre-flight compares both with the plan.
read_limit() {
    export OVR_WARNING_S="${OVR_WARNING_S:-1800}" OVR_LIMIT_S=""
    in_slurm || return 0
    local end
    end="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p')"
    [ -n "$end" ] || return 0
    OVR_LIMIT_S=$(($(date -d "$end" +%s) - $(date +%s)))
    if [ "$OVR_LIMIT_S" -le "$OVR_WARNING_S" ]; then
        echo "The job ends in $OVR_LIMIT_S s and would be told to stop $OVR_WARNING_S s before that: submit it with a" \
            "longer --time, or with a shorter warning (OVR_WARNING_S=300 and --signal=B:USR1@300)." >&2
        exit $EXIT_USER
    fi
}

# Warns this script OVR_WARNING_S before the job's end, as --signal of the script does, whatever sbatch was told; sets
# `timer`.
warn_in_time() {
    timer=""
    [ -n "$OVR_LIMIT_S" ] || return 0
    { sleep $((OVR_LIMIT_S - OVR_WARNING_S)) && kill -USR1 $$; } 2>/dev/null &
    timer=$!
}

# Sets `python`, `launcher` and what the ranks find their way by.
find_launcher() {
    python="${OVR_PYTHON:-${interpreter:-${root:-}/.venv/bin/python}}"
    export OVR_STAGE="$stage" PYTHONUNBUFFERED=1
    [ -z "${root:-}" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    if in_slurm; then
        attempt="${SLURM_RESTART_COUNT:-0}" job="$SLURM_JOB_ID"
        export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
        export MASTER_PORT="${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 20000))}"
        unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of a shell that the job was submitted from; srun's count
        # When one rank has left, the others get a minute, for their stacks or their last words.
        launcher=(srun --kill-on-bad-exit=0 --wait="${OVR_WAIT_S:-60}" --cpu-bind=none)
        if [ -n "${OVR_CONTAINER:-}" ]; then
            local code="${root:-$scripts}" # an image has the package itself, unless it comes from a source tree
            python="${OVR_PYTHON:-python3}"
            launcher+=(--container-image="$OVR_CONTAINER" --container-workdir="$PWD"
                --container-mounts="$code:$code,$PWD:$PWD,$run:$run${OVR_MOUNTS:+,$OVR_MOUNTS}")
        fi
    else
        attempt=0 job="local-$(date +%Y%m%dT%H%M%S)"
        local ranks="${OVR_RANKS:-$(nvidia-smi -L 2>/dev/null | wc -l)}"
        # In a session of its own: Ctrl-C comes to us, not to torchrun, which would kill the ranks after 30 s.
        launcher=(setsid "$python" -m torch.distributed.run --standalone
            --nproc-per-node "$((ranks > 0 ? ranks : 1))" --no-python)
    fi
}

# Runs a command on all ranks, with logs of the name $1, while signals are heard; sets `status`.
run_ranks() {
    local log="$logs/$1" code="$logs/.status"
    shift
    rm -f "$code"
    local command=("${launcher[@]}" bash "$scripts/rank.sh" "$log" "$@")
    {
        status=0
        if in_slurm; then
            "${command[@]}" 2> >(tee -a "$logs/launcher.log" >&2) || status=$?
        else # torchrun's account of a failure stays in its log
            "${command[@]}" 2>>"$logs/launcher.log" || status=$?
        fi
        echo "$status" >"$code"
    } &
    ranks_pid=$!
    while kill -0 "$ranks_pid" 2>/dev/null; do wait "$ranks_pid" || true; done
    ranks_pid="" status=137 # killed, unless it says otherwise
    [ ! -e "$code" ] || status="$(cat "$code")"
    in_slurm || [ "$status" = 0 ] || status="$(first_failure)"
}

# Shows the sentences, each once, that ranks other than the first left behind in their logs of the name $1.
show_errors() {
    find "$logs" -name "$1_*.log" ! -name "$1_000.log" -exec grep -hE '^(error|hang|preflight): ' {} + |
        sort -u | head -n 5 || true
}

# Prints the exit status of the rank that left first, which torchrun only mentions.
first_failure() {
    tac "$logs/launcher.log" | sed -n '1,/Root Cause/ s/^ *exitcode *: *\(-\{0,1\}[0-9]*\).*/\1/p' | grep . || echo "$status"
}

# Asks the ranks to save and leave: Slurm's warning, or Ctrl-C.
ask_to_stop() {
    say "told to stop: the ranks finish their step, save and leave"
    stopping=1
    [ -n "${ranks_pid:-}" ] || return 0
    if in_slurm; then
        scancel --signal=TERM "$SLURM_JOB_ID" || true # to the steps, not to this shell
    else
        local torchrun
        torchrun="$(pgrep -P "$ranks_pid" || true)"
        [ -z "$torchrun" ] || pkill -TERM -P "$torchrun" || true
    fi
}

# Prints the number of the newest checkpoint with a manifest, 0 if there is none.
steps_done() {
    local manifest newest=0
    for manifest in "$run"/checkpoints/step_*/manifest.json; do
        [ ! -e "$manifest" ] || { newest="${manifest%/*}" newest="${newest##*_}"; }
    done
    echo $((10#$newest))
}

# Prints the number of steps or iterations that the run is to have, 0 before its configuration was written.
steps_wanted() {
    [ -e "$run/config.yaml" ] || { echo 0 && return; }
    awk '/^(steps|iterations):/ { print $2 }' "$run/config.yaml"
}

# Names what became of the ranks, from `status` and the run's folder.
outcome() {
    if [ "$status" = 0 ] && [ "$trained" = 1 ] &&
        { [ "$mode" = other ] || [ "$(steps_done)" -ge "$(steps_wanted)" ]; }; then
        echo finished
    elif [ "$status" = $EXIT_USER ]; then
        echo refused
    elif [ "$status" = $EXIT_STOPPED ] || [ "$status" = 0 ] || [ "$stopping" = 1 ]; then
        echo stopped
    else
        echo failed
    fi
}

# Puts the job back into the queue unless it was cancelled, or has failed too often without a new checkpoint between.
requeue() {
    local failures=0 counter="$run/logs/$job/failures"
    if [ "$1" = failed ]; then
        [ "$(steps_done)" -gt "$steps_before" ] || failures="$(cat "$counter" 2>/dev/null || echo 0)"
        failures=$((failures + 1))
        if [ "$failures" -gt "${OVR_MAX_FAILURES:-3}" ]; then
            say "not requeued: $failures failures without a checkpoint between them; see $logs"
            return 1
        fi
    fi
    echo "$failures" >"$counter"
    scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING' || return 1
    scontrol requeue "$SLURM_JOB_ID" && return
    say "Slurm does not requeue this job; submit the same command again to continue"
    return 1
}

# Prints the one line of summary, which RUN/logs/jobs.log keeps for all jobs of the run.
summarise() {
    local last line
    last="$(steps_done)"
    line="summary: job=$job state=$1 status=$status steps=$last/$(steps_wanted) seconds=$SECONDS"
    line+=" requeues=$attempt checkpoint=$([ "$last" = 0 ] || printf '%s/checkpoints/step_%06d' "$run" "$last")"
    say "$line" | tee -a "$run/logs/jobs.log"
}

# The whole life of a job: launch_stage STAGE RECIPE [key=value ...].
launch_stage() {
    stage="$1"
    local recipe="${OVR_RECIPE:-$2}" state
    shift 2
    read_arguments "$@"
    read_mode
    read_limit
    find_launcher
    logs="$run/logs/$job/attempt_$attempt"
    mkdir -p "$logs"
    stopping=0 trained=0 steps_before="$(steps_done)"
    trap ask_to_stop USR1 INT
    if in_slurm; then
        trap 'stopping=1' TERM # Slurm has sent it to the ranks too
    else
        trap ask_to_stop TERM
    fi
    warn_in_time
    say "job $job, attempt $attempt: $stage on ${SLURM_JOB_NODELIST:-this machine}, run $run, logs $logs"

    run_ranks preflight timeout "${OVR_PREFLIGHT_S:-300}" "$python" -m ovr_megatron preflight \
        "$stage" --config-name "$recipe" "${arguments[@]}"
    [ "$status" != 124 ] || say "the pre-flight did not end in ${OVR_PREFLIGHT_S:-300} s: see $logs/preflight_*.log"
    [ "$status" = 0 ] || show_errors preflight
    if [ "$status" = 0 ] && [ "$stopping" = 0 ]; then
        trained=1
        run_ranks rank "$python" -m "ovr_megatron.$stage" --config-name "$recipe" "${arguments[@]}"
        [ "$status" = 0 ] || show_errors rank
    fi
    [ -z "$timer" ] || { pkill -P "$timer" || true; }
    trap '' USR1 INT TERM # what is left takes a moment
    state="$(outcome)"
    case "$state" in
        finished) summarise finished ;;
        refused) summarise refused && exit $EXIT_USER ;;
        *)
            if in_slurm && requeue "$state"; then
                summarise "$state,requeued"
            else
                summarise "$state" && exit "$([ "$state" = stopped ] && echo $EXIT_STOPPED || echo 1)"
            fi
            ;;
    esac
}
