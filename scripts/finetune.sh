#!/usr/bin/env bash
# Fine-tunes GPT-2 medium with LoRA on E2E, the Jittor port's recipe at its batch of 6:
#   bash scripts/finetune.sh [--train_data FILE --valid_data FILE] [--lr 1e-4 --lora_dim 8 ...]
# Files are those of examples.data.prepare_nlg. --model_card (gpt2.sm, gpt2.md, gpt2.lg) or
# --init_checkpoint FOLDER is the pretrained model, --work_dir the run (runs/finetune).
source "$(dirname "${BASH_SOURCE[0]}")/lib/jittor.sh"
words=("$@")
model_card
flag init_checkpoint "$base" && base=$REPLY
switch correct_bias # always so
packages data,nlg accelerate tokenizers sacrebleu
flag train_data && train=$REPLY
flag valid_data && valid=$REPLY
[ -n "$train$valid" ] || e2e_files
launch examples.run_nlg --method lora --wiring loralib --model_name_or_path "$base" \
  --train_file "${train:-${prepared:-}/train.jsonl}" \
  --validation_file "${valid:-${prepared:-}/valid.jsonl}" \
  --train_batch_size 6 --grad_acc 1 --valid_batch_size 4 --seq_len 512 --obj clm --packing \
  --lora_dim 4 --lora_alpha 32 --lora_dropout 0.1 --label_smooth 0.1 --random_seed 110 \
  --lr 2e-4 --weight_decay 0.01 --adam_beta2 0.999 --adam_epsilon 1e-6 --clip 0 \
  --scheduler linear --warmup_step 500 --max_epoch 5 --save_interval 1000 --eval_interval 2000 \
  --no_load_best_model_at_end --work_dir "$root/runs/finetune" "${words[@]}"
