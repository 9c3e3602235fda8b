#!/usr/bin/env bash
# RoBERTa-large on MNLI; lib/glue.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/glue.sh"
lora=(
  --lora_r 8 --lora_alpha 16
  --learning_rate 3e-4 --num_train_epochs 10
  --global_batch_size 32 --per_device_train_batch_size 4 # per device: at most
  --max_length 128 --weight_decay 0.1 --warmup_ratio 0.06 --seed 0
)
glue roberta_large mnli pretrained "$@"
