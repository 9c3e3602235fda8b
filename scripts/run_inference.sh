#!/usr/bin/env bash
# Decodes E2E's test set with what finetune.sh has trained, as the Jittor port does:
#   bash scripts/run_inference.sh [--data FILE] [--init_checkpoint RUN] [--output_file FILE] ...
# --init_checkpoint is a run's folder, or an adapter such as Microsoft's gpt2_md_lora_e2e.pt; the
# pretrained model is --model_card's. Each distinct context is decoded once; --output_file gets the
# texts, one a line.
source "$(dirname "${BASH_SOURCE[0]}")/lib/jittor.sh"
words=("$@")
model_card
refuse start "nothing is decoded in slices; --max_predict_samples N takes the first N contexts"
refuse end "nothing is decoded in slices; --max_predict_samples N takes the first N contexts"
packages data,nlg accelerate tokenizers sacrebleu
flag data && data=$REPLY
[ -n "$data" ] || { e2e_files && data=$prepared/test.jsonl; }
flag init_checkpoint "$root/runs/finetune" && adapter=$REPLY
flag batch_size && batch=$REPLY
flag work_dir "$root/runs/inference" && work=$REPLY
flag output_file && output=$REPLY
(launch examples.run_nlg --do_train false --do_eval false --do_predict --method lora \
  --wiring loralib --model_name_or_path "$base" --lora_path "$adapter" --test_file "$data" \
  --seq_len 512 --eval_len 64 --lora_dim 4 --lora_alpha 32 --beam 10 --length_penalty 0.8 \
  --no_repeat_ngram_size 4 --repetition_penalty 1.0 --eos_token_id 628 --work_dir "$work" \
  ${batch:+--decode_batch_size "$batch"} "${words[@]}")
[ -z "$output" ] || cp "$work/submission/test_predictions.txt" "$output"
