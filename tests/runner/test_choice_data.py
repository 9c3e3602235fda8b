"""Multiple-choice files: their layouts, their faults, their tokens and batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.choice_cases import choice_task
from support.runner_cases import lines, tiny_bert

from examples.data import choice
from examples.data.batches import Batch, TrainingBatches, evaluation_batches
from examples.data.choice import collate_choices, encode_choices, read_choices
from examples.data.tasks.choice import CUSTOM_CHOICE
from examples.data.tasks.choice import choice_task as task_of
from examples.errors import DataError
from transformers_patched import AutoTokenizer

ROWS = [
    {"id": "a", "question": "bado beno", "choices": ["biru", "bosa cado"], "label": 1},
    {"id": "b", "question": "ceno", "choices": ["ciru", "cosa", "dado"], "label": 0},
    {"id": "c", "question": "deno", "choices": ["diru", "dosa", "fado", "feno"], "label": 3},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def official(row: dict[str, Any], letters: str = "ABCDE") -> dict[str, Any]:
    """As AI2 has it."""
    choices = [{"text": t, "label": c} for t, c in zip(row["choices"], letters, strict=False)]
    stem = {"stem": row["question"], "choices": choices}
    return {"id": row["id"], "question": stem, "answerKey": letters[row["label"]]}


def hub(row: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it."""
    n = len(row["choices"])
    choices = {"text": row["choices"], "label": list("12345")[:n]}
    return {**row, "choices": choices, "label": None, "answerKey": str(row["label"] + 1)}


def test_the_three_layouts_hold_the_same(tmp_path: Path) -> None:
    third = [{k: v for k, v in hub(row).items() if k != "label"} for row in ROWS]
    layouts = {"plain": ROWS, "official": [official(row) for row in ROWS], "hub": third}
    for name, rows in layouts.items():
        found = read_choices(CUSTOM_CHOICE, "train", file=write(tmp_path / f"{name}.jsonl", rows))
        assert found.text[0] == [row["question"] for row in ROWS]
        assert list(found.choices) == [row["choices"] for row in ROWS]
        assert found.labels == [1, 0, 3] and found.ids == ["a", "b", "c"]
        assert found.where(1) == f"{tmp_path / name}.jsonl, line 2"
        names = {"plain": "0123", "official": "ABCD", "hub": "1234"}[name]
        assert found.names[2] == list(names)
        some = found.take([2, 0])
        assert (some.ids, some.labels, some.choices[1]) == (["c", "a"], [3, 1], ROWS[0]["choices"])
        assert some.where(0).endswith("line 3")


def test_files_are_found_under_their_official_names(tmp_path: Path) -> None:
    for split, name in (("train", "Train"), ("validation", "Dev"), ("test", "Test")):
        rows = [official(row) for row in ROWS]
        write(tmp_path / "ARC-V1" / "ARC-Challenge" / f"ARC-Challenge-{name}.jsonl", rows)
        found = read_choices(task_of("ARC_Challenge"), split, data_dir=tmp_path / "ARC-V1")
        assert found.labels == [1, 0, 3]
    with pytest.raises(
        DataError, match="no file for the split train of arc_easy; .*ARC-Easy-Train"
    ):
        read_choices(task_of("arc-easy"), "train", data_dir=tmp_path / "ARC-V1")


def test_a_dataset_on_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    third = [{k: v for k, v in hub(row).items() if k != "label"} for row in ROWS]
    write(tmp_path / "set" / "train.jsonl", third)
    found = read_choices(CUSTOM_CHOICE, "train", hub=(str(tmp_path / "set"), None))
    assert found.labels == [1, 0, 3] and list(found.choices) == [row["choices"] for row in ROWS]


def test_the_real_counts(real_data: Callable[[str], Path]) -> None:
    folder = real_data("arc/ARC-Easy").parent
    expected = {"train": {3: 6, 4: 2241, 5: 4}, "validation": {3: 1, 4: 548}}
    expected["test"] = {3: 7, 4: 2365, 5: 4}
    for split, counts in expected.items():
        rows = read_choices(task_of("arc_easy"), split, data_dir=folder)
        assert Counter(map(len, rows.choices)) == counts


OTHER = {"id": "z", "question": "q", "choices": ["a", "b"], "label": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 2}, "'label' is 2, but the 2 choices are 0, 1"),
        ({"label": 1.0}, "'label' is 1.0, but"),
        ({"label": True}, "'label' is True, but"),
        ({"label": "b"}, "'label' is 'b', but"),
        ({"label": -1}, r"no answer \(-1\) in 1 of 2 questions, but train needs them"),
        ({"choices": []}, "no choices"),
        ({"choices": "a"}, "no choices"),
        ({"choices": None}, "no choices"),
        ({"choices": ["a"]}, "one choice alone"),
        ({"choices": ["a", " "]}, "an empty text in 'choices'"),
        ({"choices": ["a", 3]}, "'choices' must be text, found 3"),
        ({"question": ""}, "an empty text in 'question'"),
        ({"question": None}, "'question' must be text, found nothing"),
        ({"question": "\ud800"}, "half a surrogate"),
        ({"id": "a"}, "'id' 'a' is that of line 1 too"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "label": "A"},
         "two choices have the label 'A'"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}, "label": "A"}, "not every one"),
        ({"choices": [{"text": "a", "label": "A"}, {"text": "b"}], "label": "A"}, "not every one"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "label": "C"},
         "'label' is 'C', but the 2 choices are A, B"),
    ],
)  # fmt: skip
def test_faults_name_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "train.jsonl", [ROWS[0], {**OTHER, **row}])
    with pytest.raises(DataError, match=message) as error:
        read_choices(CUSTOM_CHOICE, "train", file=file)
    assert str(error.value).startswith(f"{file}, line 2: ")


def test_faults_of_whole_files(tmp_path: Path) -> None:
    bare = {"id": 1, "choices": ["a", "b"]}
    for rows, message in (
        ([bare], "no column 'question'"),
        ([{**bare, "question": "q"}], "no column 'label' or 'answerKey'"),
        ([{"id": 1, "question": "q", "label": 0}], "line 1: no choices"),
    ):
        with pytest.raises(DataError, match=message):
            read_choices(CUSTOM_CHOICE, "train", file=write(tmp_path / "f.jsonl", rows))
    csv = tmp_path / "f.csv"
    csv.write_text("question,choices,label\nq,a b,0\n")
    with pytest.raises(DataError, match="line 2: no choices: a list of texts"):
        read_choices(CUSTOM_CHOICE, "train", file=csv)


def test_answers_may_be_hidden_in_a_test_split_only(tmp_path: Path) -> None:
    for hidden in ({"label": -1}, {"label": None}, {}):
        plain = {k: v for k, v in OTHER.items() if k != "label"}
        file = write(tmp_path / "test.jsonl", [{**plain, **hidden}])
        assert read_choices(CUSTOM_CHOICE, "test", file=file).labels is None
        with pytest.raises(DataError):
            read_choices(CUSTOM_CHOICE, "validation", file=file)


def test_equal_choices_are_mentioned(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [ROWS[0], {**OTHER, "choices": ["a", "a ", "b"]}])
    with pytest.warns(UserWarning, match=r"same text in 1 questions \(lines 2\)"):
        assert len(read_choices(CUSTOM_CHOICE, "train", file=file)) == 2


# --- tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    choice_task(folder / "arc", {"train": 31})
    return folder


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> Any:
    return AutoTokenizer.from_pretrained(home / "bert")


@pytest.mark.parametrize("max_length", [40, 12])
def test_a_question_is_cut_before_its_choices(
    home: Path, tokenizer: Any, max_length: int, tmp_path: Path
) -> None:
    raw = read_choices(CUSTOM_CHOICE, "train", file=home / "arc" / "train.jsonl")
    split = encode_choices(raw, tokenizer, max_length, cache_dir=tmp_path)
    assert len(split) == 31 and split.counts.tolist() == list(map(len, raw.choices))
    place = 0
    for question, choices in zip(raw.text[0], raw.choices, strict=True):
        for text in choices:
            own = split.pairs.tokens[split.pairs.offsets[place] : split.pairs.offsets[place + 1]]
            q, c = (tokenizer.encode(t, add_special_tokens=False) for t in (question, text))
            kept = q[: max_length - 3 - len(c)]
            ids = [tokenizer.cls_token_id, *kept, tokenizer.sep_token_id, *c]
            assert own.tolist() == [*ids, tokenizer.sep_token_id]
            place += 1
    assert place == split.counts.sum() == len(split.pairs)
    again = encode_choices(raw, tokenizer, max_length, cache_dir=tmp_path)
    assert np.array_equal(again.pairs.tokens, split.pairs.tokens) and again.keys == split.keys
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_what_is_cut_first_is_part_of_the_cache_key(
    home: Path, tokenizer: Any, tmp_path: Path
) -> None:
    raw = read_choices(CUSTOM_CHOICE, "train", file=home / "arc" / "train.jsonl")
    encode_choices(raw, tokenizer, 12, cache_dir=tmp_path)
    other = choice.encode(raw.pairs(), tokenizer, 12, cache_dir=tmp_path)
    plain = choice.encode(raw.pairs(), tokenizer, 12, cache=False)
    assert np.array_equal(other.tokens, plain.tokens)


def test_the_key_knows_whose_a_choice_is(tmp_path: Path, tokenizer: Any) -> None:
    """Four choices of one question or two of two: the same sequences."""
    one = {"question": "bado", "choices": ["beno", "biru", "bosa", "cado"], "label": 0}
    two = [{**one, "choices": one["choices"][:2]}, {**one, "choices": one["choices"][2:]}]
    keys = []
    for name, rows in (("one", [one]), ("two", two)):
        raw = read_choices(CUSTOM_CHOICE, "train", file=write(tmp_path / f"{name}.jsonl", rows))
        split = encode_choices(raw, tokenizer, 20, cache=False)
        keys.append((split.keys["texts"], split.keys["choices"]))
    assert keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]


def test_a_choice_without_room_for_its_question(home: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [ROWS[0], {**OTHER, "question": "bado beno", "choices": ["bado", "beno biru bosa cado"]}]
    file = write(tmp_path / "train.jsonl", rows)
    raw = read_choices(CUSTOM_CHOICE, "train", file=file)
    message = "line 2: the choice 'beno .* has 4 tokens, .* in --max_length 7: give at least 8"
    with pytest.raises(DataError, match=message):
        encode_choices(raw, tokenizer, 7, cache=False)
    assert len(encode_choices(raw, tokenizer, 8, cache=False)) == 2


def test_batches_hold_every_choice_of_their_questions(home: Path, tokenizer: Any) -> None:
    raw = read_choices(CUSTOM_CHOICE, "train", file=home / "arc" / "train.jsonl")
    split = encode_choices(raw, tokenizer, 40, cache=False)
    answers = [row["label"] for row in lines(home / "arc" / "train.jsonl")]
    seen = []
    for batch in evaluation_batches(split, 4, max_tokens=400):
        assert batch.tokens == split.lengths[batch.rows].sum() <= 400
        packed = collate_choices(split, batch, packed=True)
        padded = collate_choices(split, batch, multiple=8)
        assert packed["num_choices"] == padded["num_choices"] == split.counts.max() == 5
        assert packed["choice_counts"].tolist() == split.counts[batch.rows].tolist()
        assert packed["labels"].tolist() == [answers[row] for row in batch.rows]
        mask = padded["attention_mask"].bool()
        assert padded["input_ids"][mask].tolist() == packed["input_ids"].tolist()
        assert padded["token_type_ids"][mask].tolist() == packed["token_type_ids"].tolist()
        assert mask.sum() == batch.tokens and padded["input_ids"].shape[1] % 8 == 0
        expected = [
            token
            for row in batch.rows
            for text in raw.choices[row]
            for token in tokenizer.encode(raw.text[0][row], text)
        ]
        assert packed["input_ids"].tolist() == expected
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(31))
    epochs = TrainingBatches(split, 4).global_batches(0)
    assert sorted(r for g in epochs for m in g.micro_batches for r in m.rows) == list(range(31))
    alone = collate_choices(split, Batch(np.array([3]), 0))
    assert alone["input_ids"].shape[0] == split.counts[3]
