# What the launchers share; sourced by them, not run.
# shellcheck shell=bash

# Set the array `nemotron` to the command that starts the program.
read -r -a nemotron <<<"${NEMOTRON:-python -m nemotron}"

say() { echo "launch: $*" >&2; }

# await PID: wait for it through signals; its exit code is then in $code. A trap sets signaled=1.
await() {
    while :; do
        signaled=0
        wait "$1" && code=0 || code=$?
        [ "$signaled" -eq 1 ] || return 0
    done
}

# split_arguments ARGUMENT...: those of the form key=value go to `overrides`, too.
split_arguments() {
    overrides=()
    local argument
    for argument; do
        case $argument in
            -*) ;;
            *=*) overrides+=("$argument") ;;
        esac
    done
}

# run_folder TEXT: the folder that `nemotron recipe check` named in its answer.
run_folder() {
    local folder=${1##*it creates the run }
    [ "$folder" != "$1" ] || { say "no run folder in the answer of recipe check: $1"; return 1; }
    echo "$folder"
}

# stamp RUN: distinguishes one status.json from the next, for each replaces the file.
stamp() { stat -c '%i %y' "$1/status.json" 2>/dev/null || echo none; }

# field RUN NAME: a value of the run's status.json, or nothing.
field() { sed -nE "s/.*\"$2\": *\"?([a-z0-9]+).*/\1/p" "$1/status.json" 2>/dev/null || true; }

# is_out_of_time RUN: whether the recipe's limit of time stopped the run.
is_out_of_time() { grep -qs '"reason": "stop.after_minutes' "$1/status.json"; }

# verdict RUN STAMP START WORLD: how a start ended: 0 done, 1 died, 2 user's mistake, 75 stopped.
# STAMP is that of status.json before the start, START the folder of exit codes of the ranks.
verdict() {
    local state=none
    [ "$(stamp "$1")" = "$2" ] || state=$(field "$1" state)
    if [ "$state" = done ] || [ "$(cat "$3"/rank-*.exit 2>/dev/null | grep -cx 0)" = "$4" ]; then
        echo 0
    elif [ "$state" = stopped ]; then
        echo 75
    elif [ "$state" = failed ] && [ "$(field "$1" exit_code)" = 2 ] ||
        grep -qsx 2 "$3"/rank-*.exit; then
        echo 2
    else
        echo 1
    fi
}

# explain START WORLD: say which rank ended first, and the last it wrote; who left nothing.
explain() {
    local file rank first="" silent=()
    for file in $(cd "$1" && ls -tr -- *.exit 2>/dev/null); do
        case $(cat "$1/$file") in
            0 | 75) ;;
            *) [ -n "$first" ] || first=$file ;;
        esac
    done
    for ((rank = 0; rank < $2; rank++)); do
        [ -e "$1/rank-$rank.exit" ] || silent+=("$rank")
    done
    if [ ${#silent[@]} -gt 0 ]; then
        say "no exit code from ${#silent[@]} of $2 ranks (killed, or their machine was lost):" \
            "${silent[*]:0:16}"
    fi
    [ -n "$first" ] || return 0
    rank=${first#rank-}
    rank=${rank%.exit}
    say "rank $rank ended first, with exit code $(cat "$1/$first") (128 + n: signal n)"
    if [ -s "$1/rank-$rank.log" ]; then
        say "the last lines of $1/rank-$rank.log:"
        tail -n 20 "$1/rank-$rank.log" >&2
    fi
}

# ready START WORLD: whether every rank can take a signal, or has ended.
ready() {
    local files
    files=$(find "$1" -name 'rank-*.pid' -o -name 'rank-*.exit' | wc -l)
    [ "$files" -ge "$2" ]
}
