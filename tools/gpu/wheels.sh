#!/bin/sh
# Fetch what a bare GPU machine lacks: wheels.sh FOLDER [PYTHON]. Wheels for Python 3.12 on Linux,
# at the versions of constraints.txt; below FOLDER/src the sources of mamba-ssm, whose Triton
# kernels need no compiler. The machine has torch, triton, numpy, transformers and pytest itself.
set -eu
folder=$1
cd "$(dirname "$0")/../.."
python=${2:-.venv/bin/python}
mkdir -p "$folder/src"

names='pydantic pydantic-core annotated-types typing-inspection typing-extensions
ruamel-yaml zstandard typer click shellingham annotated-doc rich xxhash pytest-timeout jaxtyping
wadler-lindig markdown-it-py mdurl pygments'
pins=
for name in $names; do
    pins="$pins $(grep "^$name==" constraints.txt)"
done
platforms=
for number in 2_28 2_27 2_17 2_12 2_5; do
    platforms="$platforms --platform manylinux_${number}_x86_64"
done
# shellcheck disable=SC2086  # lists of words
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
    --python-version 3.12 --implementation cp $platforms --platform manylinux2014_x86_64 \
    --dest "$folder" $pins

# Without its models, which import all of transformers, and without what needs its CUDA extension.
references=.venv/references/mamba_ssm
if [ -d "$references" ]; then
    (cd "$references/.." && find mamba_ssm/ops/triton mamba_ssm/utils mamba_ssm/ops/__init__.py -name '*.py') |
        while read -r file; do
            mkdir -p "$folder/src/$(dirname "$file")"
            cp "$references/../$file" "$folder/src/$file"
        done
    grep '^__version__' "$references/__init__.py" > "$folder/src/mamba_ssm/__init__.py"
fi
