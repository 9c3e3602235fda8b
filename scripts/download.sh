#!/usr/bin/env bash
# Fetches models into checkpoints/<name>/ and GLUE tasks into data/<task>/, where the task scripts
# look for them:   bash scripts/download.sh FacebookAI/roberta-base mrpc rte
# --to DIR for another place, --from DIR to read tasks from parquet files, --help for the rest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh" # sets root
python -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))' \
  datasets safetensors 2>/dev/null || environment data
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -m examples.download --home "$root" "$@"
