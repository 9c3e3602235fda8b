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
#   NUM_NODES   machines of NUM_GPUS each, 1 unless given; what else they need says run.sh
# What scripts/download.sh brought to checkpoints/ and data/ is used where MODEL, DATA_DIR are unset.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

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
# name_on_hub is set where it is another one than MODEL.
run_glue() {
  local owner=$1 model=$2 task=$3 name=$4 data=${DATA_DIR:-}
  shift 4
  [ -n "$data" ] || [ ! -d "$root/data/$task" ] || data=$root/data
  flags=(--task_name "$task" --model_name_or_path "$(pretrained "$owner" "${name_on_hub:-$model}")"
    ${data:+--data_dir "$data"} --output_dir "${OUTPUT_DIR:-$root/runs/${model}_${task}_$name}"
    "${flags[@]}")
  packages data accelerate tokenizers
  launch examples.run_glue "${flags[@]}" "$@"
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
