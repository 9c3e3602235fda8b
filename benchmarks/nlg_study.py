"""What fine-tuning methods make of a small GPT-2: E2E by beam search, BoolQ by two ways.

    python -m benchmarks.nlg_study --data_dir DIR --part tune main boolq --lanes 2
    python -m benchmarks.nlg_study --data_dir DIR --table    # of results/nlg_study.jsonl

DIR has the folders `e2e` (train.txt, valid.txt, test.txt) and `boolq` (dev.jsonl). The model is
`models/gpt2-mini` of this project. Every run is a process of `examples.run_nlg` and one line of
`--out`; a run that has its line is not repeated. Unknown options go to `examples.run_nlg`. All
figures are those of the last weights. `--lanes 2` does two runs at a time (with OMP_NUM_THREADS=1).

    tune    the rates of LoRA and of full fine-tuning, on a part of the data; the other methods take
            LoRA's
    main    every method on E2E: all 630 contexts of the test set by beam search, the five metrics
    boolq   LoRA and full fine-tuning on the split of dev.jsonl by line: answers written, and the
            likelihood of true against false
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.studies import RESULTS, comma_separated, markdown
from examples.sweeps.records import Row, call, in_lanes, once, read
from examples.sweeps.statistics import mean_and_interval, paired_difference
from transformers_patched import AutoConfig, AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).resolve().parents[1] / "models" / "gpt2-mini"
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
SHOWN = tuple(range(30, 630, 60))  # contexts of E2E's test set whose texts are kept and shown
ROWS = {"tune": 2000, "main": 10_000}  # of E2E's training set, the first ones: it is in no order
RATES = {"lora": (2e-3, 5e-3, 1e-2), "full": (5e-4, 1e-3, 2e-3)}
INCREMENTS = "--lora_r 4 --lora_alpha 32 --lora_modules all-linear".split()
METHODS = {
    "lora": ["--method", "lora", *INCREMENTS],
    "full": ["--method", "full"],
    "dylora": ["--method", "dylora", *INCREMENTS],
    "adalora": (
        "--method adalora --adalora_init_r 6 --adalora_target_r 4 --lora_alpha 48 "
        "--adalora_tinit 0.12 --adalora_tfinal 0.5 --adalora_delta_t 10 --lora_modules all-linear"
    ).split(),
    "bim_lora": ["--method", "bim_lora", *INCREMENTS, "--block_size", "16"],
    "lora, random weights": ["--method", "lora", *INCREMENTS],
}
SEEDS = {"lora": 3}  # one seed of the others
COMMON = (
    "--packing --per_device_train_batch_size 8 --weight_decay 0.01 --warmup_ratio 0.06 "
    "--load_best_model_at_end false --save_strategy no --eval_strategy no --logging_steps 100"
).split()
E2E = (
    "--task_name e2e --max_eval_samples 500 --num_train_epochs 1 --num_beams 10 "
    "--length_penalty 0.8 --no_repeat_ngram_size 4 --max_new_tokens 100"
).split()
