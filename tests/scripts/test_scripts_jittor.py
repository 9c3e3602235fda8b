"""finetune.sh, run_inference.sh, run_metric.sh: the Jittor port's flags, and the three in turn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from support.gpt2_tiny import tiny_gpt2
from support.paths import ROOT
from support.script_cases import Dry, parsed_nlg

from examples import evaluate_nlg, program, run_nlg
from examples.cli.groups import ModelOptions, TrainingOptions
from examples.cli.nlg import DecodingOptions, NlgOptions
from examples.data import prepare_nlg


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    (tmp_path / "prepared").mkdir()
    return Dry(tmp_path)


def called(dry: Dry, script: str, *words: str) -> program.Options:
    command, done = dry(script, *words, PREPARED=str(dry.folder / "prepared"))
    assert done.returncode == 0, done.stderr
    return parsed_nlg(command)


def test_finetune_is_the_ports_recipe(dry: Dry) -> None:
    options = called(dry, "finetune.sh")
    training, data, method = options[TrainingOptions], options[NlgOptions], options.method_options
    files = [str(dry.folder / "prepared" / f"{split}.jsonl") for split in ("train", "valid")]
    assert [data.train_file, data.validation_file] == files
    assert (data.max_length, data.obj, data.order) == (512, "clm", "random")
    assert (method.lora_r, method.lora_alpha, method.lora_dropout) == (4, 32, 0.1)
    assert (options.method.name, method.wiring) == ("lora", "loralib")
    assert (training.per_device_train_batch_size, program.accumulation(training, 1)) == (6, 1)
    assert (training.per_device_eval_batch_size, training.seed) == (4, 110)
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (
        2e-4,
        0.01,
        0,
    )
    assert (training.lr_scheduler_type, training.num_warmup_steps) == ("linear", 500)
    assert (training.num_train_epochs, training.label_smoothing_factor) == (5, 0.1)
    assert (training.save_steps, training.eval_steps) == (1000, 2000)
    assert not training.load_best_model_at_end
    adam = options.optimizer_options
    assert (adam.adam_beta1, adam.adam_beta2, adam.adam_epsilon) == (0.9, 0.999, 1e-6)
    assert options[ModelOptions].model_name_or_path == "openai-community/gpt2-medium"
    assert training.output_dir == str(ROOT / "runs" / "finetune")


def test_finetune_takes_the_originals_flags(dry: Dry) -> None:
    words = (
        "--train_data a.jsonl --valid_data=b.jsonl --train_batch_size 4 --grad_acc 2 --clip 1.0 "
        "--valid_batch_size 3 --seq_len 256 --model_card gpt2.lg --obj jlm --lr 1e-4 "
        "--weight_decay 0 --correct_bias --adam_beta2 0.98 --adam_epislon 1e-8 --scheduler cosine "
        "--warmup_step 7 --max_epoch 2 --save_interval 20 --eval_interval 30 --log_interval 5 "
        "--lora_dim 8 --lora_alpha 16 --lora_dropout 0 --label_smooth 0 --random_seed 3 "
        "--work_dir out --max_step 9"
    ).split()
    options = called(dry, "finetune.sh", *words)
    training, data, method = options[TrainingOptions], options[NlgOptions], options.method_options
    assert (data.train_file, data.validation_file) == ("a.jsonl", "b.jsonl")
    assert (data.max_length, data.obj) == (256, "jlm")
    assert (training.per_device_train_batch_size, program.accumulation(training, 1)) == (4, 2)
    assert (training.max_grad_norm, training.per_device_eval_batch_size) == (1, 3)
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0)
    assert (training.lr_scheduler_type, training.num_warmup_steps) == ("cosine", 7)
    assert (training.num_train_epochs, training.max_train_steps, training.seed) == (2, 9, 3)
    assert (training.save_steps, training.eval_steps, training.logging_steps) == (20, 30, 5)
    assert (method.lora_r, method.lora_alpha, method.lora_dropout) == (8, 16, 0)
    assert (training.label_smoothing_factor, training.output_dir) == (0, "out")
    adam = options.optimizer_options
    assert (adam.adam_beta2, adam.adam_epsilon) == (0.98, 1e-8)
    assert options[ModelOptions].model_name_or_path == "openai-community/gpt2-large"
    options = called(dry, "finetune.sh", "--init_checkpoint", "my model")
    assert options[ModelOptions].model_name_or_path == "my model"


def test_inference_is_the_ports(dry: Dry) -> None:
    options = called(dry, "run_inference.sh")
    training, decoding = options[TrainingOptions], options[DecodingOptions]
    assert (training.do_train, training.do_eval, training.do_predict) == (False, False, True)
    assert (decoding.num_beams, decoding.max_new_tokens, decoding.length_penalty) == (10, 64, 0.8)
    assert (decoding.no_repeat_ngram_size, decoding.repetition_penalty) == (4, 1.0)
    assert (decoding.eos_token_id, decoding.decoding_rules) == (("628",), "lora")
    assert options.method_options.lora_path == str(ROOT / "runs" / "finetune")
    assert options[NlgOptions].test_file == str(dry.folder / "prepared" / "test.jsonl")
    words = "--data t.jsonl --init_checkpoint a.pt --beam 5 --eval_len 32 --min_length 2".split()
    words += "--batch_size 3 --lora_dim 8 --lora_alpha 16 --model_card=gpt2.sm".split()
    options = called(dry, "run_inference.sh", *words, "--work_dir", "out")
    decoding = options[DecodingOptions]
    assert (decoding.num_beams, decoding.max_new_tokens, decoding.min_new_tokens) == (5, 32, 2)
    assert (decoding.decode_batch_size, options.method_options.lora_r) == (3, 8)
    assert options.method_options.lora_path == "a.pt"
    assert options[NlgOptions].test_file == "t.jsonl"
    assert options[ModelOptions].model_name_or_path == "openai-community/gpt2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune.sh", "--model_card", "gpt2.xl"], "--model_card gpt2.xl: gpt2.sm, gpt2.md or"),
        (["finetune.sh", "--train_data"], "--train_data needs a value"),
        (["run_inference.sh", "--start", "1054"], "--start: nothing is decoded in slices"),
        (["run_metric.sh", "--ref_num=4"], "--ref_num: all references of e2e count"),
        (["run_metric.sh", "--output_ref_file", "r"], "--output_ref_file: nothing is written but"),
    ],
)
def test_mistakes_are_one_line(dry: Dry, words: list[str], message: str) -> None:
    command, done = dry(*words, PREPARED=str(dry.folder / "prepared"))
    assert command == [] and done.returncode == 2
    assert done.stderr.startswith(f"{words[0]}: {message}") and len(done.stderr.splitlines()) == 1


def test_flags_without_a_meaning_say_so(dry: Dry) -> None:
    command, _ = dry("finetune.sh", "--platform", "local", PREPARED=str(dry.folder / "prepared"))
    with pytest.raises(program.OptionError, match="--platform has no meaning here: `accelerate"):
        parsed_nlg(command)


def ids_file(folder: Path, rows: list[dict]) -> Path:
    (folder / "predict.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "predict.jsonl"


def test_token_ids_are_scored_as_the_texts_they_spell(tmp_path: Path, capsys) -> None:
    vocabulary = tiny_gpt2(tmp_path / "gpt2")
    symbols = json.loads((vocabulary / "vocab.json").read_text("utf-8"))
    pairs = [("x", "Blue Spice is good ."), ("y", "Aromi is bad ."), ("x", "It is good .")]
    test = tmp_path / "test_formatted.jsonl"
    rows = [json.dumps({"context": c, "completion": text}) for c, text in pairs]
    test.write_text("\n".join(rows) + "\n")

    def spelt(text: str) -> list[int]:
        return [symbols[char] for char in text.replace(" ", "Ġ")]

    end = [len(symbols) - 1, 0, 0]  # what comes after the end does not count
    answers = [(0, "wrong"), (1, "Aromi is bad ."), (2, "It is good .")]  # the last of x counts
    pred = ids_file(tmp_path, [{"id": i, "predict": spelt(t) + end} for i, t in answers])
    words = ["--ref", str(test), "--output", str(tmp_path / "o.json"), "--vocab", str(vocabulary)]
    assert evaluate_nlg.main(["--pred", str(pred), *words]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["BLEU"] == pytest.approx(1.0) and found["ROUGE_L"] == pytest.approx(1.0)
    for rows, message in (
        ([{"id": 0, "predict": [1]}], "no prediction for the context of row 1 of"),
        ([{"id": 0, "predict": ["a"]}], "line 1: 'predict' must be a list of token ids"),
        ([{"id": 0}], "no 'predict' in its rows"),
    ):
        pred = ids_file(tmp_path, rows)
        assert evaluate_nlg.main(["--pred", str(pred), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_three_commands_in_turn(dry: Dry, tmp_path: Path) -> None:
    """From raw files to metrics with a tiny model; what the scripts call is run in this process."""
    programs = {"prepare_nlg": prepare_nlg.main, "evaluate_nlg": evaluate_nlg.main}
    programs["run_nlg"] = partial(program.run_main, run_nlg.main)
    (tmp_path / "e2e").mkdir()
    line = "name : Place {0} | area : city||Place {0} is in the city .\n"
    for split in ("train", "valid", "test"):
        (tmp_path / "e2e" / f"{split}.txt").write_text("".join(map(line.format, range(9))))
    places = {"MODEL": str(tiny_gpt2(tmp_path / "gpt2")), "DATA_DIR": str(tmp_path / "e2e")}
    places["PREPARED"] = str(tmp_path / "of e2e")

    def real(script: str, *words: str) -> None:
        _, done = dry(script, *words, **places)
        assert done.returncode == 0, done.stderr
        for command in dry.commands:
            words = tuple(word.removesuffix(".partial") for word in command[3:])
            assert programs[command[2].rpartition(".")[2]](words) == 0

    run, decoded, texts = (str(tmp_path / name) for name in ("run", "decoded", "texts.txt"))
    short = ["--seq_len", "128", "--disable_tqdm"]
    real("finetune.sh", *short, "--max_step", "2", "--work_dir", run)
    words = ["--init_checkpoint", run, "--beam", "2", "--eval_len", "8", "--min_length", "3"]
    real("run_inference.sh", *short, *words, "--eos_token_id", "10", "--work_dir", decoded)
    written = (Path(decoded) / "submission" / "test_predictions.txt").read_text("utf-8")
    assert len(written.splitlines()) == 9
    words = ["--work_dir", decoded, "--output_file", texts]
    assert dry("run_inference.sh", *words, **places)[1].returncode == 0
    assert Path(texts).read_text("utf-8") == written
    real("run_metric.sh", "--sample_file", texts, "--output", str(tmp_path / "metrics.json"))
    found = json.loads((tmp_path / "metrics.json").read_text())
    own = json.loads((Path(decoded) / "submission" / "test_metrics.json").read_text())
    assert found == pytest.approx(own)
