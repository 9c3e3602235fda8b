# Sourced by {bert,roberta}_base_squad.sh, which are called as
#   bash scripts/bert_base_squad.sh [METHOD] [DENSITY] [--option value ...]
# METHOD is lora unless given; LoRA's flags stand in the script. Another method's values come from
# hparams/MODEL_METHOD.yaml, row squad (or squad_v2, by --task_name squad_v2). DENSITY, of block_prune,
# splopa and splora, is the share of the encoder's weights to keep, 0.3 unless given. Options on the
# command line win over all of these. What is no hyper-parameter comes from the environment:
#   MODEL       folder or hub id of the pretrained model
#   DATA_DIR    SQuAD's folder, or the folder it is in; unset: data/squad beside scripts/, else the
#               hub
#   OUTPUT_DIR  the run's folder; unset: runs/MODEL_TASK_METHOD[_DENSITY] beside scripts/
#   NUM_GPUS    processes, 1 unless given: the global batch stays, accumulation follows from it
#   NUM_NODES   machines of NUM_GPUS each, 1 unless given; what else they need says run.sh
# What scripts/download.sh brought to checkpoints/ is used where MODEL is unset.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
source "$(dirname "${BASH_SOURCE[0]}")/density.sh"

# squad OWNER NAME MODEL [ARGUMENT ...]: OWNER/NAME is on the hub; the array lora holds the flags.
squad() {
  local owner=$1 name=$2 model=$3 method density used task=squad data=${DATA_DIR:-} flags i
  shift 3
  method_and_density "$@"
  shift "$used"
  for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = --task_name ]; then i=$((i + 1)) && task=${!i}; fi
  done
  flags=("${lora[@]}")
  [ "$method" = lora ] || flags=(--config "$(sheet "$model" "$method")")
  [ -n "$data" ] || [ ! -d "$root/data/$task" ] || data=$root/data/$task
  packages data accelerate tokenizers
  flags+=(${density:+--final_threshold "$density"})
  launch examples.run_squad --method "$method" "${flags[@]}" --task_name "$task" \
    --model_name_or_path "$(pretrained "$owner" "$name")" ${data:+--data_dir "$data"} \
    --output_dir "${OUTPUT_DIR:-$root/runs/${model}_${task}_$method${density:+_$density}}" "$@"
}
