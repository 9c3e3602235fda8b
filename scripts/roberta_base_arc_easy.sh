#!/usr/bin/env bash
# RoBERTa-base on ARC-Easy; lib/choice.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/choice.sh"
lora=( # nobody published values: MRPC's, whose 128 rows a step are 32 questions of four choices
  --lora_r 8 --lora_alpha 16
  --learning_rate 4e-4 --num_train_epochs 30
  --global_batch_size 32 --per_device_train_batch_size 16 # questions; per device: at most
  --max_length 256 --weight_decay 0.1 --warmup_ratio 0.06 --seed 0
)
choice roberta_base arc_easy "$@"
