#!/bin/sh
# Everything that needs a GPU, in one call:
#
#     gpu_check.sh [PYTHON] [--wheels DIR] [--out DIR] [--stages a,b] [--seconds S] [--tiny]
#
# PYTHON is python3 by default. With --wheels, packages that it lacks come from a folder that
# tools/gpu/wheels.sh filled; nothing is installed, they are unpacked into a temporary folder.
# The stages are those of tools/gpu/check.py; a failing one stops no other.
root=$(cd "$(dirname "$0")/.." && pwd)
python=python3
case ${1:-} in
"" | --*) ;;
*) python=$1 && shift ;;
esac
wheels=
count=$#
while [ "$count" -gt 0 ]; do
    if [ "$1" = --wheels ]; then
        wheels=$2
        shift 2
        count=$((count - 2))
    else
        set -- "$@" "$1"
        shift
        count=$((count - 1))
    fi
done

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF=expandable_segments:True
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
    [ -d "$wheels/src" ] && set -- --packages "$wheels/src" "$@"
fi
"$python" "$root/tools/gpu/check.py" "$@"
