#!/usr/bin/env bash
# Train on one machine with several processes.
set -euo pipefail
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$launch/supervise.sh"

usage() {
    cat <<'END'
launch/torchrun.sh [-n PROCESSES] [--restarts K] [--dry-run] RECIPE [KEY=VALUE ...] [OPTION ...]

  -n PROCESSES   default: one per GPU; without a GPU, 1
  --restarts K   restart a run that died, from its checkpoint, at most K times (default 0)
  --dry-run      check and print what would run; write nothing

Everything after RECIPE is passed to `nemotron train`. On Ctrl-C, SIGTERM or SIGUSR1 the run
finishes its step, saves and stops; on a second Ctrl-C it exits at once. Exit codes: 0 done, 1 failed,
2 user's mistake, 75 stopped (--resume continues it), 130 exited at once.
END
}

mistake() {
    say "$1 See $0 --help."
    exit 2
}

count() { [[ $2 =~ ^[0-9]+$ ]] || mistake "$1 $2: not a number."; }

count_gpus() {
    local gpus=()
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | grep '^GPU ')
    fi
    echo "${#gpus[@]}"
}

processes="" restarts=0 dry_run=0
while [ $# -gt 0 ]; do
    case $1 in
        -n | --restarts)
            [ $# -gt 1 ] || mistake "$1 needs a number."
            count "$1" "$2"
            if [ "$1" = -n ]; then processes=$2; else restarts=$2; fi
            shift 2
            ;;
        --dry-run) dry_run=1 && shift ;;
        -h | --help) usage && exit 0 ;;
        -*) mistake "$1 is unknown before RECIPE." ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2 && exit 2; }
recipe=$1
shift
arguments=("$@")
split_arguments "$@"
resume=""
for argument; do
    case $argument in
        --dry-run) dry_run=1 ;;
        --resume) resume=given ;;
    esac
done

[ "${processes:-1}" -gt 0 ] || mistake "-n is 0; give 1 or more."
processes=${processes:-$(count_gpus)}
[ "$processes" -gt 0 ] || processes=1
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# if torchrun itself is asked to end, its ranks get this long to save
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

if [ "$dry_run" -eq 1 ]; then
    # one process says it for all; nothing connects to anything
    export RANK=0 LOCAL_RANK=0 WORLD_SIZE="$processes"
    exec "${nemotron[@]}" train "$recipe" "${arguments[@]}" --dry-run
fi

checked=$("${nemotron[@]}" recipe check "$recipe" "${overrides[@]}") || exit $?
run=$(run_folder "$checked")
read -r -a torchrun <<<"${TORCHRUN:-python -P -m torch.distributed.run}"

stopping="" leaving=0 resender=""

signal_ranks() {
    local file
    for file in "$START_DIR"/rank-*.pid; do
        [ ! -e "$file" ] || kill -s "$1" "$(cat "$file")" 2>/dev/null || true
    done
}

# The ranks get the signal, not torchrun: it would kill them after a while, or die of it.
stop() {
    signaled=1
    if [ "$1" = INT ] && [ -n "$stopping" ]; then
        leaving=1
        signal_ranks INT
        return
    fi
    stopping=$1
    [ -n "${START_DIR:-}" ] || return 0
    say "SIG$1: the ranks finish their step and save"
    signal_ranks USR1
    [ -n "$resender" ] || repeat
}

# A rank that was still starting has not heard it.
repeat() {
    (
        trap - INT TERM USR1 HUP
        while sleep 10 && kill -0 $$ 2>/dev/null; do signal_ranks USR1; done
    ) >/dev/null 2>&1 &
    resender=$!
}

trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop USR1' USR1
trap 'stop HUP' HUP

logs="${LOG_DIR:-$run.logs}"
attempt=0
while :; do
    before=$(stamp "$run")
    START_DIR="$logs/$(date +%Y%m%dT%H%M%S)-$$-$attempt"
    mkdir -p "$START_DIR"
    export START_DIR
    [ -z "$stopping" ] || repeat
    set -m # a process group of its own: Ctrl-C reaches this script only
    "${torchrun[@]}" --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" \
        --no-python "$launch/rank.sh" "${nemotron[@]}" train "$recipe" "${arguments[@]}" </dev/null &
    launched=$!
    set +m
    await "$launched"
    if [ -n "$resender" ]; then
        kill "$resender" 2>/dev/null || true
    fi
    result=$(verdict "$run" "$before" "$START_DIR" "$processes")
    [ "$result" -ne 1 ] || explain "$START_DIR" "$processes"
    if [ "$result" -eq 2 ]; then
        explain "$START_DIR" "$processes"
        rm -r "$START_DIR" # nothing began, so nothing stays
        rmdir -p -- "$logs" 2>/dev/null || true
    fi
    [ "$leaving" -eq 0 ] || exit 130
    if [ "$result" -ne 1 ] || [ -n "$stopping" ] || [ "$attempt" -ge "$restarts" ]; then
        exit "$result"
    fi
    attempt=$((attempt + 1))
    say "the run died; restart $attempt of $restarts"
    [ -n "$resume" ] || arguments+=(--resume)
    resume=given
done
