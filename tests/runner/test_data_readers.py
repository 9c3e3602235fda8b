"""Readers: every layout read right, every broken file refused by file, line and reason."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from examples.data.custom import Columns
from examples.data.readers import RawSplit, find_split, read_file, read_hub, read_split
from examples.data.tables import DataError, read_table, write_table
from examples.data.tasks import CUSTOM, GLUE_TASKS, TASKS, get_task

MRPC = get_task("mrpc")
HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
COLUMNS = {"sentence1": ["a b", "c"], "sentence2": ["d", "é ‘q’"], "label": [1, 0]}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# -- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "split", "counts"),
    [
        ("cola", "train", {1: 6023, 0: 2528}),
        ("cola", "validation", {1: 721, 0: 322}),
        ("mrpc", "train", {1: 2474, 0: 1194}),
        ("mrpc", "validation", {1: 279, 0: 129}),
        ("mrpc", "test", {1: 1147, 0: 578}),
        ("sst2", "train", {1: 37569, 0: 29780}),
        ("sst2", "validation", {1: 444, 0: 428}),
        ("qnli", "validation", {0: 2702, 1: 2761}),
        ("mnli", "validation_matched", {0: 3479, 1: 3123, 2: 3213}),
    ],
)
def test_official_files(
    real_data: Callable[[str], Path], task: str, split: str, counts: dict[int, int]
) -> None:
    rows = read_split(get_task(task), real_data("glue"), split)
    assert Counter(rows.labels) == counts
    assert len(rows) == sum(counts.values())
    assert all(len(column) == len(rows) for column in rows.text)


def test_official_files_without_labels_and_with_scores(real_data: Callable[[str], Path]) -> None:
    glue = real_data("glue")
    for task, count in (("cola", 1063), ("stsb", 1379)):
        rows = read_split(get_task(task), glue, "test")
        assert (len(rows), rows.labels, rows.ids[:2]) == (count, None, ["0", "1"])
    scores = read_split(get_task("stsb"), glue, "train").labels
    assert (len(scores), min(scores), max(scores), scores[1]) == (5749, 0.0, 5.0, 3.8)
    assert len(read_split(get_task("stsb"), glue, "validation")) == 1500
    assert len(read_file(get_task("qqp"), real_data("glue/QQP/sample.tsv"))) == 23496


def test_quotes_in_tsv_are_characters(real_data: Callable[[str], Path]) -> None:
    rows = read_split(MRPC, real_data("glue"), "validation")
    assert (
        rows.text[1][0] == '"The foodservice pie business does not fit our long-term growth '
        "strategy."
    )
    assert rows.where(0).endswith("dev.tsv, line 2")


def test_the_bundled_task_needs_no_folder() -> None:
    task = get_task("wording")
    assert Counter(read_split(task, None, "validation").labels) == {0: 200, 1: 200}
    assert len(read_split(task, None, "train")) >= 2000


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tsv", "csv", "json", "jsonl", "parquet"])
def test_one_table_in_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "MRPC" / f"train.{kind}"
    write_table(path, COLUMNS)
    rows = read_split(MRPC, tmp_path, "train")
    assert rows.text == (["a b", "c"], ["d", "é ‘q’"])
    assert rows.labels == [1, 0]
    assert rows.ids == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "1\t1\t2\ta\tb\n0\t3\t4\tc\td\n",
        "\ufeff" + HEADER + "1\t1\t2\ta\tb\n0\t3\t4\tc\td",
        (HEADER + "1\t1\t2\ta\tb\n0\t3\t4\tc\td\n\n").replace("\n", "\r\n"),
        "label\tsentence1\tsentence2\n1\ta\tb\n0\tc\td\n",
        "sentence2\tlabel\tsentence1\nb\tequivalent\ta\nd\tnot_equivalent\tc\n",
    ],
)
def test_headers_marks_and_line_ends(tmp_path: Path, text: str) -> None:
    rows = read_file(MRPC, write(tmp_path / "x.tsv", text))
    assert rows.text == (["a", "c"], ["b", "d"])
    assert rows.labels == [1, 0]
    assert rows.lines == [2, 3]


def test_cola_with_and_without_header(tmp_path: Path) -> None:
    cola = get_task("cola")
    bare = read_file(cola, write(tmp_path / "a.tsv", "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n"))
    named = read_file(cola, write(tmp_path / "b.tsv", "sentence\tlabel\nOne.\t1\nTwo.\t0\n"))
    assert bare.text == named.text == (["One.", "Two."],)
    assert bare.labels == named.labels == [1, 0]
    assert (bare.lines, named.lines) == ([1, 2], [2, 3])


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "sentence\tlabel\na\u2028b\u0085c\x0cd\t1\ne\t0\n")
    assert read_file(get_task("sst2"), path).text == (["a\u2028b\u0085c\x0cd", "e"],)


def test_csv_quoting(tmp_path: Path) -> None:
    text = 'sentence1,sentence2,label\r\n"a, ""b""\nc",d,1\r\n"e",f"g,0\r\n'
    rows = read_file(MRPC, write(tmp_path / "x.csv", text))
    assert rows.text == (['a, "b"\nc', "e"], ["d", 'f"g'])
    assert rows.lines == [2, 4]


@pytest.mark.parametrize(
    "text",
    [
        '[{"sentence1": "a", "sentence2": "b", "label": 1}]',
        '{"version": "1",\n "data": [{"sentence1": "a", "sentence2": "b", "label": 1}]}',
        '{"sentence1": "a", "sentence2": "b", "label": 1}\n\n',
    ],
)
def test_three_kinds_of_json(tmp_path: Path, text: str) -> None:
    assert read_file(MRPC, write(tmp_path / "x.json", text)).text == (["a"], ["b"])


def test_label_names_follow_the_hub(tmp_path: Path) -> None:
    for task, names in (
        ("rte", ["entailment", "not_entailment"]),
        ("qnli", ["entailment", "not_entailment"]),
        ("mnli", ["entailment", "neutral", "contradiction"]),
        ("wnli", ["not_entailment", "entailment"]),
    ):
        columns = {name: ["x"] * len(names) for name in TASKS[task].text} | {"label": names}
        write_table(tmp_path / "x.jsonl", columns)
        assert read_file(TASKS[task], tmp_path / "x.jsonl").labels == list(range(len(names)))


def test_qqp_drops_rows_broken_by_line_ends_and_says_so(tmp_path: Path) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    path = write(tmp_path / "x.tsv", head + "1\t2\t3\ta\tb\t1\n4\t5\t6\tcut\nhere\td\t0\n")
    with pytest.warns(UserWarning, match="2 rows broken .*lines 3, 4"):
        assert read_file(get_task("qqp"), path).labels == [1]
    write(path, head + "1\t2\t3\ta\tb\t1\n4\t5\t6\ta\tstray tab\td\t0\n")
    with pytest.raises(DataError, match="line 3: 7 columns where 6 are expected"):
        read_file(get_task("qqp"), path)


# -- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["STS-B", "stsb", "sts_b", "StsB", "."])
@pytest.mark.parametrize("name", ["dev.tsv", "validation.jsonl", "validation.csv"])
def test_task_folders_are_found_in_any_spelling(tmp_path: Path, folder: str, name: str) -> None:
    columns = {"sentence1": ["a"], "sentence2": ["b"], "score": [2.5]}
    write_table(tmp_path / folder / name, columns)
    assert read_split(get_task("STS-B"), tmp_path, "validation").labels == [2.5]


def test_mnli_keeps_its_two_sets_apart(tmp_path: Path) -> None:
    mnli = get_task("mnli")
    for split, label in (("dev_matched", "neutral"), ("dev_mismatched", "contradiction")):
        columns = {"sentence1": ["a"], "sentence2": ["b"], "gold_label": [label]}
        write_table(tmp_path / "MNLI" / f"{split}.tsv", columns)
    labels = {
        key: read_split(mnli, tmp_path, split).labels for key, split in mnli.evaluation.items()
    }
    assert labels == {"validation_matched": [1], "validation_mismatched": [2]}


def test_parquet_shards_are_joined_in_order(tmp_path: Path) -> None:
    for index, label in enumerate((1, 0)):
        columns = {"sentence1": [f"s{index}"], "sentence2": ["b"], "label": [label]}
        write_table(tmp_path / f"train-0000{index}-of-00002.parquet", columns)
    rows = read_split(MRPC, tmp_path, "train")
    assert (rows.text[0], rows.labels) == (["s0", "s1"], [1, 0])


def test_two_candidates_are_an_error(tmp_path: Path) -> None:
    write_table(tmp_path / "MRPC" / "train.csv", COLUMNS)
    write_table(tmp_path / "MRPC" / "train.jsonl", COLUMNS)
    with pytest.raises(DataError, match=r"train\.csv and train\.jsonl"):
        find_split(MRPC, tmp_path, "train")
    (tmp_path / "mrpc").mkdir()
    with pytest.raises(DataError, match="both MRPC and mrpc"):
        find_split(MRPC, tmp_path, "train")


@pytest.mark.parametrize(
    ("folder", "words"),
    [("absent", ["absent", "no such folder"]), (".", ["train", ".parquet", "holds", "notes.txt"])],
)
def test_missing_files_name_what_was_looked_for(
    tmp_path: Path, folder: str, words: list[str]
) -> None:
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(DataError) as error:
        read_split(MRPC, tmp_path / folder, "train")
    for word in words:
        assert word in str(error.value)


# -- broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.tsv", "", ["empty"]),
        ("x.tsv", HEADER, ["empty"]),
        ("x.tsv", HEADER + "1\t1\t2\ta\tb\n1\t1\t2\ta\tb\tc\n", ["line 3", "6 columns", "tab"]),
        ("x.tsv", HEADER + "1\t1\t2\ta\n", ["line 2", "4 columns where 5"]),
        ("x.tsv", HEADER + "2\t1\t2\ta\tb\n", ["line 2", "label 2 is out of range", "equivalent"]),
        ("x.tsv", HEADER + "same\t1\t2\ta\tb\n", ["line 2", "unknown label 'same'"]),
        ("x.tsv", HEADER + "1.0\t1\t2\ta\tb\n", ["line 2", "unknown label '1.0'"]),
        ("x.tsv", HEADER + "-1\t1\t2\ta\tb\n", ["line 2", "no label ('-1')", "unlabelled"]),
        ("x.tsv", HEADER + "1\t1\t2\ta\tb\n\t1\t2\ta\tb\n", ["line 3", "no label", "1 of 2"]),
        ("x.tsv", "a\tb\tlabel\nx\ty\t1\n", ["'sentence1' or '#1 String'", "found 'a', 'b'"]),
        ("x.tsv", "sentence1\tsentence2\nx\ty\n", ["'label' or 'Quality'", "found"]),
        ("x.tsv", "label\tsentence1\tsentence2\tlabel\n1\ta\tb\t1\n", ["two columns", "'label'"]),
        ("x.tsv", HEADER.encode() + b"1\t1\t2\tcaf\xe9\tb\n", ["line 2", "0xe9", "Latin-1"]),
        ("x.tsv", HEADER.encode("utf-16"), ["line 1", "UTF-16"]),
        ("x.tsv", HEADER + "1\t1\t2\ta\0\tb\n", ["line 2", "NUL"]),
        ("x.csv", "sentence1,sentence2,label\na,b\n", ["line 2", "2 columns where 3"]),
        ("x.csv", 'sentence1,sentence2,label\na,b,1\n"a,b,1\nc,d,0\n', ["line 3", "quote"]),
        ("x.csv", 'sentence1,sentence2,label\n"a"b,c,1\n', ["line 2", "quote"]),
        ("x.csv", "sentence1,sentence2,label\na,b, 1\n", ["line 2", "unknown label ' 1'"]),
        ("x.jsonl", '{"sentence1": "a", "senten', ["line 1", "truncated"]),
        ("x.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sen', ["line 2", "trunc"]),
        ("x.jsonl", '{"sentence1": "a"},\n', ["line 1", "not JSON"]),
        ("x.jsonl", "[1]\n", ["line 1", "object is expected", "[1]"]),
        (
            "x.jsonl",
            '{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sentence1": "a", "label": 1}\n',
            ["line 2", "no 'sentence2'"],
        ),
        (
            "x.jsonl",
            '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
            '{"sentence1": "a", "sentence2": "b", "label": 1, "x": 1}\n',
            ["line 2", "'x'"],
        ),
        ("x.jsonl", '{"sentence1": 5, "sentence2": "b", "label": 1}', ["line 1", "text, found 5"]),
        ("x.jsonl", '{"sentence1": null, "sentence2": "b", "label": 1}', ["found nothing"]),
        ("x.jsonl", '{"sentence1": "\\ud800", "sentence2": "b", "label": 1}', ["surrogate"]),
        ("x.jsonl", '{"sentence1": "a", "sentence2": "b", "label": true}', ["label True"]),
        ("x.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1.0}', ["label 1.0"]),
        ("x.jsonl", '{"sentence1": "a", "sentence2": "b", "label": [1]}', ["label [1]"]),
        ("x.jsonl", '{"sentence1": "a", "sentence2": "b", "label": -1}', ["no label (-1)"]),
        ("x.jsonl", "[" * 100_000, ["line 1", "not JSON"]),
        ("x.jsonl", "9" * 5000, ["line 1", "not JSON"]),
        ("x.json", '[{"sentence1": "a"', ["truncated"]),
        ("x.json", '[{"sentence1": "a"}, 5]', ["item 2", "object is expected"]),
        ("x.json", '{"rows":\n []}', ["array named data"]),
        ("x.json", "[]", ["empty"]),
        ("x.parquet", "PAR1 no", ["damaged or not parquet"]),
        ("x.xlsx", "PK", ["unknown format '.xlsx'", ".parquet"]),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str | bytes, words: list[str]) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as error:
        read_file(MRPC, path)
    message = str(error.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("5.1", "0 to 5"),
        ("-1", "no label"),
        ("-0.5", "0 to 5"),
        ("nan", "finite"),
        ("high", "number"),
        ("", "no label"),
    ],
)
def test_scores_are_checked(tmp_path: Path, score: str, words: str) -> None:
    path = write(tmp_path / "x.tsv", f"sentence1\tsentence2\tscore\na\tb\t5.0\na\tb\t{score}\n")
    with pytest.raises(DataError, match=f"line 3: .*{words}"):
        read_file(get_task("stsb"), path)


def test_an_unlabelled_test_split_is_fine(tmp_path: Path) -> None:
    write_table(tmp_path / "test.jsonl", COLUMNS | {"label": [-1, -1], "idx": [7, 9]})
    rows = read_split(MRPC, tmp_path, "test")
    assert (rows.labels, rows.ids) == (None, [7, 9])


def test_the_hidden_scores_of_the_hub(tmp_path: Path) -> None:
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [-1.0, -1.0]}
    write_table(tmp_path / "test.parquet", columns)
    assert read_split(get_task("stsb"), tmp_path, "test").labels is None
    with pytest.raises(DataError, match="row 1: no label .* in 2 of 2 rows"):
        read_file(get_task("stsb"), tmp_path / "test.parquet", "train")


# -- files of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "values", "text", "labels", "numbers"),
    [
        (
            "premise,claim,label",
            ["no", "yes", "no"],
            ("premise", "claim"),
            ("no", "yes"),
            [0, 1, 0],
        ),
        (
            "x,sentence2,sentence1,label",
            ["1", "10", "2"],
            ("sentence1", "sentence2"),
            ("1", "2", "10"),
            [0, 2, 1],
        ),
        ("id,label,text", ["1", "0", "0"], ("text",), ("0", "1"), [1, 0, 0]),
        ("a,b,label", ["True", "False", "True"], ("a", "b"), ("False", "True"), [1, 0, 1]),
        ("text,label", ["1.5", "-2", "1e3"], ("text",), (), [1.5, -2.0, 1000.0]),
    ],
)
def test_custom_files(
    tmp_path: Path, header: str, values: list[str], text: tuple, labels: tuple, numbers: list
) -> None:
    names = header.split(",")
    columns = {name: [f"{name}{i}" for i in range(3)] for name in names} | {"label": values}
    write_table(tmp_path / "train.csv", columns)
    rows = read_file(CUSTOM, tmp_path / "train.csv")
    assert (rows.task.text, rows.task.labels, rows.labels) == (text, labels, numbers)
    assert rows.task.regression == (not labels)
    assert rows.text[0] == [f"{text[0]}{i}" for i in range(3)]
    # The validation file is read with what the training file decided.
    write_table(tmp_path / "validation.csv", {k: v[1:] for k, v in columns.items()})
    assert read_file(rows.task, tmp_path / "validation.csv", "validation").labels == numbers[1:]


# Rows of two sentences and of what stands beside them in files of one's own.
TEXTS = ["a fine film", "not good", "so so", "a fine cast"]
BESIDE = {
    "": ["0", "1", "2", "3"],
    "Unnamed: 0.1": ["a b", "c d", "e f", "g h"],
    "date": ["2 May 2024", "3 May 2024", "4 May 2024", "5 May 2024"],
    "day": ["2024-05-02", "2024-05-03", "2024-05-04", "2024-05-05"],
    "user_id": ["ann b", "bob c", "cy d", "dee e"],
    "userId": ["ann b", "bob c", "cy d", "dee e"],
    "stars": ["3", "1", "2", "3"],
    "source": ["imdb", "yelp", "imdb", "imdb"],
    "label_text": ["very good", "bad", "bad", "very good"],
    "feeling": ["very good", "bad", "bad", "very good"],
}


@pytest.mark.parametrize("text", ["text", "Text", "sentence", "review"])
@pytest.mark.parametrize("beside", [[name] for name in BESIDE] + [[*BESIDE]])
def test_custom_columns_that_are_no_text(tmp_path: Path, text: str, beside: list[str]) -> None:
    """Indices, dates, numbers, categories, and the label once more in words, which would leak."""
    labels = ["pos", "neg", "neg", "pos"]
    columns = {name: BESIDE[name] for name in beside} | {text: TEXTS, "label": labels}
    write_table(tmp_path / "x.csv", columns)
    rows = read_file(CUSTOM, tmp_path / "x.csv")
    assert (rows.task.text, rows.text) == ((text,), (TEXTS,))
    unused = ", ".join(map(repr, beside))
    assert rows.found == (
        f"{tmp_path / 'x.csv'}: text in {text!r}; label in 'label', 2 classes: neg, pos; not used: "
        f"{unused}"
    )


def test_the_user_names_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    columns = {"a": TEXTS, "text": ["x"] * 4, "b": TEXTS[::-1], "label": ["0"] * 4}
    write_table(path, columns | {"verdict": ["no", "yes", "yes", "no"]})
    rows = read_file(CUSTOM, path, columns=Columns(("b", "a"), "verdict"))
    assert (rows.text, rows.labels) == ((TEXTS[::-1], TEXTS), [0, 1, 1, 0])
    again = read_file(rows.task, path, "validation")
    assert (again.text, again.labels) == (rows.text, rows.labels)
    assert read_file(CUSTOM, path, columns=Columns(label="verdict")).text == (["x"] * 4,)
    write_table(tmp_path / "test.csv", {name: columns[name] for name in ("a", "b")})
    assert read_file(rows.task, tmp_path / "test.csv", "test").labels is None
    for wrong, words in (
        (Columns(("c",)), "no column 'c', which --text_column names; found 'a', 'text', 'b'"),
        (Columns(label="c"), "no column 'c'; found 'a', 'text', 'b'"),
        (Columns(("label",)), "'label' cannot be both text and label"),
    ):
        with pytest.raises(DataError, match=words) as error:
            read_file(CUSTOM, path, columns=wrong)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["text", "sentence"], ["title", "body", "url"]])
def test_custom_columns_that_could_all_be_the_text(tmp_path: Path, names: list[str]) -> None:
    write_table(tmp_path / "x.csv", dict.fromkeys(names, TEXTS) | {"label": ["0", "1", "0", "1"]})
    with pytest.raises(DataError) as error:
        read_file(CUSTOM, tmp_path / "x.csv")
    message = str(error.value)
    assert message.startswith(str(tmp_path / "x.csv")) and f"--text_column {names[0]}" in message
    assert all(repr(name) in message for name in names)


@pytest.mark.parametrize(
    ("values", "classes", "numbers"),
    [
        ([10**400, 5, 5, 5], ("5", str(10**400)), [1, 0, 0, 0]),
        (["1", "3", "2", "3"], ("1", "2", "3"), [0, 2, 1, 2]),
        (["1234567890", "123", "98765432109876543210", "123"], None, [1, 0, 2, 0]),
        (["1.0", "0.0", "1.0", "0.0"], ("0.0", "1.0"), [1, 0, 1, 0]),
        (["1", "1.0", "0", "0.0"], ("0", "1"), [1, 1, 0, 0]),
        (["+1", "-1", "-1", "+1"], ("-1", "+1"), [1, 0, 0, 1]),
        (["pos ", "pos", " neg", "neg"], ("neg", "pos"), [1, 1, 0, 0]),
        (["01", "02", "10", "01"], ("01", "02", "10"), [0, 1, 2, 0]),
        (["1_0", "1_1", "1_0", "1_1"], ("1_0", "1_1"), [0, 1, 0, 1]),
        ([1234567890, 5, 5, 5], ("5", "1234567890"), [1, 0, 0, 0]),
        ([1.0, 0.0, 0.0, 1.0], ("0.0", "1.0"), [1, 0, 0, 1]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        ([1, 0.5, 2, 0], (), [1.0, 0.5, 2.0, 0.0]),
        (["1", ".5", "2.", "1e1"], (), [1.0, 0.5, 2.0, 10.0]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_the_kind_of_custom_labels(
    tmp_path: Path, kind: str, values: list, classes: tuple[str, ...] | None, numbers: list
) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "parquet" and 10**400 in values:
        pytest.skip("parquet has no such numbers")
    if kind == "parquet" and any(isinstance(v, float) for v in values):
        values = [float(v) for v in values]  # a column has one type
    write_table(path, {"text": TEXTS, "label": values})
    rows = read_file(CUSTOM, path)
    if classes is not None:
        assert rows.task.labels == classes
    assert (rows.labels, rows.task.regression) == (numbers, classes == ())
    # Another file of the same data may write them otherwise.
    other = [float(v) if type(v) is int and v < 2**53 else v for v in values]
    write_table(tmp_path / "v.jsonl", {"text": TEXTS, "label": other})
    assert read_file(rows.task, tmp_path / "v.jsonl", "validation").labels == numbers


@pytest.mark.parametrize("gap", ["", "  ", None, math.nan])
def test_custom_rows_without_a_label(tmp_path: Path, gap: object) -> None:
    write_table(tmp_path / "x.jsonl", {"text": TEXTS[:3], "label": ["a", gap, "b"]})
    with pytest.raises(DataError, match="line 2: no label"):
        read_file(CUSTOM, tmp_path / "x.jsonl")
    task = replace(CUSTOM, text=("text",), labels=("a", "b"))
    assert read_file(task, tmp_path / "x.jsonl", "test").labels is None


def test_scores_among_which_one_is_no_number(tmp_path: Path) -> None:
    for odd in ("n/a", 10**400):
        path = tmp_path / "x.jsonl"
        write_table(path, {"text": TEXTS, "label": [1.5, 2, odd, 2.5]})
        with pytest.raises(DataError, match="line 3: 'label' is .*, but other rows have numbers"):
            read_file(CUSTOM, path)


def test_what_was_found_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_table(path, {"text": TEXTS, "label": [0.5, -1, 3, 2]})
    assert read_file(CUSTOM, path).found.endswith("label in 'label', a regression from -1 to 3")
    write_table(path, {"text": ["x"] * 30, "label": [f"l{i:02}\nx" for i in range(30)]})
    found = read_file(CUSTOM, path).found
    assert "30 classes: l00 x, l01 x, " in found and found.endswith("l19 x and 10 more")
    assert read_file(MRPC, write(tmp_path / "m.tsv", HEADER + "1\t1\t2\ta\tb\n")).found == ""


def test_custom_labels_are_names_in_every_format(tmp_path: Path) -> None:
    for kind in ("json", "jsonl", "csv", "tsv", "parquet"):
        path = tmp_path / f"x.{kind}"
        write_table(path, {"text": ["a", "b", "c"], "label": [3, 1, 3]})
        rows = read_file(CUSTOM, path)
        assert (rows.task.labels, rows.labels) == (("1", "3"), [1, 0, 1])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a"]}, "no column 'label'; found 'text'"),
        ({"id": ["a"], "label": [1]}, "no text column"),
        ({"text": ["a", "b"], "label": [1, 1]}, "1 kinds of label"),
        ({"text": ["a", "b"], "label": [1, None]}, "kinds of label"),
        ({"text": ["a", "b", "c"], "label": [1, 0, None]}, "line 3: no label"),
        ({"text": ["a", "b"], "label": [[1], [0]]}, "names or numbers"),
    ],
)
def test_custom_files_that_cannot_be_used(tmp_path: Path, columns: dict, words: str) -> None:
    write_table(tmp_path / "x.jsonl", columns)
    with pytest.raises(DataError) as error:
        read_file(CUSTOM, tmp_path / "x.jsonl")
    assert words in str(error.value)


def test_a_label_the_training_file_does_not_have(tmp_path: Path) -> None:
    write_table(tmp_path / "t.jsonl", {"text": ["a", "b"], "label": ["x", "y"]})
    write_table(tmp_path / "v.jsonl", {"text": ["a", "b"], "label": ["x", "z"]})
    task = read_file(CUSTOM, tmp_path / "t.jsonl").task
    with pytest.raises(DataError, match="line 2: unknown label 'z'; the training file has x, y"):
        read_file(task, tmp_path / "v.jsonl", "validation")


# -- hub, tasks, writing --------------------------------------------------------------------------


def test_a_dataset_folder_reads_as_a_hub_id_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_table(tmp_path / "data" / "train.jsonl", COLUMNS)
    rows = read_hub(MRPC, str(tmp_path / "data"), None, "train")
    assert (rows.text, rows.labels) == ((["a b", "c"], ["d", "é ‘q’"]), [1, 0])
    with pytest.raises(DataError, match="split test: cannot be read from the hub"):
        read_hub(MRPC, str(tmp_path / "data"), None, "test")


def test_the_class_names_that_a_dataset_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dataset's order, which is no alphabet's; GLUE's datasets keep their numbers."""
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["sport", "arts", "business"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    data = {"text": TEXTS, "label": [1, 0, -1, 1]}
    made = datasets.Dataset.from_dict(data, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: made.select([0, 1, 3]))
    rows = read_hub(CUSTOM, "news", None, "train")
    assert (rows.task.labels, rows.labels) == (("sport", "arts", "business"), [1, 0, 1])
    assert "3 classes: sport, arts, business" in rows.found
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: made)
    assert read_hub(rows.task, "news", None, "test").labels is None  # one is hidden
    sst2 = replace(get_task("sst2"), text=("text",))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: made.select([0, 1]))
    assert read_hub(sst2, "sst2", None, "train").labels == [1, 0]


def test_tasks_are_complete_and_light() -> None:
    assert GLUE_TASKS == ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
    for task in TASKS.values():
        assert task.main_metric in task.metrics
        assert task.num_labels == (1 if task.regression else len(task.labels))
        assert len(task.text) in (1, 2)
    assert get_task("MNLI").test_splits == ("test_matched", "test_mismatched")
    assert get_task("stsb").label_range == (0.0, 5.0)
    with pytest.raises(ValueError, match="unknown task 'boolq'; choose among cola, mnli"):
        get_task("boolq")


def test_rows_can_be_picked(tmp_path: Path) -> None:
    write_table(tmp_path / "x.jsonl", COLUMNS)
    rows = read_file(MRPC, tmp_path / "x.jsonl")
    picked = rows.take([1, 1, 0])
    assert isinstance(picked, RawSplit)
    assert (picked.text[0], picked.labels) == (["c", "c", "a b"], [0, 0, 1])
    assert picked.where(0).endswith("x.jsonl, line 2")


@pytest.mark.parametrize(
    ("name", "value"), [("x.tsv", "a\tb"), ("x.tsv", "a\nb"), ("x.csv", "a\0"), ("x.doc", "a")]
)
def test_what_a_format_cannot_hold_is_not_written(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(DataError):
        write_table(tmp_path / name, {"text": [value]})
    assert list(tmp_path.iterdir()) == []


def test_a_field_may_be_long(tmp_path: Path) -> None:
    """Longer than the csv module's own limit, which is put back: it is the whole process's."""
    before = csv.field_size_limit(1000)
    long = "word " * 50_000
    write_table(tmp_path / "x.csv", {"text": [long]})
    assert read_table(tmp_path / "x.csv").columns["text"] == [long]
    with pytest.raises(DataError):
        read_table(write(tmp_path / "y.csv", 'text\n"x'))
    assert csv.field_size_limit(before) == 1000
    write_table(tmp_path / "x.json", {"text": [long]})
    assert json.loads((tmp_path / "x.json").read_text())[0]["text"] == long
