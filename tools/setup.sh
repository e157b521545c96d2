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
$pip --editable '.[hf,plot,rl,serve,cpu,track,dev]'

# compiled once here instead of when they are first used
"$venv/bin/python" -m nemotron.ops.prepare

# References that only tests read. Neither is compiled, and tests say so where one is missing.
$pip --no-deps --only-binary :all: megatron-core || echo "no megatron-core for this Python" >&2
references=$venv/references
if [ ! -d "$references/mamba_ssm" ]; then
    mkdir -p "$references"
    # only unpacked: its kernels need a GPU, its PyTorch references do not
    if MAMBA_SKIP_CUDA_BUILD=TRUE $venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps \
        --no-build-isolation --no-binary mamba-ssm --constraint constraints.txt \
        --dest "$references" mamba-ssm; then
        tar -xzf "$references"/mamba_ssm-*.tar.gz -C "$references" --strip-components 1 \
            --wildcards '*/mamba_ssm/*'
    else
        echo "no sources of mamba-ssm" >&2
    fi
fi
