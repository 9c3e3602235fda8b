#!/usr/bin/env bash
# RoBERTa-base on WNLI; lib/glue.sh says how to call this. LoRA's values are RTE's.
source "$(dirname "${BASH_SOURCE[0]}")/lib/glue.sh"
lora=(
  --lora_r 8 --lora_alpha 16
  --learning_rate 5e-4 --num_train_epochs 80
  --global_batch_size 256 --per_device_train_batch_size 32 # per device: at most
  --max_length 512 --weight_decay 0.1 --warmup_ratio 0.06 --seed 0
)
glue roberta_base wnli mnli "$@"
