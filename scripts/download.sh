#!/usr/bin/env bash
# Fetches models into checkpoints/<name>/ and the data of tasks into data/<task>/, where the task
# scripts look for them:   bash scripts/download.sh FacebookAI/roberta-base mrpc rte
#                          bash scripts/download.sh gpt2-medium e2e webnlg gpt2_md_lora_e2e
# --to DIR for another place, --from DIR to read tasks from files, --help for the rest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh" # sets root
python -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))' \
  datasets safetensors 2>/dev/null || environment data
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -m examples.download --home "$root" "$@"
