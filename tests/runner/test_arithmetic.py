"""`train_flops` against sums by hand, and what a report makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.report_runs import write_run
from support.runner_cases import pair_task, results, tiny_bert

from examples import program, report, run_glue
from examples.program.arithmetic import training_flops
from peft_custom import BlockPruneConfig, LoraConfig, get_peft_model
from transformers_patched import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

LENGTHS = np.array([3, 7, 10])  # 20 tokens, 158 squares


def test_a_classifier_by_hand() -> None:
    """Two layers of H 16, 40 units; LoRA of rank 3 on the query; two epochs."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, num_labels=3,
    )  # fmt: skip
    layers, above = 2 * (4 * 16 * 16 + 2 * 16 * 40), 16 * 16
    attention = 2 * 12 * 2 * 16 * 158
    model = BertForSequenceClassification(config)
    full = 40 * 6 * layers + 6 * 6 * (above + 3 * 16) + attention
    assert training_flops(model, 40, LENGTHS) == full
    lora = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"])
    adapted = get_peft_model(model, lora)
    per_token = 4 * layers + 6 * 2 * 3 * (16 + 16)
    found = training_flops(adapted, 40, LENGTHS)
    assert found == 40 * per_token + 6 * (4 * above + 6 * 3 * 16) + attention


def test_a_trained_copy_of_a_weight_is_one_product_with_it() -> None:
    """Block fine-pruning of the matrices of 16 × 16 and 40 × 16: 6 a weight, and 6 a score."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=40, num_labels=3,
    )  # fmt: skip
    blocks = {"mask_block_rows": 8, "mask_block_cols": 8}
    pruned = get_peft_model(
        BertForSequenceClassification(config), BlockPruneConfig(task_type="SEQ_CLS", **blocks)
    )
    layers = 2 * (4 * 16 * 16 + 2 * 16 * 40)
    scores = layers // 64
    above = sum(p.numel() * (6 if p.requires_grad else 4) for n, p in pruned.named_parameters()
                if p.ndim == 2 and "encoder" not in n and "embeddings" not in n
                and "original_module" not in n)  # fmt: skip
    found = training_flops(pruned, 20, LENGTHS)
    assert found == 20 * 6 * (layers + scores) + 3 * above + 12 * 2 * 16 * 158


def test_what_stands_beside_the_layers_of_an_encoder_is_per_token() -> None:
    """DeBERTa's convolution, of 3 tokens."""
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40, "position_buckets": 4, "relative_attention": True,
    }  # fmt: skip
    without, beside = (
        training_flops(DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **more)), 20,
                       LENGTHS)
        for more in ({}, {"conv_kernel_size": 3, "conv_act": "gelu"})
    )  # fmt: skip
    assert beside - without == 20 * 6 * 3 * 16 * 16


def test_a_language_model_by_hand() -> None:
    """Its head, which is its table of words, at the 11 scored tokens of an epoch alone."""
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).requires_grad_(False)
    found = training_flops(model, 20, LENGTHS, scored=11)
    assert found == 20 * 4 * 2 * 12 * 16 * 16 + 11 * 4 * 50 * 16 + 6 * 2 * 16 * 158


def test_a_run_says_it(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    pair_task(tmp_path / "mrpc", {"train": 8, "validation": 4})
    words = "--task_name mrpc --no_do_eval --max_train_steps 2 --max_length 40".split()
    words += ["--no_cache", "--disable_tqdm"]
    where = ["--model_name_or_path", str(tmp_path / "bert"), "--data_dir", str(tmp_path)]
    run = tmp_path / "run"
    assert program.run_main(run_glue.main, [*words, *where, "--output_dir", str(run)]) == 0
    found = results(run)
    weights = found["total_parameters"] - found["trainable_parameters"]
    assert 0 < found["train_flops"] < 6 * weights * found["train_tokens"]
    twice = ["--optimizer", "ivon", "--ivon_train_mc_samples", "2", "--output_dir"]
    assert program.run_main(run_glue.main, [*words, *where, *twice, str(tmp_path / "ivon")]) == 0
    assert results(tmp_path / "ivon")["train_flops"] == 2 * found["train_flops"]


def test_a_report_shows_speed_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a", results={"train_flops": 5 * 10**12, "train_seconds": 2.0})
    write_run(tmp_path / "runs" / "b", "full")
    words = [str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--pareto", "tflops,metric"]
    for peak in (None, "10"):
        more = [] if peak is None else ["--peak_tflops", peak]
        assert program.run_main(report.main, [*words, *more]) == 0
        text = (tmp_path / "out" / "report.md").read_text("utf-8")
        assert "TFLOP/s" in text and ("of the arithmetic limit" in text) == (peak is not None)
    assert "| 2.5 |" in text and "| 25% |" in text
    assert program.run_main(report.main, [*words, "--peak_tflops", "0"]) == 2
    assert "--peak_tflops 0: a number above 0" in capsys.readouterr().err
