#!/usr/bin/env bash
# Fine-tunes a real pretrained model with LoRA, starting from nothing.
#   bash scripts/quickstart.sh        BERT (MiniLM-L6, 22 M parameters) judges pairs of sentences
#   bash scripts/quickstart.sh e2e    a GPT-2 (models/gpt2-mini, 2.7 M) writes sentences from tables
# Arguments go to examples.run_glue, or examples.run_nlg, and win over the settings below, such as
#   bash scripts/quickstart.sh --task_name mrpc --data_dir DIR --num_train_epochs 4
#   bash scripts/quickstart.sh --lora_r 4
#   bash scripts/quickstart.sh e2e --data_dir DIR --model_name_or_path DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

common=(--method lora --warmup_ratio 0.06 --packing --seed 0)
if [[ ${1-} == e2e ]]; then
  shift
  environment plots,nlg
  program=run_nlg last=show_texts run=$root/runs/quickstart_e2e base=$root/models/gpt2-mini
  defaults=(--task_name e2e --num_train_epochs 10 --lora_r 32 --lora_alpha 128
    --lora_modules all-linear --learning_rate 5e-3 --per_device_train_batch_size 16 --do_predict
    --num_beams 10 --length_penalty 0.8 --max_new_tokens 96 "${common[@]}")
  [[ " $* " == *" --data_dir"* ]] ||
    defaults+=(--data_dir "$root/examples/data/embedded/museums")
else
  environment plots
  program=run_glue last=next_steps run=$root/runs/quickstart
  defaults=(--task_name wording --num_train_epochs 12 --lora_r 8 --lora_alpha 16
    --lora_modules query,key,value --learning_rate 1.5e-3
    --per_device_train_batch_size 48 "${common[@]}")
fi
[[ " $* " == *" --model_name_or_path"* ]] ||
  defaults+=(--model_name_or_path "${base:-$(python -m examples.backbone)}")
words=("$@")
for i in "${!words[@]}"; do
  case ${words[i]} in
    --output_dir) run=${words[i + 1]-} ;;
    --output_dir=*) run=${words[i]#*=} ;;
  esac
done
[[ " $* " == *" --output_dir"* ]] || defaults+=(--output_dir "$run" --overwrite_output_dir)
python -m "examples.$program" "${defaults[@]}" "$@"
python -m "examples.$last" "$run"
