# Sourced by deberta_v3_base_TASK.sh, which are called as
#   bash scripts/deberta_v3_base_cola.sh [METHOD] [RANK] [--option value ...]
# METHOD is vilora unless given, else full, full_ivon, lora_all, adalora, adalora_ivon or
# vilora_criterion. Its values come from hparams/deberta_v3_base_METHOD.yaml, row TASK. RANK, 2 unless
# given, is LoRA's rank, and the mean rank at which the others end; they start at 3/2 of it.
#   CRITERION   what vilora_criterion ranks by; unset: mean at rank 2, sigma at rank 4, as published
# The published names with _clr (vilora_clr) mean the same where the task's schedule is clr. All else
# is as glue.sh says.
source "$(dirname "${BASH_SOURCE[0]}")/glue.sh"

# deberta TASK SCHEDULE [ARGUMENT ...]: SCHEDULE is what IVON's learning rate follows, clr or linear.
deberta() {
  local model=deberta_v3_base task=$1 schedule=$2 name=vilora method rank='' flags
  shift 2
  if [[ ${1:---} != -* ]]; then name=$1 && shift; fi
  if [[ ${1:---} != -* ]]; then rank=$1 && shift; fi
  [[ ${rank:-2} =~ ^[1-9][0-9]*$ ]] || fail "rank $rank: a whole number from 1 on is needed"
  method=${name/_clr/}
  [ "$method" = "$name" ] || [ "$schedule" = clr ] ||
    fail "$name: the schedule of $task is not clr; its method is $method"

  flags=(--config "$(sheet "$model" "${method%_criterion}")")
  case $method in
    full*) [ -z "$rank" ] || fail "$method has no rank" ;;
    lora_all) flags+=(--lora_r "${rank:=2}") ;;
    *) flags+=(--adalora_target_r "${rank:=2}" --adalora_init_r $(((3 * rank + 1) / 2))) ;;
  esac
  if [[ $method = *_criterion ]]; then
    local published=mean
    [ "$rank" != 4 ] || published=sigma
    flags+=(--vilora_criterion "${CRITERION:-$published}")
  fi
  add_adapter pretrained "$method" "$@"
  run_glue microsoft "$model" "$task" "$name${rank:+_r$rank}" "$@"
}
