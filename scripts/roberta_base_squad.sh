#!/usr/bin/env bash
# RoBERTa-base on SQuAD; lib/squad.sh says how to call this.
source "$(dirname "${BASH_SOURCE[0]}")/lib/squad.sh"
lora=( # nobody published values for this model; AdaLoRA's authors compare with these on DeBERTa-v3
  --lora_r 8 --lora_alpha 16 --lora_modules all-linear
  --learning_rate 1e-3 --num_train_epochs 10 --warmup_ratio 0.06
  --global_batch_size 16 --per_device_train_batch_size 16 # per device: at most
)
squad FacebookAI roberta-base roberta_base "$@"
