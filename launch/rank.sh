#!/usr/bin/env bash
# One rank of a start: rank.sh COMMAND [ARGUMENT ...]; started by torchrun or srun, not by hand.
#
# It gives the rank its numbers, keeps output and exit code in START_DIR, and hands signals on:
# SLURM and torchrun signal only the process that they started.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/supervise.sh"

export RANK="${RANK:-${SLURM_PROCID:?neither RANK nor SLURM_PROCID is set}}"
export LOCAL_RANK="${LOCAL_RANK:-${SLURM_LOCALID:?neither LOCAL_RANK nor SLURM_LOCALID is set}}"
export WORLD_SIZE="${WORLD_SIZE:-${SLURM_NTASKS:?neither WORLD_SIZE nor SLURM_NTASKS is set}}"

# layers of unequal size leave gaps that blocks of fixed size could not fill
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

place=${START_DIR:+$START_DIR/rank-$RANK}
if [ -n "$place" ] && [ "$RANK" -ne 0 ]; then
    exec >>"$place.log" 2>&1
fi

child=""
# shellcheck disable=SC2329
hand_on() {
    signaled=1
    kill -s "$1" "$child" 2>/dev/null || true
}

# A warning that comes while the program starts must not kill it; the launcher repeats warnings.
trap '' USR1
"$@" &
child=$!
for name in USR1 TERM INT HUP; do
    # shellcheck disable=SC2064
    trap "hand_on $name" "$name"
done
[ -z "$place" ] || echo $$ >"$place.pid"
await "$child"
if [ -n "$place" ]; then
    echo "$code" >"$place.exit"
    rm -f "$place.pid"
fi
# srun and torchrun kill the other ranks when one fails; a stop is not a failure
[ "$code" -ne 75 ] || code=0
exit "$code"
