# Sourced by roberta_base_arc_{easy,challenge}.sh, which are called as
#   bash scripts/roberta_base_arc_easy.sh [METHOD] [--option value ...]
# METHOD is lora unless given; LoRA's flags stand in the script. Another method's values come from
# hparams/MODEL_METHOD.yaml, row TASK. Options on the command line win over both. What is no
# hyper-parameter comes from the environment:
#   MODEL       folder or hub id of the pretrained model
#   DATA_DIR    folder with ARC-Easy/ and ARC-Challenge/; unset: data/arc beside scripts/, or the hub
#   OUTPUT_DIR  the run's folder; unset: runs/MODEL_TASK_METHOD beside scripts/
#   NUM_GPUS    processes, 1 unless given: the global batch stays, accumulation follows from it
#   NUM_NODES   machines of NUM_GPUS each, 1 unless given; what else they need says run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# choice MODEL TASK [ARGUMENT ...]; the array lora holds the flags.
choice() {
  local model=$1 task=$2 method=lora data=${DATA_DIR:-} flags
  shift 2
  if [[ ${1:---} != -* ]]; then method=$1 && shift; fi
  flags=("${lora[@]}")
  [ "$method" = lora ] || flags=(--config "$(sheet "$model" "$method")")
  [ -n "$data" ] || [ ! -d "$root/data/arc" ] || data=$root/data/arc
  packages data accelerate tokenizers
  launch examples.run_multiple_choice --task_name "$task" \
    --model_name_or_path "$(pretrained FacebookAI "$model")" ${data:+--data_dir "$data"} \
    --output_dir "${OUTPUT_DIR:-$root/runs/${model}_${task}_$method}" \
    --method "$method" "${flags[@]}" "$@"
}
