# Sourced by finetune.sh, run_inference.sh and run_metric.sh: the three commands of the Jittor port
# of LoRA on GPT-2. Each is the port's command for E2E and takes its flags, which mean what they do
# there (gpt2_ft.py, gpt2_beam.py, gpt2_decode.py of the original recipe); our own options go with
# them. Checkpoints are folders here. MODEL, DATA_DIR, PREPARED, NUM_GPUS, NUM_NODES: see nlg.sh.
source "$(dirname "${BASH_SOURCE[0]}")/nlg.sh"

# flag NAME [DEFAULT]: takes `--NAME value` out of the array words, and sets REPLY to the value.
flag() {
  local name=$1 rest=()
  REPLY=${2:-}
  set -- "${words[@]}"
  while (($#)); do
    case $1 in
      "--$name") (($# > 1)) || fail "--$name needs a value" && REPLY=$2 && shift ;;
      "--$name="*) REPLY=${1#*=} ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  words=("${rest[@]}")
}

# switch NAME: takes `--NAME` out of the array words.
switch() {
  local word rest=()
  for word in "${words[@]}"; do [ "$word" = "--$1" ] || rest+=("$word"); done
  words=("${rest[@]}")
}

# refuse NAME WHY: the flag has no meaning here.
refuse() {
  [[ " ${words[*]} " != *" --$1"[=\ ]* ]] || fail "--$1: $2"
}

# Takes --model_card out of the array words; sets base to the pretrained model of that size.
model_card() {
  local size
  flag model_card gpt2.md
  case $REPLY in
    gpt2.sm) size=gpt2 ;;
    gpt2.md) size=gpt2_medium ;;
    gpt2.lg) size=gpt2_large ;;
    *) fail "--model_card $REPLY: gpt2.sm, gpt2.md or gpt2.lg is needed" ;;
  esac
  base=$(pretrained openai-community "$size")
}

# E2E's prepared files, made where they are not there.
e2e_files() {
  prepared=${PREPARED:-$root/data/prepared/e2e}
  [ -d "$prepared" ] || prepare e2e "$base" "$prepared"
}
