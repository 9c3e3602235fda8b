#!/usr/bin/env bash
# Runs the whole test suite, starting from nothing. Arguments go to pytest; --slow adds the tests
# that take minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
environment test
python -m examples.backbone >/dev/null # the real weights that the end-to-end tests train

cd "$root"
# one thread a worker: many small tensors, where more threads only wait for one another
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n "${WORKERS:-2}" --timeout 600 "$@"
