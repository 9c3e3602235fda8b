#!/usr/bin/env bash
# Fine-tunes a real pretrained BERT (MiniLM-L6, 22 M parameters) with LoRA, starting from nothing.
# Arguments go to examples.run_glue and win over the settings below, for instance
#   bash scripts/quickstart.sh --task_name mrpc --data_dir DIR --num_train_epochs 4
#   bash scripts/quickstart.sh --lora_r 4
#   bash scripts/quickstart.sh --model_name_or_path DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
environment plots

defaults=(--task_name wording --method lora --lora_r 8 --lora_alpha 16 --lora_modules query,key,value
  --learning_rate 1.5e-3 --per_device_train_batch_size 48 --num_train_epochs 12 --warmup_ratio 0.06
  --packing --seed 0)
[[ " $* " == *" --model_name_or_path"* ]] ||
  defaults+=(--model_name_or_path "$(python -m examples.backbone)")
run=$root/runs/quickstart words=("$@")
for i in "${!words[@]}"; do
  case ${words[i]} in
    --output_dir) run=${words[i + 1]-} ;;
    --output_dir=*) run=${words[i]#*=} ;;
  esac
done
[[ " $* " == *" --output_dir"* ]] || defaults+=(--output_dir "$run" --overwrite_output_dir)
python -m examples.run_glue "${defaults[@]}" "$@"
python -m examples.next_steps "$run"
