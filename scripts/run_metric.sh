#!/usr/bin/env bash
# Scores what run_inference.sh has decoded with the official metrics, as the Jittor port does:
#   bash scripts/run_metric.sh [--sample_file FILE] [--input_file FILE] [--output FILE.json]
# --sample_file holds texts, one a line, or the port's own JSON lines of token ids, which --vocab
# (a tokenizer's folder) decodes; --input_file is the formatted test set. --ref_type webnlg or dart
# brings texts into the form that these are scored in, so that --tokenize and --lower are implied.
source "$(dirname "${BASH_SOURCE[0]}")/lib/jittor.sh"
words=("$@")
switch tokenize
switch lower
refuse output_ref_file "nothing is written but --output; run_inference.sh wrote test_references.txt"
refuse output_pred_file "nothing is written but --output; run_inference.sh --output_file has them"
refuse ref_num "all references of e2e count, and six of webnlg's and dart's"
refuse filter "run_nlg --do_predict scores seen and unseen categories apart"
packages nlg tokenizers sacrebleu
flag sample_file "$root/runs/inference/submission/test_predictions.txt" && samples=$REPLY
flag input_file "${PREPARED:-$root/data/prepared/e2e}/test_formatted.jsonl" && input=$REPLY
flag output "$root/runs/inference/metrics.json" && output=$REPLY
flag ref_type e2e && format=${REPLY/dart/webnlg}
flag vocab && vocab=$REPLY
NUM_GPUS=1 NUM_NODES=1 launch examples.evaluate_nlg --pred "$samples" --ref "$input" --output "$output" \
  --format "$format" ${vocab:+--vocab "$vocab"} "${words[@]}"
