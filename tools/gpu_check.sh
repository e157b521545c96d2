#!/bin/sh
# Everything that needs a GPU, in one call: gpu_check.sh [PYTHON] (default: python3, with the
# project's packages installed). Prints versions, runs the tests of the GPU kernels, trains, and
# measures number formats: the figures for docs/benchmarks.md.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

"$python" -m nemotron doctor
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
"$python" -m pytest -m gpu tests
for precision in fp32 bf16 fp8_current fp8_block nvfp4; do
    "$python" -m nemotron train recipes/tiny/smoke.yaml device=cuda precision=$precision \
        output="$runs" name=$precision
done
for part in layers blocks steps; do
    "$python" tools/bench/formats.py $part --device cuda
done
