#!/usr/bin/env bash
# BERT-base on QQP; lib/bert.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/bert.sh"
lora=( # nobody published values for this model; LoRA's authors have these for RoBERTa-base
  --lora_r 8 --lora_alpha 16
  --learning_rate 5e-4 --num_train_epochs 25
  --global_batch_size 128 --per_device_train_batch_size 16 # per device: at most
  --max_length 512 --weight_decay 0.1 --warmup_ratio 0.06 --seed 0
)
bert qqp "$@"
