"""The command line: quick help, the originals' names, YAML, and errors that say what to type."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from examples import program
from examples.cli import fields as config
from examples.cli.fields import OptionError
from examples.cli.groups import DataOptions, ModelOptions, TrainingOptions
from examples.run_glue import OPTION_CLASSES, SUMMARY

NEEDED = ["--task_name", "mrpc", "--model_name_or_path", "m", "--output_dir", "o"]


def parse(*words: str) -> program.Options:
    return program.parse(
        [*NEEDED, *words], "examples.run_glue", SUMMARY, OPTION_CLASSES, "task_name"
    )


@pytest.mark.parametrize("module", ["run_glue", "run_glue_no_trainer"])
def test_help_imports_no_torch(module):
    code = (
        f"import sys, examples.{module} as m; from examples.run_glue import main;"
        "assert main(['--help']) == 0;"
        "heavy = [n for n in ('torch', 'numpy', 'accelerate', 'yaml') if n in sys.modules];"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--lora_r", "--max_seq_length", "--packing", "clr", "--adam_beta1"):
        assert word in done.stdout


def test_defaults_and_types():
    options = parse()
    training = options[TrainingOptions]
    assert options.method.name == "lora" and options.method_options.lora_modules == ()
    assert training.learning_rate == 5e-5 and training.num_train_epochs == 3
    assert options[DataOptions].max_length == 128 and options[ModelOptions].base_dtype == "auto"
    resolved = options.resolved()
    assert resolved["lora_modules"] == [] and resolved["method"] == "lora"
    json.dumps(resolved)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max_seq_length", "64"], "max_length", 64),
        (["--warmup_steps", "7"], "num_warmup_steps", 7),
        (["--max_steps=20"], "max_train_steps", 20),
        (["--max_train_steps", "-1"], "max_train_steps", None),
        (["--checkpointing_steps", "30"], "save_steps", 30),
        (["--bf16"], "mixed_precision", "bf16"),
        (["--no_group_by_length"], "group_by_length", False),
        (["--group_by_length", "false"], "group_by_length", False),
        (["--packing"], "packing", True),
        (["--num-train-epochs", "0.5"], "num_train_epochs", 0.5),
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--target_modules", "query, key"], "lora_modules", ["query", "key"]),
        (["--use_custom_lr_schedule"], "lr_scheduler_type", "clr"),
        (["--apply_lora", "--lora_type", "lora"], "method", "lora"),
        (["--with_tracking", "--report_to", "tensorboard"], "report_to", ["tensorboard"]),
        (["--eval_only"], "do_train", False),
        (["--max_length", "9", "--max_seq_length", "8"], "max_length", 8),
        (["--packing", "--no_packing"], "packing", False),
        (["--no_cache", "--cache"], "cache", True),
    ],
)
def test_names_of_the_originals(words, name, value):
    assert parse(*words).resolved()[name] == value


def test_saving_every_n_steps_or_by_epoch():
    assert parse("--checkpointing_steps", "30")[TrainingOptions].save_strategy == "steps"
    assert parse("--checkpointing_steps", "epoch")[TrainingOptions].save_strategy == "epoch"


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ([], "bucket"),
        (["--packing"], "random"),
        (["--packing", "--group_by_length"], "bucket"),
        (["--no_group_by_length"], "random"),
        (["--group_by_length", "none"], "bucket"),
    ],
)
def test_rows_of_like_length_meet_where_padding_would_cost(words: list[str], order: str) -> None:
    assert parse(*words)[DataOptions].order == order


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "no option --learning_rat; did you mean --learning_rate"),
        (["--lora_r", "0"], "--lora_r 0: must be at least 1, such as 8"),
        (["--lora_r", "x"], "--lora_r x: a whole number is needed, such as 8"),
        (["--lora_r"], "lora_r"),
        (["--seed", "1.5"], "--seed 1.5: a whole number"),
        (["--method", "lroa"], "did you mean lora"),
        (["--method", "full", "--lora_r", "4"], "--lora_r is an option of method lora, but"),
        (["--trust_remote_code"], "no code is ever loaded"),
        (["--packing", "--pad_to_max_length"], "exclude each other"),
        (["--warmup_ratio", "1.5"], "from 0 to 1"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be at least 0"),
        (["--packing", "maybe"], "true or false"),
        (["--report_to", "tensorbord"], "did you mean tensorboard"),
        (["--eval_strategy", "steps"], "--eval_steps, such as 500"),
        (["--train_file", "x.csv"], "only one of these"),
        (["--text_column", "a"], "--text_column goes with --train_file or --dataset_name"),
        (["--label_column_name", "a"], "--label_column goes with --train_file or --dataset_name"),
        (["stray"], "'stray' belongs to no option"),
        (["--wiring", "loralib", "--use_rslora"], "options of --wiring peft_custom"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(OptionError) as found:
        parse(*words)
    assert message in str(found.value)


@pytest.mark.parametrize("columns", ["a,b,c", "a,a"])
def test_one_or_two_text_columns(columns):
    words = ["--train_file", "x.csv", "--model_name_or_path", "m", "--output_dir", "o"]
    with pytest.raises(OptionError, match=f"--text_column {columns}: name one or two columns"):
        program.parse(
            [*words, "--text_column_names", columns],
            "examples.run_glue",
            SUMMARY,
            OPTION_CLASSES,
            "task_name",
        )


def test_needed_options():
    for words, name in (([], "model_name_or_path"), (["--model_name_or_path", "m"], "task_name")):
        with pytest.raises(OptionError, match=name):
            program.parse(words, "examples.run_glue", SUMMARY, OPTION_CLASSES, "task_name")


def test_a_file_of_options_and_its_rows(tmp_path):
    sheet = tmp_path / "sheet.yaml"
    sheet.write_text(
        "learning_rate: 1e-4\nlora_r: 2\nwarmup_steps: 3\n"
        "tasks:\n  mrpc: {learning_rate: 4e-4, num_train_epochs: 30}\n  rte: {seed: 1}\n"
    )
    options = parse("--config", str(sheet), "--lora_r", "4")
    values = options.resolved()
    assert values["learning_rate"] == 4e-4 and values["num_train_epochs"] == 30
    assert values["lora_r"] == 4 and values["num_warmup_steps"] == 3 and values["seed"] == 0
    again = tmp_path / "config.json"
    again.write_text(json.dumps(values))
    read = program.parse(
        ["--config", str(again)], "examples.run_glue", SUMMARY, OPTION_CLASSES, None
    )
    assert read.resolved() == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 4", "no option --lora_rank; did you mean --lora_r"),
        ("- 3", "`name: value`"),
        ("a: [", "sheet.yaml"),
        ("seed: {a: 1}", "seed must be one value"),
        ("tasks: {rte: {seed: 1}}", "no row 'mrpc'"),
        ("max_length: 9\nmax_seq_length: 8", "are the same option"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    sheet = tmp_path / "sheet.yaml"
    sheet.write_text(text)
    with pytest.raises(OptionError) as found:
        parse("--config", str(sheet))
    assert message in str(found.value)
    with pytest.raises(OptionError, match="cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("batch", "limit", "processes", "expected"),
    [
        (128, 16, 1, (16, 8)),
        (128, 16, 8, (16, 1)),
        (16, 16, 4, (4, 1)),
        (12, 8, 1, (6, 2)),
        (7, 4, 1, (1, 7)),
    ],
)
def test_the_global_batch_is_kept(batch, limit, processes, expected):
    options = TrainingOptions("o", global_batch_size=batch, per_device_train_batch_size=limit)
    found = program.rows_at_once(options, processes), program.accumulation(options, processes)
    assert found == expected
    with pytest.raises(OptionError, match="no multiple of the 5 processes"):
        program.rows_at_once(options, 5)


def test_every_option_has_a_help_line():
    fields = config.fields_of([*OPTION_CLASSES.values()])
    assert all(len(item.metadata["help"]) > 3 for item, _ in fields.values())
