#!/bin/sh
# Set up a virtual environment: setup.sh PYTHON FOLDER. Needs Python 3.11 to 3.13 and the index.
set -eu
python=$1
venv=$2
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    echo "$python is not Python 3.11, 3.12 or 3.13; name one with: make PYTHON=python3.12" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt"
echo "setting up $venv (a few minutes the first time)"
# torch first and by its exact version: whatever depends on it then asks for nothing more
$pip torch
$pip --editable '.[hf,track,dev]'
