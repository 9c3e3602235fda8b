# Sourced by bert_base_{mnli,qqp}.sh, which are called as
#   bash scripts/bert_base_mnli.sh [METHOD] [DENSITY] [--option value ...]
# METHOD is lora unless given; LoRA's flags stand in the script. Another method's values come from
# hparams/bert_base_METHOD.yaml, row TASK. DENSITY, of block_prune, splopa and splora, is the share of
# the encoder's weights to keep, 0.3 unless given. Options on the command line win over all of these.
# The environment is as glue.sh says.
source "$(dirname "${BASH_SOURCE[0]}")/glue.sh"
source "$(dirname "${BASH_SOURCE[0]}")/density.sh"

# bert TASK [ARGUMENT ...]: the array lora holds the flags.
bert() {
  local task=$1 name_on_hub=bert-base-uncased method density used flags
  shift
  method_and_density "$@"
  shift "$used"
  flags=("${lora[@]}")
  [ "$method" = lora ] || flags=(--config "$(sheet bert_base "$method")")
  flags=(--method "$method" "${flags[@]}" ${density:+--final_threshold "$density"})
  run_glue google-bert bert_base "$task" "$method${density:+_$density}" "$@"
}
