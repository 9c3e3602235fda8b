# Sourced by roberta_{base,large}_TASK.sh, which are called as
#   bash scripts/roberta_base_mrpc.sh [METHOD] [--option value ...]
# METHOD is lora unless given; LoRA's flags stand in the script. Another method's values come from
# hparams/MODEL_METHOD.yaml, row TASK. Options on the command line win over both. What is no
# hyper-parameter comes from the environment:
#   MODEL       folder or hub id of the pretrained model
#   DATA_DIR    folder with a folder per task; unset: the hub
#   OUTPUT_DIR  the run's folder; unset: runs/MODEL_TASK_METHOD beside scripts/
#   LORA_PATH   an adapter trained on MNLI, which mrpc, rte, stsb and wnli start from
#   NUM_GPUS    processes, 1 unless given: the global batch stays, accumulation follows from it
# What scripts/download.sh brought to checkpoints/ and data/ is used where MODEL, DATA_DIR are unset.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" # sets root

# glue MODEL TASK START [ARGUMENT ...]: START is mnli or pretrained; the array lora holds the flags.
glue() {
  local model=$1 task=$2 start=$3 method=lora flags
  shift 3
  if [[ ${1:---} != -* ]]; then method=$1 && shift; fi

  flags=("${lora[@]}")
  [ "$method" = lora ] || flags=(--config "$(sheet "$model" "$method")")
  flags=(--method "$method" "${flags[@]}")
  add_adapter "$start" "$method" "$@"
  run_glue FacebookAI "$model" "$task" "$method" "$@"
}

# run_glue OWNER MODEL TASK NAME [ARGUMENT ...]: the run, with the array flags; NAME names its folder.
run_glue() {
  local owner=$1 model=$2 task=$3 name=$4 gpus=${NUM_GPUS:-1} run
  shift 4
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS=$gpus: a whole number from 1 on is needed"
  local hub=${model//_/-} data=${DATA_DIR:-}
  if [ -d "$root/checkpoints/$hub" ]; then hub=$root/checkpoints/$hub; else hub=$owner/$hub; fi
  [ -n "$data" ] || [ ! -d "$root/data/$task" ] || data=$root/data
  flags=(--task_name "$task" --model_name_or_path "${MODEL:-$hub}" ${data:+--data_dir "$data"}
    --output_dir "${OUTPUT_DIR:-$root/runs/${model}_${task}_$name}" "${flags[@]}")

  # what is missing is installed as scripts/quickstart.sh does it, into $VENV
  python -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, sys.argv[1:]))' \
    accelerate tokenizers 2>/dev/null || environment data
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  run=(python -m examples.run_glue)
  if [ "$gpus" != 1 ]; then
    # with fewer GPUs the launcher would quietly start one process, or several that do the same
    python -c 'import sys, torch; sys.exit(torch.accelerator.device_count() < int(sys.argv[1]))' \
      "$gpus" || fail "NUM_GPUS=$gpus: torch sees fewer GPUs than that"
    run=(accelerate launch --multi_gpu --num_processes "$gpus" --num_machines 1
      --mixed_precision no --dynamo_backend no --module examples.run_glue)
  fi
  run+=("${flags[@]}" "$@")
  printf '+%s\n' "$(printf ' %q' "${run[@]}")" >&2
  exec "${run[@]}"
}

# The file of a method's values; without one, says which there are.
sheet() {
  local file=$root/hparams/$1_$2.yaml
  [ -f "$file" ] || fail "no values for method '$2': there is no ${file#"$root"/}, only" \
    "$(cd "$root" && echo hparams/"$1"_*.yaml), and lora in the script itself"
  echo "$file"
}

# Adds LORA_PATH to the flags, or says why the run starts without an adapter.
add_adapter() {
  local start=$1 method=$2
  [[ " ${*:3} " != *" --lora_path"* ]] || return 0
  if [ "$start" != mnli ] || [[ ! $method =~ ^(dy)?lora$ ]]; then
    [ -z "${LORA_PATH:-}" ] || note "LORA_PATH is not used: this run starts from the pretrained" \
      "model (--lora_path insists)"
  elif [ -n "${LORA_PATH:-}" ]; then
    flags+=(--lora_path "$LORA_PATH")
  else
    note "LORA_PATH is not set: starting from the pretrained model, where the published values" \
      "start from an adapter trained on MNLI"
  fi
}

note() { echo "${0##*/}: $*" >&2; }
fail() { note "$@" && exit 2; }
