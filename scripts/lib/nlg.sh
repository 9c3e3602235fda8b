# Sourced by gpt2_{medium,large}_TASK.sh, which are called as
#   bash scripts/gpt2_medium_e2e.sh [METHOD] [--option value ...]
# They prepare the data, fine-tune, decode the test set and score the texts. METHOD is lora unless
# given, else dylora, adalora, vilora, bim_lora or full: its values, LoRA's too, come from
# hparams/MODEL_METHOD.yaml, row TASK. Options on the command line win. What is no hyper-parameter
# comes from the environment:
#   MODEL       folder or hub id of the pretrained model
#   DATA_DIR    the raw files, a folder per task; unset: data/ beside scripts/, where
#               `scripts/download.sh TASK` puts them (boolq and xsum: else the hub)
#   PREPARED    the task's prepared files, made if it is not there; unset: data/prepared/TASK
#   SPLIT_DEV   1: cut BoolQ's dev.jsonl into train, valid and test (not the official split)
#   OUTPUT_DIR  the run's folder; unset: runs/MODEL_TASK_METHOD beside scripts/
#   NUM_GPUS    processes, 1 unless given: the global batch stays, accumulation follows from it
#   NUM_NODES   machines of NUM_GPUS each, 1 unless given; what else they need says run.sh
# What scripts/download.sh brought to checkpoints/ is used where MODEL is unset. Where there is no
# test set, `--do_predict false` trains alone; where there is no other (of XSum 1,000 test rows are
# easily had), `--do_train false --do_eval false --lora_path RUN` decodes and scores.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

# nlg MODEL TASK [ARGUMENT ...]
nlg() {
  local model=$1 task=$2 method=lora config base prepared
  shift 2
  if [[ ${1:---} != -* ]]; then method=$1 && shift; fi
  config=$(sheet "$model" "$method" "")
  base=$(pretrained openai-community "$model")
  packages data,nlg accelerate tokenizers sacrebleu
  prepared=${PREPARED:-$root/data/prepared/$task${SPLIT_DEV:+_dev}}
  [ -d "$prepared" ] || prepare "$task" "$base" "$prepared"
  launch examples.run_nlg --config "$config" --task_name "$task" --model_name_or_path "$base" \
    --data_dir "$prepared" --output_dir "${OUTPUT_DIR:-$root/runs/${model}_${task}_$method}" \
    --do_predict "$@"
}

# prepare TASK TOKENIZER FOLDER: writes the prepared files; FOLDER is there once all of them are.
prepare() {
  local task=$1 tokenizer=$2 folder=$3 raw=${DATA_DIR:-} run end
  [ -n "$raw" ] || [ ! -d "$root/data/$task" ] || raw=$root/data/$task
  [ -n "$raw" ] || [[ $task =~ ^(boolq|xsum)$ ]] ||
    fail "no data of $task here: run scripts/download.sh $task, or set DATA_DIR"
  run=(python -m examples.data.prepare_nlg "$task" ${raw:+--data_dir "$raw"}
    --tokenizer "$tokenizer" --output_dir "$folder.partial" ${SPLIT_DEV:+--split_dev})
  show "${run[@]}"
  "${run[@]}"
  if [ "$task" = boolq ] && [ ! -e "$folder.partial/test.jsonl" ]; then
    note "BoolQ's test set has no answers: the dev set is decoded and scored in its place"
    for end in .jsonl _formatted.jsonl; do cp "$folder.partial/"{valid,test}"$end"; done
  fi
  mv "$folder.partial" "$folder"
}
