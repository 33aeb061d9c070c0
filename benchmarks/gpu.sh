#!/usr/bin/env bash
# Everything that has to be shown on a GPU, from a checkout and with no network.
#
#   benchmarks/gpu.sh wheels DIR            fetch the packages that a machine with PyTorch may lack
#   benchmarks/gpu.sh check   [--rehearse]  tests, cells, kernels, waits for the GPU: 4 minutes at most
#   benchmarks/gpu.sh measure [--rehearse]  speed, memory, two trainings: 8 minutes at most
#
#   --rehearse   run every step on the CPU with tiny sizes, to find typing errors without a GPU
#   WHEELS=DIR   install the wheels of DIR beside the Python that is there; that Python stays as it is
#   OUT=DIR      where results and logs go (benchmarks/results; in a rehearsal a temporary folder)
#   PYTHON=FILE  the Python to use (.venv/bin/python where it exists, else python3; for `wheels` python3)
#
# Both parts write what they have after every step, end by themselves, and say in their last line what passed,
# what failed and what was not reached.
set -euo pipefail
folder() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }  # before this script changes its own
if [ -n "${WHEELS:-}" ]; then WHEELS=$(folder "$WHEELS"); fi
if [ -n "${OUT:-}" ]; then OUT=$(folder "$OUT"); export OUT; fi
if [ "${1:-}" = wheels ]; then wheels=$(folder "${2:?name the folder for the wheels}"); fi
cd "$(dirname "$0")/.."

if [ "${1:-}" = wheels ]; then
  platforms=()
  for n in 39 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
  exec "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version 3.12 "${platforms[@]}" --platform manylinux2014_x86_64 \
    --dest "$wheels" -r benchmarks/gpu_wheels.txt
fi

if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
    "$WHEELS"/*.whl
  export PYTHONPATH="$PWD:$site:${PYTHONPATH#*:}"
fi
"$PYTHON" benchmarks/gpu.py "$@"
