"""Runs with --teacher: its logits kept or not, packed, resumed, on two; wrong teachers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.choice_cases import choice_task
from support.processes import launch_two
from support.runner_cases import WORDS, lines, pair_task, results, tiny_bert

from examples import program, run_multiple_choice
from examples.program import teacher
from examples.run_glue import main

RUN = (
    "--task_name mrpc --base_dtype float32 --max_length 40 --per_device_train_batch_size 6 "
    "--num_train_epochs 2 --disable_tqdm --learning_rate 0.02 --adam_epsilon 1e-3 "
    "--alpha_distil 0.9 --alpha_ce 0.1"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, a student with dropout and one without, and trained teachers."""
    folder = tmp_path_factory.mktemp("home")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_bert(folder / "still", initializer_range=0.2, **still)
    tiny_bert(folder / "dropout", initializer_range=0.2)
    pair_task(folder / "mrpc", {"train": 23, "validation": 9})
    choice_task(folder / "arc_easy", {"train": 17, "validation": 7})
    for name, method in (("teacher", "full"), ("adapted", "lora")):
        trained = ["--method", method, "--learning_rate", "3e-3", "--save_strategy", "no"]
        run(folder, folder / name, *trained, "--no_cache")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teacher"


def words(home: Path, out: Path, *more: str, model: str = "still") -> list[str]:
    where = ["--model_name_or_path", str(home / model), "--data_dir", str(home)]
    return [*RUN, *where, "--output_dir", str(out), *more]


def run(home: Path, out: Path, *more: str, model: str = "still") -> Path:
    assert program.run_main(main, words(home, out, *more, model=model)) == 0
    return out


def taught(home: Path, out: Path, *more: str, model: str = "still") -> Path:
    return run(home, out, "--teacher", str(home / "teacher"), *more, model=model)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_bits(one: Path, two: Path) -> bool:
    a, b = adapter(one), adapter(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(one: Path, two: Path) -> None:
    for name, tensor in adapter(one).items():
        if not name.endswith("classifier.bias"):
            torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


# --- its logits ----------------------------------------------------------------------------------


def test_kept_or_not_the_run_is_the_same_bits(
    home: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    passes = []
    real = teacher.Teacher._logits

    def counted(self: teacher.Teacher, arguments: dict) -> torch.Tensor:
        found = real(self, arguments)
        passes.append(len(found))
        return found

    monkeypatch.setattr(teacher.Teacher, "_logits", counted)
    first = taught(home, tmp_path / "first", model="dropout")
    assert len(list(cache.iterdir())) == 1
    assert sum(passes[1:]) == 23  # after a look at how many classes there are: every row once
    passes.clear()
    second = taught(home, tmp_path / "second", model="dropout")
    assert len(passes) == 1 and "23 rows, kept by an earlier run" in capsys.readouterr().out
    unkept = taught(home, tmp_path / "unkept", "--no_cache", model="dropout")
    assert len(list(cache.iterdir())) == 1
    assert same_bits(first, second) and same_bits(first, unkept)
    alone = run(home, tmp_path / "alone", model="dropout")
    assert not same_bits(first, alone)
    # a damaged file is noticed and made anew
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.warns(UserWarning, match="damaged"):
        assert same_bits(first, taught(home, tmp_path / "third", model="dropout"))


def test_too_large_to_keep_it_is_asked_for_every_batch(
    home: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = taught(home, tmp_path / "kept")
    monkeypatch.setattr(teacher, "KEPT_BYTES", 23 * 2 * 4 - 1)
    shutil.rmtree(cache)
    asked = taught(home, tmp_path / "asked")
    assert not cache.exists()
    assert_close(kept, asked)


def test_what_the_logits_depend_on_has_a_file_of_its_own(
    home: Path, tmp_path: Path, cache: Path
) -> None:
    changes = [
        [], ["--packing"], ["--max_length", "39"], ["--max_train_samples", "22"],
        ["--per_device_train_batch_size", "5"], ["--mixed_precision", "bf16"],
    ]  # fmt: skip
    once = ["--max_train_steps", "1", "--no_do_eval"]
    for count, more in enumerate(changes, 1):
        taught(home, tmp_path / str(count), *once, *more)
        assert len(list(cache.iterdir())) == count
    # the temperature and the student have no part in them
    taught(home, tmp_path / "hot", *once, "--temperature", "9", "--alpha_ce", "0", model="dropout")
    assert len(list(cache.iterdir())) == len(changes)
    run(home, tmp_path / "other", *once, "--teacher", str(home / "adapted"))
    assert len(list(cache.iterdir())) == len(changes) + 1


# --- the loss in a run ---------------------------------------------------------------------------


def test_the_first_steps_loss_is_the_formula(home: Path, tmp_path: Path) -> None:
    """All rows in one batch; B = 0, so the student's logits are those of the fresh model."""
    from examples.data.tasks import get_task
    from examples.program import sequence_classifier
    from transformers_patched import AutoModelForSequenceClassification, AutoTokenizer

    one = ["--per_device_train_batch_size", "23", "--max_train_steps", "1", "--logging_steps", "1"]
    more = ["--temperature", "3", "--alpha_ce", "0.25", "--alpha_distil", "2"]
    out = taught(home, tmp_path / "run", *one, *more, "--seed", "5")
    options = program.parse(
        ["--config", str(out / "config.json")], "x", "", run_multiple_choice.OPTION_CLASSES, None
    )
    assert options is not None
    source = sequence_classifier(next(iter(options.groups.values())), get_task("mrpc"))
    torch.manual_seed(5)
    student = source.load(frozen=False).eval()
    wise = AutoModelForSequenceClassification.from_pretrained(home / "teacher" / "model").eval()
    rows = lines(home / "mrpc" / "train.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(home / "still")
    texts = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    call = tokenizer(*texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        z, t = student(**call).logits.double(), wise(**call).logits.double()
    labels = torch.tensor([row["label"] for row in rows])
    p, q = (t / 3).softmax(1), (z / 3).softmax(1)
    wanted = 0.25 * torch.nn.functional.cross_entropy(z, labels)
    wanted += 2 * 9 * (p * (p / q).log()).sum() / 23
    assert lines(out / "log.jsonl")[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        ["--packing", "--group_by_length", "true"],
        ["--packing", "--group_by_length", "true", "--max_tokens", "60"],
        ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"],
    ],
    ids=["packed", "by tokens", "micro-batches"],
)
def test_packed_and_in_pieces_it_is_the_same_run(
    home: Path, tmp_path: Path, more: list[str]
) -> None:
    assert_close(taught(home, tmp_path / "plain"), taught(home, tmp_path / "other", *more))


def test_a_killed_run_ends_with_the_same_bytes(
    home: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the logits are still kept or not, and where they never were."""
    save = ["--save_steps", "2", "--save_total_limit", "0"]
    for limit in (teacher.KEPT_BYTES, 0):
        monkeypatch.setattr(teacher, "KEPT_BYTES", limit)
        whole = taught(home, tmp_path / f"whole{limit}", *save, model="dropout")
        again = tmp_path / f"again{limit}"
        shutil.copytree(whole, again)
        for name in ("checkpoint-6", "checkpoint-8", "adapter"):
            shutil.rmtree(again / name)
        (again / "all_results.json").unlink()
        shutil.rmtree(cache, ignore_errors=True)
        taught(home, again, *save, "--resume_from_checkpoint", "auto", model="dropout")
        assert same_bits(whole, again)


def test_a_run_does_not_go_on_with_another_teacher(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    by = ["--teacher", str(tmp_path / "teacher"), "--save_steps", "2", "--num_train_epochs", "1"]
    run(home, tmp_path / "run", *by)
    (tmp_path / "run" / "all_results.json").unlink()
    other = load_file(home / "teacher" / "model" / "model.safetensors")
    other["classifier.bias"] += 1
    from safetensors.torch import save_file

    save_file(other, tmp_path / "teacher" / "model" / "model.safetensors")
    again = words(home, tmp_path / "run", *by, "--resume_from_checkpoint", "auto")
    capsys.readouterr()
    assert program.run_main(main, again) == 2
    assert "changed since: teacher" in capsys.readouterr().err


def test_two_processes_equal_one(home: Path, tmp_path: Path, cache: Path) -> None:
    by = ["--teacher", str(home / "teacher")]
    small = ["--per_device_train_batch_size", "3"]
    launch_two(["-m", "examples.run_glue"], *words(home, tmp_path / "two", *by, *small))
    [kept] = cache.iterdir()
    taught(home, tmp_path / "one")
    assert_close(tmp_path / "one", tmp_path / "two")
    # of the same batches one process makes the same bits
    again = [*small, "--max_train_steps", "1", "--no_do_eval"]
    made = kept.read_bytes()
    kept.unlink()
    taught(home, tmp_path / "again", *again)
    assert kept.read_bytes() == made


def test_an_adapter_is_a_teacher_too(home: Path, tmp_path: Path, cache: Path) -> None:
    """A run's folder, its adapter, and the same merged into a model say the same."""
    from peft_custom import PeftModel
    from transformers_patched import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(home / "still")
    merged = PeftModel.from_pretrained(base, home / "adapted" / "adapter").merge_and_unload()
    shutil.copytree(home / "still", tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    paths = [home / "adapted", home / "adapted" / "adapter", tmp_path / "merged"]
    once = ["--max_train_steps", "1", "--no_do_eval"]
    found = []
    for i, path in enumerate(paths):
        before = set(cache.glob("*"))
        run(home, tmp_path / str(i), "--teacher", str(path), *once)
        found += set(cache.glob("*")) - before
    assert len(found) == 2  # the first two are one
    one, two = (load_file(file)["logits"] for file in found)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert one.std() > 0.01


def test_questions_of_different_length_are_taught(home: Path, tmp_path: Path) -> None:
    def choose(out: str, *more: str) -> Path:
        own = [*words(home, tmp_path / out, *more), "--task_name", "arc_easy"]
        assert program.run_main(run_multiple_choice.main, own) == 0
        return tmp_path / out

    choose("teacher", "--method", "full", "--learning_rate", "3e-3")
    by = ["--teacher", str(tmp_path / "teacher"), "--temperature", "0.5"]
    plain = choose("plain", *by)
    assert results(plain)["eval_loss"] < 10
    packed = ["--packing", "--group_by_length", "true", "--max_tokens", "150"]
    assert_close(plain, choose("packed", *by, *packed))
    assert not same_bits(plain, choose("alone"))


# --- wrong teachers ------------------------------------------------------------------------------


def changed(home: Path, folder: Path, **config: object) -> Path:
    """The teacher with another config.json."""
    shutil.copytree(home / "teacher" / "model", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def other_words(home: Path, folder: Path) -> Path:
    shutil.copytree(home / "teacher" / "model", folder)
    for name in ("tokenizer.json", "vocab.txt"):
        path = folder / name
        if path.exists():
            text = path.read_text()
            one, two = WORDS[:2]
            path.write_text(text.replace(one, "\0").replace(two, one).replace("\0", two))
    return folder


def no_tokenizer(home: Path, folder: Path) -> Path:
    shutil.copytree(home / "teacher" / "model", folder)
    for path in folder.glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (lambda h, f: changed(h, f, id2label={"0": "yes", "1": "no"}), [],
         "its labels are yes, no, but mrpc has not_equivalent, equivalent"),
        (lambda h, f: changed(h, f, id2label={str(i): f"LABEL_{i}" for i in range(3)}), [],
         "its labels are LABEL_0, LABEL_1, LABEL_2, but mrpc has"),
        (other_words, [], "its tokenizer is another one"),
        (no_tokenizer, [], "tokenizer"),
        (lambda h, f: h / "still", [], "it lacks classifier.weight, classifier.bias"),
        (lambda h, f: f, [], "no such folder"),
        (lambda h, f: h / "mrpc", [], "neither a model's folder nor one of an adapter"),
        (lambda h, f: h / "teacher", ["--alpha_distil", "0"], "leaves --teacher nothing to do"),
        (lambda h, f: h / "teacher", ["--temperature", "0"], "must be more than 0"),
    ],
    ids=["labels", "number", "words", "no words", "no head", "none", "data", "alpha", "cold"],
)  # fmt: skip
def test_a_wrong_teacher_is_one_error(
    home: Path,
    tmp_path: Path,
    make: object,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(home, tmp_path / "wrong")
    code = program.run_main(main, words(home, tmp_path / "run", "--teacher", str(path), *more))
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1 and message in error[0], error
    assert "-" in error[0] and not (tmp_path / "run" / "config.json").exists()


def test_labels_in_another_order_are_put_right(home: Path, tmp_path: Path) -> None:
    """The head's rows change places with its labels' names."""
    from safetensors.torch import save_file

    folder = changed(home, tmp_path / "turned", id2label={"0": "equivalent", "1": "not_equivalent"})
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    turned = run(home, tmp_path / "run", "--teacher", str(folder))
    assert_close(taught(home, tmp_path / "plain"), turned)


def test_a_regression_has_no_distribution(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "mrpc", tmp_path / "stsb")
    own = words(home, tmp_path / "run", "--teacher", str(home / "teacher"))
    own += ["--task_name", "stsb", "--data_dir", str(tmp_path)]
    assert program.run_main(main, own) == 2
    assert "stsb is a regression" in capsys.readouterr().err


def test_a_run_does_not_write_over_its_teacher(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "teacher", tmp_path / "run")
    by = ["--teacher", str(tmp_path / "run"), "--overwrite_output_dir"]
    assert program.run_main(main, words(home, tmp_path / "run", *by)) == 2
    assert "is --teacher too" in capsys.readouterr().err
