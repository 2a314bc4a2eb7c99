#!/usr/bin/env bash
# Writes the lists of packages with their hashes, of Python 3.12 on Linux and x86-64, for the versions in
# constraints.txt: cpu.txt is what gptjax and its server need, the others add an accelerator's.
#
#   launch/requirements/compile.sh
#
# needs `uv` and the network. pip then installs nothing else and nothing changed:
#
#   pip install --require-hashes -r launch/requirements/cpu.txt -r launch/requirements/cuda.txt
#   pip install --no-deps --no-build-isolation .
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

# The libtpu that jax requires is not the one that the planner is tested with.
grep -v '^libtpu==' constraints.txt >"$scratch/constraints.txt"

compile() { # of an extra beside "serve"
    uv pip compile --quiet pyproject.toml --extra serve ${1:+--extra "$1"} \
        -c "$scratch/constraints.txt" --python-version 3.12 \
        --python-platform x86_64-manylinux_2_31 --generate-hashes --no-annotate --no-header
}

compile >launch/requirements/cpu.txt
for accelerator in cuda:cuda13 cuda12:cuda12 tpu:tpu; do
    compile "${accelerator#*:}" >"$scratch/whole.txt"
    # The packages that are not in cpu.txt: a line with == and those that begin with --hash.
    awk 'NR == FNR { if (/==/) known[$1] = 1; next }
        /==/ { new = !($1 in known) }
        new' launch/requirements/cpu.txt "$scratch/whole.txt" \
        >"launch/requirements/${accelerator%:*}.txt"
done
