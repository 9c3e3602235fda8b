"""Whole runs of `examples.run_glue` on a tiny random model: files, wirings, predictions, errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runner_cases import lines, pair_task, results, tiny_bert, tiny_roberta

from examples import program
from examples.run_glue import main
from peft_custom import PeftModel
from transformers_patched import AutoModelForSequenceClassification, AutoTokenizer, CheckpointError

SPLITS = {"train": 40, "validation": 24, "test": 10}
FAST = "--base_dtype float32 --learning_rate 5e-3 --num_train_epochs 2 --max_length 40".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    pair_task(folder / "data" / "MRPC", SPLITS)
    three = {"train": 30, "validation_matched": 12, "validation_mismatched": 9}
    three |= {"test_matched": 5, "test_mismatched": 4}
    pair_task(folder / "data" / "mnli", three, labels=3, names=("premise", "hypothesis"))
    return folder


def run(home, out, *words, task="mrpc"):
    """Exit status of a run in this process."""
    base = ["--task_name", task, "--model_name_or_path", str(home / "bert")]
    base += ["--data_dir", str(home / "data"), "--output_dir", str(out)]
    base += ["--cache_dir", str(home / "cache"), *FAST]
    return program.run_main(main, [*base, *words])


def test_the_run_folder(home, tmp_path, capsys):
    assert run(home, tmp_path / "run", "--logging_steps", "2") == 0
    folder = tmp_path / "run"
    found = results(folder)
    assert {"eval_accuracy", "eval_f1", "eval_combined_score", "eval_loss"} <= found.keys()
    assert found["steps"] == 10 and found["epochs"] == 2.0 and found["best_epoch"] in (1.0, 2.0)
    assert found["trainable_parameters"] == 2 * 2 * 2 * 32 * 8 + 32 * 2 + 2
    assert found["train_seconds"] > 0 and found["tokens_per_second"] > 0
    assert found["peak_memory_bytes"] > 2**20
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10] and "train_loss" in rows[0]
    assert [row["step"] for row in lines(folder / "log.jsonl")] == [2, 4, 6, 8, 10]
    best = max(row["eval_f1"] for row in rows)
    assert found["eval_f1"] == best
    options = json.loads((folder / "config.json").read_text())
    assert options["lora_r"] == 8 and options["method"] == "lora"
    environment = json.loads((folder / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["seed"] == 0
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    said = capsys.readouterr().out
    for word in ("eval_f1", "trainable parameters", "real tokens per second", "peak memory"):
        assert word in said


def test_both_wirings_train_alike(home, tmp_path):
    for wiring in ("peft_custom", "loralib"):
        words = ["--wiring", wiring, "--lora_path", str(tmp_path / "start")]
        if not (tmp_path / "start").exists():  # both begin with the same factors and head
            assert run(home, tmp_path / "start", "--max_train_steps", "1") == 0
        assert run(home, tmp_path / wiring, *words) == 0
    one, two = (lines(tmp_path / w / "metrics.jsonl") for w in ("peft_custom", "loralib"))
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-4)
    theirs = load_file(tmp_path / "loralib" / "adapter" / "lora.safetensors")
    assert "bert.encoder.layer.0.attention.self.query.lora_A" in theirs
    assert "classifier.weight" in theirs


def test_the_saved_adapter_gives_the_reported_metrics(home, tmp_path):
    assert run(home, tmp_path / "run") == 0
    again = ["--eval_only", "--lora_path", str(tmp_path / "run")]
    assert run(home, tmp_path / "unused", *again) == 0
    assert not (tmp_path / "unused").exists()
    capturing = program.Run.finish
    seen = {}

    def finish(self, metrics, figures):
        seen.update(metrics)
        capturing(self, metrics, figures)

    program.Run.finish = finish
    try:
        assert run(home, tmp_path / "unused", *again) == 0
    finally:
        program.Run.finish = capturing
    assert seen["eval_loss"] == pytest.approx(results(tmp_path / "run")["eval_loss"], abs=1e-6)


def test_full_fine_tuning_saves_a_model(home, tmp_path):
    assert run(home, tmp_path / "run", "--method", "full", "--base_dtype", "auto") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    assert results(tmp_path / "run")["trainable_share"] == 1.0
    assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")) > 50


def test_mnli_has_two_development_sets_and_two_submissions(home, tmp_path):
    assert run(home, tmp_path / "run", "--do_predict", task="MNLI") == 0
    found = results(tmp_path / "run")
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy"} <= found.keys()
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    best = max(row["eval_matched_accuracy"] for row in rows)
    assert found["eval_matched_accuracy"] == best
    for name, count in (("MNLI-m", 5), ("MNLI-mm", 4)):
        text = (tmp_path / "run" / "submission" / f"{name}.tsv").read_text().splitlines()
        assert text[0] == "index\tprediction" and len(text) == count + 1
        assert text[1].split("\t")[1] in ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    "words",
    [
        ["--packing"],
        ["--packing", "--max_tokens", "64"],
        ["--pad_to_max_length"],
        ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
        ["--per_device_train_batch_size", "4", "--global_batch_size", "8"],
        ["--gradient_checkpointing"],
    ],
)
def test_ways_to_batch_compute_the_same(home, tmp_path, words):
    quiet = ["--max_train_steps", "5", "--group_by_length"]
    no_dropout = tiny_bert(
        tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    words = ["--model_name_or_path", str(no_dropout), *words]
    assert run(home, tmp_path / "a", *words[:2], *quiet) == 0
    assert run(home, tmp_path / "b", *words, *quiet) == 0
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "ab")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3)


def test_regression(home, tmp_path):
    from examples.data.tables import write_table

    scores = [0.0, 1.25, 2.5, 5.0] * 5
    for split in ("train", "validation"):
        columns = {"sentence1": ["bado"] * 20, "sentence2": ["bado eno"] * 20, "label": scores}
        write_table(tmp_path / "data" / "STS-B" / f"{split}.csv", columns)
    write_table(
        tmp_path / "data" / "STS-B" / "test.csv",
        {"index": [3, 7], "sentence1": ["bado"] * 2, "sentence2": ["eno"] * 2},
    )
    words = ["--data_dir", str(tmp_path / "data"), "--do_predict"]
    assert run(home, tmp_path / "run", *words, task="stsb") == 0
    assert {"eval_pearson", "eval_spearmanr"} <= results(tmp_path / "run").keys()
    text = (tmp_path / "run" / "submission" / "STS-B.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in text] == ["index", "3", "7"]
    assert all(0 <= float(line.split("\t")[1]) <= 5 for line in text[1:])


@pytest.mark.parametrize(("logit", "shown"), [(7.0, "5.000"), (-0.5, "0.000"), (2.25, "2.250")])
def test_scores_of_a_submission_stay_in_their_range(tmp_path, logit, shown):
    """STS-B's scores go from 0 to 5; those of one's own files have no range."""
    from types import SimpleNamespace

    from examples.data.tasks import CUSTOM, get_task
    from examples.run_glue import write_submission

    found = SimpleNamespace(logits=np.array([[logit]], np.float32))
    rows = SimpleNamespace(ids=[4])
    path = write_submission(get_task("stsb"), tmp_path, "test", rows, found)
    assert path.read_text() == f"index\tprediction\n4\t{shown}\n"
    path = write_submission(CUSTOM, tmp_path, "test", rows, found)
    assert path.read_text() == f"index\tprediction\n4\t{logit:.3f}\n"


def test_files_of_ones_own(home, tmp_path, monkeypatch):
    """Each of them is read once, the training file too, though it says the columns and labels."""
    from examples.data import tables
    from examples.data.tables import write_table

    read, reader = [], tables.read_table
    monkeypatch.setattr(
        tables, "read_table", lambda path, task: [read.append(path.name), reader(path, task)][1]
    )

    for split, rows in (("train", 20), ("dev", 8)):
        columns = {"text": ["bado eno", "fado"] * (rows // 2), "label": ["no", "yes"] * (rows // 2)}
        write_table(tmp_path / f"{split}.tsv", columns)
    words = ["--train_file", str(tmp_path / "train.tsv"), "--output_dir", str(tmp_path / "run")]
    words += ["--validation_file", str(tmp_path / "dev.tsv"), *FAST, "--no_cache"]
    base = ["--model_name_or_path", str(home / "bert")]
    assert program.run_main(main, [*base, *words]) == 0
    assert "eval_accuracy" in results(tmp_path / "run")
    assert sorted(read) == ["dev.tsv", "train.tsv"]


@pytest.mark.parametrize(
    ("kind", "values"),
    [("csv", ["1", "2", "3"]), ("jsonl", [30, 4, 1234567890]), ("tsv", ["so", "no", "yes"])],
)
def test_predictions_are_the_labels_of_ones_own_files(home, tmp_path, capsys, kind, values):
    """As the training file writes them; the saved model's config has the same names."""
    from examples.data.tables import write_table

    names = [str(value) for value in values]
    texts = {"so": ["bado eno", "bado"] * 4, "no": ["fado", "fiba"] * 4, "yes": ["gado"] * 8}
    columns = {
        "row_id": list(range(24)),
        "opinion": sum(texts.values(), []),
        "verdict": [value for value in values for _ in range(8)],
    }
    if kind == "tsv":
        columns = {name: list(map(str, column)) for name, column in columns.items()}
    for split in ("train", "dev"):
        write_table(tmp_path / f"{split}.{kind}", columns)
    write_table(tmp_path / f"test.{kind}", {"id": list(range(24)), "opinion": columns["opinion"]})
    files = {"train_file": "train", "validation_file": "dev", "test_file": "test"}
    words = [w for o, stem in files.items() for w in (f"--{o}", str(tmp_path / f"{stem}.{kind}"))]
    words += ["--text_column_names", "opinion", "--label_column_name", "verdict", "--do_predict"]
    words += ["--model_name_or_path", str(home / "bert"), "--output_dir", str(tmp_path / "run")]
    words += [*FAST, "--no_cache", "--method", "full", "--base_dtype", "auto"]
    words += ["--num_train_epochs", "12"]
    assert program.run_main(main, words) == 0
    said = capsys.readouterr().out
    shown = sorted(names, key=int) if kind != "tsv" else sorted(names)
    line = f"text in 'opinion'; label in 'verdict', 3 classes: {', '.join(shown)}; not used: "
    assert line in said and said.index(line) < said.index("training rows")
    written = (tmp_path / "run" / "submission" / "test.tsv").read_text().splitlines()
    predicted = dict(text.split("\t") for text in written[1:])
    saved = tmp_path / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    batch = AutoTokenizer.from_pretrained(saved)(
        columns["opinion"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        classes = model(**batch).logits.argmax(1).tolist()
    assert predicted == {str(i): shown[k] for i, k in enumerate(classes)}
    assert len(set(classes)) > 1 and sum(k == shown.index(names[0]) for k in classes[:8]) > 4
    config = json.loads((saved / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(shown)}
    assert config["label2id"] == {name: i for i, name in enumerate(shown)}


def test_columns_that_cannot_be_told_apart_stop_the_run(home, tmp_path, capsys):
    from examples.data.tables import write_table

    columns = dict.fromkeys(["a", "b", "c"], ["bado eno", "fado"]) | {"label": ["no", "yes"]}
    write_table(tmp_path / "train.csv", columns)
    words = ["--train_file", str(tmp_path / "train.csv"), "--model_name_or_path", str(home)]
    words += ["--output_dir", str(tmp_path / "run")]
    assert program.run_main(main, words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "train.csv" in error and "--text_column a,b" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_with_a_prefix_trains_as_without(home, tmp_path, capsys, method):
    """And one of other keys ends in one line, not in a random model or another error."""
    weights = load_file(home / "bert" / "model.safetensors")
    auto = ["--method", method, "--base_dtype", "auto" if method == "full" else "float32"]
    for name, rename in (
        ("plain", lambda key: key),
        ("prefixed", lambda key: f"_orig_mod.module.bert.{key}"),
        ("other", lambda key: f"x.{key.replace('.', '_')}.weight"),
    ):
        tiny_bert(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        save_file({rename(key): weight for key, weight in weights.items()}, path)
        words = ["--model_name_or_path", str(tmp_path / name), *auto, "--num_train_epochs", "1"]
        status = run(home, tmp_path / f"run-{name}", *words)
        assert status == (2 if name == "other" else 0)
    error = capsys.readouterr().err
    assert f"{path}: none of the {len(weights)} keys fit BertForSequenceClassification" in error
    one, two = (lines(tmp_path / f"run-{n}" / "metrics.jsonl") for n in ("plain", "prefixed"))
    assert one[0]["train_loss"] == two[0]["train_loss"] and one[0]["eval_f1"] == two[0]["eval_f1"]


def test_label_smoothing_and_early_stopping(home, tmp_path):
    words = ["--label_smoothing_factor", "0.1", "--num_train_epochs", "6", "--learning_rate", "0"]
    assert run(home, tmp_path / "run", *words, "--early_stopping_patience", "2") == 0
    assert (
        results(tmp_path / "run")["epochs"] == 3.0 and results(tmp_path / "run")["best_step"] == 5
    )


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_the_best_weights_are_the_result(home, tmp_path, strategy):
    words = ["--save_strategy", strategy, "--num_train_epochs", "4", "--learning_rate", "0.05"]
    assert run(home, tmp_path / "run", *words, "--metric_for_best_model", "loss") == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    best = min(row["eval_loss"] for row in rows)
    assert results(tmp_path / "run")["eval_loss"] == pytest.approx(best, abs=1e-6)
    assert bool(list((tmp_path / "run").glob("checkpoint-*"))) == (strategy == "epoch")


def test_trackers(home, tmp_path):
    pytest.importorskip("tensorboard")
    assert run(home, tmp_path / "run", "--report_to", "tensorboard", "--logging_steps", "1") == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def trained_head(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The classifier that trains, of either wiring, under the names it has inside."""
    if isinstance(model, PeftModel):
        return model.base_model.model.classifier.modules_to_save["default"].state_dict()
    return model.classifier.state_dict()


def test_microsofts_checkpoint_continues_in_both_wirings(tmp_path):
    """Tensors under RoBERTa's names, head of three labels: the factors are taken, the head not."""
    from pathlib import Path

    from examples.methods.common import ModelSource
    from examples.methods.lora import LoraOptions, build
    from peft_custom.save_and_load import adapter_tensors

    tiny_roberta(tmp_path / "roberta")
    state = {}
    for layer in range(2):
        for part in ("query", "value"):
            name = f"roberta.encoder.layer.{layer}.attention.self.{part}"
            state[f"{name}.lora_A"] = torch.randn(4, 32)
            state[f"{name}.lora_B"] = torch.randn(32, 4)
    state |= {
        "classifier.dense.weight": torch.randn(32, 32),
        "classifier.dense.bias": torch.ones(32),
    }
    state |= {"classifier.out_proj.weight": torch.randn(3, 32)}
    state |= {"classifier.out_proj.bias": torch.ones(3)}
    path = tmp_path / "roberta_lora_mnli.bin"
    torch.save(state, path)
    arguments = ("AutoModelForSequenceClassification", "SEQ_CLS", "float32")
    for wiring in ("loralib", "peft_custom"):
        for labels in (2, 3):
            source = ModelSource(str(tmp_path / "roberta"), *arguments, {"num_labels": labels})
            options = LoraOptions(lora_r=4, lora_alpha=16.0, lora_path=str(path), wiring=wiring)
            model = build(source, options).model
            values = {n.removesuffix(".weight"): t for n, t in adapter_tensors(model).items()}
            values |= {f"classifier.{n}": t for n, t in trained_head(model).items()}
            for name, tensor in state.items():
                if ".lora_" in name or labels == 3:
                    assert torch.equal(values[name], tensor), name
            assert labels == 3 or not torch.equal(
                values["classifier.dense.weight"], state["classifier.dense.weight"]
            )
        with pytest.raises(CheckpointError, match=r"file \(4, 32\), model \(8, 32\)"):
            build(source, LoraOptions(lora_r=8, lora_path=str(path), wiring=wiring))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(8\):"):
        build(source, LoraOptions(lora_path=str(tmp_path / "x.safetensors")))
    with pytest.raises(CheckpointError, match="no adapter"):
        build(source, LoraOptions(lora_path=str(Path(tmp_path) / "nowhere")))


def test_another_runs_folder_is_refused(home, tmp_path, capsys):
    short = ["--max_train_steps", "2"]
    assert run(home, tmp_path / "run", *short) == 0
    before = (tmp_path / "run" / "all_results.json").read_bytes()
    assert run(home, tmp_path / "run", *short) == 2
    assert "holds a finished run" in capsys.readouterr().err
    resume = ["--resume_from_checkpoint", "auto"]
    assert run(home, tmp_path / "run", *short, *resume, "--lora_r", "4") == 2
    assert "lora_r was 8, now 4" in capsys.readouterr().err
    assert (tmp_path / "run" / "all_results.json").read_bytes() == before
    assert run(home, tmp_path / "run", "--max_train_steps", "3", "--overwrite_output_dir") == 0
    assert results(tmp_path / "run")["steps"] == 3
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_divergence_is_one_error_and_overwrites_nothing(home, tmp_path, capsys):
    words = ["--max_grad_norm", "0", "--learning_rate", "1e30", "--num_train_epochs", "3"]
    assert run(home, tmp_path / "run", "--method", "full", "--base_dtype", "auto", *words) == 2
    said = capsys.readouterr().err
    assert "not finite in step" in said and "Lower --learning_rate (now 1e+30)" in said
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "all_results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_dir", "nowhere"], "nowhere: no such folder"),
        (["--model_name_or_path", "/no/where"], "/no/where"),
        (["--max_length", "4000"], "more than the 40 tokens"),
        (["--lora_modules", "quary"], "quary"),
        (["--method", "full", "--base_dtype", "bfloat16"], "frozen weights"),
        (["--metric_for_best_model", "bleu"], "bleu"),
        (["--task_name", "mrcp"], "unknown task 'mrcp'"),
        (["--mixed_precision", "fp16"], "needs a GPU"),
        (["--report_to", "trackio"], "pip install trackio"),
        (["--packing", "--max_tokens", "4"], "max_tokens=4"),
        (["--resume_from_checkpoint", "nowhere"], "no such folder"),
    ],
)
def test_one_clear_line_for_what_a_user_can_mend(home, tmp_path, capsys, words, message):
    if message == "needs a GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if message.startswith("pip") and __import__("importlib.util").util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    assert run(home, tmp_path / "run", *words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0].startswith("error: ") and message in "\n".join(said), said
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_predictions_do_not_depend_on_batches(home, tmp_path):
    found = []
    for size in ("1", "64"):
        words = ["--per_device_eval_batch_size", size, "--max_train_steps", "1"]
        assert run(home, tmp_path / size, *words) == 0
        found.append(results(tmp_path / size)["eval_loss"])
    assert math.isclose(*found, abs_tol=1e-5) and np.isfinite(found[0])


def test_a_head_with_its_labels_in_another_order_is_put_in_ours(tmp_path):
    """As in published MNLI checkpoints, whose classes stand the other way round."""
    from examples.methods.common import ModelSource
    from examples.methods.full import FullOptions, build

    names = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    model = tiny_roberta(tmp_path / "roberta", num_labels=3)
    model.config.id2label = names
    model.save_pretrained(tmp_path / "mnli")
    arguments = {"id2label": {0: "entailment", 1: "neutral", 2: "contradiction"}}
    source = ModelSource(
        str(tmp_path / "mnli"), "AutoModelForSequenceClassification", "SEQ_CLS", "auto", arguments
    )
    found = build(source, FullOptions()).model.eval()
    ids = torch.randint(5, 60, (4, 9))
    expected = model.eval()(input_ids=ids).logits[:, [2, 1, 0]]
    torch.testing.assert_close(found(input_ids=ids).logits, expected)


def test_mixed_precision_trains(home, tmp_path):
    words = ["--bf16", "--method", "full", "--base_dtype", "auto"]
    assert run(home, tmp_path / "run", *words) == 0
    assert results(tmp_path / "run")["eval_loss"] < 1.0


@pytest.mark.parametrize(
    ("plain", "compiled", "steps", "word"),
    [
        (0.03, 0.02, 4000, "pays after 2,000 of 4,000 steps"),
        (0.03, 0.02, 400, "pays after 2,000 steps, but this run has 400: leave"),
        (0.03, 0.04, 400, "does not pay here"),
    ],
)
def test_whether_compiling_pays(plain, compiled, steps, word):
    from examples.training.compiling import verdict

    assert word in verdict(plain, compiled, 20.0, steps)


@pytest.mark.slow
def test_a_compiled_run_computes_the_same(home, tmp_path, capsys):
    bert = tiny_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name, words in (("plain", []), ("compiled", ["--compile"])):
        words = ["--model_name_or_path", str(bert), *words]
        assert run(home, tmp_path / name, *words) == 0
    assert "warning: compiling took" in capsys.readouterr().err
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_unlabelled_and_empty_splits_are_named(home, tmp_path, capsys):
    pair_task(tmp_path / "data" / "mrpc", {"train": 4, "validation": 0, "test": 3})
    words = ["--data_dir", str(tmp_path / "data")]
    assert run(home, tmp_path / "run", *words) == 2
    assert "validation.jsonl: empty" in capsys.readouterr().err
    test = tmp_path / "data" / "mrpc" / "test.jsonl"
    (tmp_path / "data" / "mrpc" / "train.jsonl").write_bytes(test.read_bytes())
    (tmp_path / "data" / "mrpc" / "validation.jsonl").write_bytes(test.read_bytes())
    assert run(home, tmp_path / "run", *words) == 2
    assert "no label (-1) in 3 of 3 rows" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
