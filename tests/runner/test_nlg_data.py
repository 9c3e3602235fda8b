"""Text generation data: the published bytes from the published files, and clear refusals."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from examples.data import nlg, prepare_nlg
from examples.data.tables import Table
from examples.data.tasks.nlg import NLG_TASKS, nlg_task
from examples.errors import DataError

# task, split, rows, sums of the formatted and of the encoded file: those that the original recipe
# published, but for e2e train, whose raw file here differs from the original's (17 bytes).
SUMS = [
    ("e2e", "train", 42061, "1d98611f3ffc3690", "aee0e8fb6f4b4f4d"),
    ("e2e", "valid", 4672, "b8aea8e7c862d1c3", "05b3cbed305f6390"),
    ("e2e", "test", 4693, "9f774414e4dc8827", "32b4c41133c61d71"),
    ("webnlg", "train", 18025, "1b1f3d9e702d148e", "feec32171fe8f2c6"),
    ("webnlg", "valid", 2258, "f92c32802d38cb52", "ea13cfdc7352c296"),
    ("dart", "valid", 6980, "79cd5c51462e6db6", "809de854dfca2269"),
]
WEBNLG = {
    "entries": [
        {
            "1": {
                "category": "Airport",
                "modifiedtripleset": [
                    {"subject": "A", "property": "runwayLength", "object": "2.0"},
                    {"subject": "A", "property": "city", "object": "Århus"},
                ],
                "lexicalisations": [
                    {"comment": "good", "lex": "One."},
                    {"comment": "toFix", "lex": "Two."},
                    {"comment": "good", "lex": "Three."},
                ],
            }
        },
        {
            "2": {
                "category": "Politician",
                "modifiedtripleset": [{"subject": "B", "property": "p", "object": "C"}],
                "lexicalisations": [{"comment": "good", "lex": "Four."}],
            }
        },
    ]
}
DART = [{"tripleset": [["Mars", "HAS_MOON", "Phobos"]], "annotations": [{"text": "It has one."}]}]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's tokenizer without any merge: a token for each byte, 256 ends a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def run(task: str, data: Path | None, tokenizer: Path, output: Path, *more: str) -> int:
    where = [] if data is None else ["--data_dir", str(data)]
    options = ["--tokenizer", str(tokenizer), "--output_dir", str(output)]
    return prepare_nlg.main([task, *where, *options, *more])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# -- the published files ------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["e2e", "webnlg", "dart"])
def test_published_bytes(
    task: str, real_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = real_data("e2e/test.txt").parents[1]
    tokenizer = real_data("tokenizers/gpt2/vocab.json").parent
    assert run(task, data, tokenizer, tmp_path / "not" / "yet") == 0
    said = capsys.readouterr().out
    for name, split, count, formatted, encoded in SUMS:
        if name != task:
            continue
        for suffix, wanted in (("_formatted", formatted), ("", encoded)):
            data = (tmp_path / "not" / "yet" / f"{split}{suffix}.jsonl").read_bytes()
            assert hashlib.sha256(data).hexdigest().startswith(wanted), (split, suffix)
        assert f"{task}: {split} {count:,} rows" in said
    assert ("the test split is skipped" in said) == (task != "e2e")


def test_gpt2_tokens_of_the_recipe(real_data: Callable[[str], Path]) -> None:
    from transformers_patched import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data("tokenizers/gpt2/vocab.json").parent)
    assert type(tokenizer).__name__ == "GPT2Tokenizer" and len(tokenizer) == 50257
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert tokenizer.eos_token_id == 50256 and tokenizer.encode("\n\n") == [628]


def test_boolq_split_of_dev(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real_data("boolq/dev.jsonl").parent
    tokenizer = real_data("tokenizers/gpt2/vocab.json").parent
    assert run("boolq", folder, tokenizer, tmp_path, "--split_dev") == 0
    raw = rows(folder / "dev.jsonl")
    written = [
        row for s in ("train", "valid", "test") for row in rows(tmp_path / f"{s}_formatted.jsonl")
    ]
    assert [len(rows(tmp_path / f"{s}.jsonl")) for s in ("train", "valid", "test")] == [
        2270,
        500,
        500,
    ]
    for old, new in zip(raw, written, strict=True):
        assert new["context"] == f"{old['passage']} {old['question']}?"
        assert new["completion"] == str(old["answer"]).lower()
    assert round(sum(row["completion"] == "true" for row in written) / 3270, 4) == 0.6217


def test_xsum_rows(real_data: Callable[[str], Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    path = real_data("xsum/test-1000.jsonl")
    assert run("XSum", path.parents[1], tokenizer_dir, tmp_path) == 0
    old, new = rows(path), rows(tmp_path / "test_formatted.jsonl")
    assert [(r["document"], r["summary"]) for r in old] == [
        (r["context"], r["completion"]) for r in new
    ]


# -- small files of each kind -------------------------------------------------------------------


def test_e2e_lines(tokenizer_dir: Path, tmp_path: Path) -> None:
    put(tmp_path / "E2E" / "Validation.txt", "name : X||An X . \nname : É || Y||more\n\n")
    assert run("e2e", tmp_path, tokenizer_dir, tmp_path / "out") == 0
    text = (tmp_path / "out" / "valid_formatted.jsonl").read_text()
    assert text == (
        '{"context": "name : X", "completion": "An X ."}\n'
        '{"context": "name : \\u00c9 ", "completion": " Y"}\n'
    )
    first = rows(tmp_path / "out" / "valid.jsonl")[0]
    assert len(first["context"]) == len("name : X") + 1
    assert len(first["completion"]) == len(" An X .") + 1
    assert first["context"][-1] == first["completion"][-1] == 256


@pytest.mark.parametrize("folder", ["webnlg_challenge_2017", "WebNLG-2017", "webnlg", ""])
def test_webnlg_entries(folder: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    put(tmp_path / folder / "dev.json", WEBNLG)
    assert run("webnlg", tmp_path, tokenizer_dir, tmp_path / "out") == 0
    found = rows(tmp_path / "out" / "valid_formatted.jsonl")
    context = "A : runwayLength : 2.0 | A : city : Århus"
    assert found == [
        {"context": context, "completion": "One.", "cate": True},
        {"context": context, "completion": "Three.", "cate": True},
        {"context": "B : p : C", "completion": "Four.", "cate": False},
    ]
    groups = nlg.instances(nlg.read_formatted(tmp_path / "out" / "valid_formatted.jsonl"))
    assert [(g.references, g.seen, g.rows) for g in groups] == [
        (["One.", "Three."], True, [0, 1]),
        (["Four."], False, [2]),
    ]


def test_dart_relations_are_lower_cased(tokenizer_dir: Path, tmp_path: Path) -> None:
    put(tmp_path / "dart" / "dart-v1.1.1-full-train.json", DART)
    assert run("dart", tmp_path, tokenizer_dir, tmp_path / "out") == 0
    [row] = rows(tmp_path / "out" / "train_formatted.jsonl")
    assert row == {"context": "Mars : has_moon : Phobos", "completion": "It has one."}


def test_test_questions_without_answers_are_skipped(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = {"question": "is it", "passage": "It is."}
    put(tmp_path / "boolq" / "test.jsonl", json.dumps(row) + "\n")
    put(tmp_path / "boolq" / "train.jsonl", json.dumps(row | {"answer": True}) + "\n")
    assert run("boolq", tmp_path, tokenizer_dir, tmp_path / "out") == 0
    assert "test.jsonl has no answers" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["train.jsonl", "train_formatted.jsonl"]


def test_the_hub_is_read_without_data_dir(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def table(name: str, config: str | None, split: str) -> Table:
        asked.append((name, split))
        return Table(name, {"document": ["Long."], "summary": [split], "id": ["1"]}, [0], "row")

    monkeypatch.setattr(prepare_nlg, "hub_table", table)
    assert run("xsum", None, tokenizer_dir, tmp_path) == 0
    assert asked == [("EdinburghNLP/xsum", s) for s in ("train", "validation", "test")]
    [row] = rows(tmp_path / "valid_formatted.jsonl")
    assert row["completion"] == "validation"


def test_rows_are_tokenised_in_chunks_without_seams(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "e2e" / "test.txt", "".join(f"a : {i // 3}||b {i}\n" for i in range(20)))
    assert run("e2e", tmp_path, tokenizer_dir, tmp_path / "one") == 0
    monkeypatch.setattr(prepare_nlg, "CHUNK", 7)
    assert run("e2e", tmp_path, tokenizer_dir, tmp_path / "two") == 0
    one, two = ((tmp_path / name / "test.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two and one.count(b"\n") == 20


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "name", "content", "says"),
    [
        ("e2e", "train.txt", "a||b\nonly a table\n", "train.txt, line 2: no '||'"),
        ("e2e", "train.txt", "\n", "empty"),
        ("webnlg", "train.json", {"entries": [{"2": {}}]}, "train.json, entry 1: no '1'"),
        ("webnlg", "train.json", [], "array named entries"),
        ("webnlg", "train.json", '{"entries": [', "truncated JSON"),
        ("dart", "train.json", [{"tripleset": [["a", "b"]]}], "train.json, item 1: not of"),
        ("dart", "train.json", [{"annotations": []}], "train.json, item 1: no 'tripleset'"),
        ("boolq", "train.jsonl", '{"question": "q", "answer": true}', "no 'passage'"),
        (
            "boolq",
            "train.jsonl",
            '{"question": "q", "passage": "p", "answer": "yes"}',
            "line 1: 'answer' must be true or false, found 'yes'",
        ),
        ("xsum", "train.jsonl", '{"document": "d", "summary": null}', "line 1: 'summary' must"),
    ],
)
def test_damaged_files_are_named(
    task: str,
    name: str,
    content: Any,
    says: str,
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    put(tmp_path / task / name, content)
    assert run(task, tmp_path, tokenizer_dir, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_split_leaves_nothing_of_the_others(tokenizer_dir: Path, tmp_path: Path) -> None:
    put(tmp_path / "e2e" / "train.txt", "a||b\n")
    put(tmp_path / "e2e" / "test.txt", "damaged\n")
    assert run("e2e", tmp_path, tokenizer_dir, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_raw_files_are_not_written_over(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = json.dumps({"question": "q", "passage": "p", "answer": True}) + "\n"
    raw = put(tmp_path / "boolq" / "train.jsonl", row)
    assert run("boolq", tmp_path, tokenizer_dir, tmp_path / "boolq") == 2
    assert "would be written over" in capsys.readouterr().err
    assert raw.read_text() == row and [*raw.parent.iterdir()] == [raw]


@pytest.mark.parametrize(
    ("files", "more", "says"),
    [
        (["e2e/dev.txt", "e2e/valid.txt"], [], "both could be the split valid"),
        (["e2e/test.txt", "E2E_/test.txt"], [], "both E2E_ and e2e could be the folder"),
        (["e2e/other.txt"], [], "no file of e2e; looked for train.txt"),
        (["e2e/test.txt"], ["--split_dev"], "--split_dev is for boolq"),
    ],
)
def test_what_is_unclear_is_refused(
    files: list[str],
    more: list[str],
    says: str,
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    for name in files:
        put(tmp_path / name, "a||b\n")
    assert run("e2e", tmp_path, tokenizer_dir, tmp_path / "out", *more) == 2
    assert says in capsys.readouterr().err


def test_split_dev_takes_the_official_file_only(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = json.dumps({"question": "q", "passage": "p", "answer": True}) + "\n"
    put(tmp_path / "dev.jsonl", row * 3)
    assert run("boolq", tmp_path, tokenizer_dir, tmp_path / "out", "--split_dev") == 2
    assert "3 rows, but the official dev.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["e2e", "xsum", "nothing"])
def test_no_such_tokenizer_or_folder(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "e2e" / "test.txt", "a||b\n")
    if name == "nothing":
        with pytest.raises(SystemExit):
            run(name, tmp_path, tokenizer_dir, tmp_path / "out")
    elif name == "xsum":
        assert run("e2e", tmp_path / "missing", tokenizer_dir, tmp_path / "out") == 2
    else:
        assert run("e2e", tmp_path, tmp_path / "empty", tmp_path / "out") == 2


def test_task_names() -> None:
    assert [nlg_task(name.upper()).name for name in NLG_TASKS] == list(NLG_TASKS)
    assert nlg_task("webnlg-challenge-2017").name == "webnlg"
    with pytest.raises(ValueError, match="choose among e2e, webnlg"):
        nlg_task("mrpc")


# -- encoded files, as training reads them ------------------------------------------------------


def test_encoded_files_come_back(tokenizer_dir: Path, tmp_path: Path) -> None:
    put(tmp_path / "e2e" / "train.txt", "ab||c\nab||\nname : É||d e\n")
    assert run("e2e", tmp_path, tokenizer_dir, tmp_path) == 0
    data = nlg.read_encoded(tmp_path / "train.jsonl", vocab_size=257, eos_token_id=256)
    written = rows(tmp_path / "train.jsonl")
    assert len(data) == 3
    for number, row in enumerate(written):
        assert data.context(number) == row["context"]
        assert data.completion(number) == row["completion"]
    assert data.lengths.tolist() == [len(r["context"]) + len(r["completion"]) for r in written]
    assert data.first.tolist() == [len(r["context"]) for r in written]
    assert data.tokens.dtype == "int32" and len(data.tokens) == data.offsets[-1]


GOOD = '{"context": [1, 9], "completion": [2, 9]}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"context": [1, 9], "completion": [2', "line 2: truncated JSON"),
        ('{"context": [1, 9]}', "line 2: no 'completion'"),
        ('{"context": [1, 9], "completion": [10, 9]}', "line 2: 'completion' holds token 10, but"),
        ('{"context": [-1, 9], "completion": [9]}', "line 2: 'context' holds token -1"),
        ('{"context": [1, 8], "completion": [9]}', "line 2: 'context' ends with token 8, not"),
        ('{"context": [], "completion": [9]}', "line 2: 'context' is empty, not"),
        ('{"context": "name : X", "completion": "a"}', "a formatted file, perhaps"),
        ('{"context": [1.0, 9], "completion": [9]}', "line 2: 'context' must be a list of token"),
        ('{"context": [true, 9], "completion": [9]}', "line 2: 'context' must be a list of token"),
        ('{"context": [99999999999999999999, 9], "completion": [9]}', "line 2: 'context' must be"),
    ],
)
def test_damaged_encoded_files_are_named(line: str, says: str, tmp_path: Path) -> None:
    path = put(tmp_path / "train.jsonl", GOOD + line + "\n")
    with pytest.raises(DataError) as raised:
        nlg.read_encoded(path, vocab_size=10, eos_token_id=9)
    assert says in str(raised.value) and str(path) in str(raised.value)


def test_a_task_of_glue_is_no_encoded_file(tmp_path: Path) -> None:
    path = put(tmp_path / "train.jsonl", '{"sentence": "a", "label": 1}\n')
    with pytest.raises(DataError, match="no 'context' in its rows; found 'sentence', 'label'"):
        nlg.read_encoded(path, vocab_size=10, eos_token_id=9)
