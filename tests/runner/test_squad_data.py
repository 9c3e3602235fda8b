"""Questions about paragraphs: files read and refused; windows equal to the rules' plain ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.runner_cases import tiny_bert
from support.squad_cases import layout, question, squad_task, windows

from examples.data import squad_features
from examples.data.squad import SquadSplit, find_squad, read_squad, read_squad_hub
from examples.data.squad_features import featurise
from examples.data.tables import write_table
from examples.data.tasks.squad import squad_task as task_named
from examples.errors import DataError
from transformers_patched import AutoTokenizer
from transformers_patched.tokenization import BertTokenizer, DebertaV2Tokenizer, RobertaTokenizer

CONTEXT = "The tall  tower was built in (1889-1891) by Gustave."


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def one(**changes: object) -> dict:
    """A good file of one question, with changes to the question."""
    asked = {**question("q1", "Who built it?", CONTEXT, "Gustave"), **changes}
    return layout((CONTEXT, [asked]))


# --- reading -------------------------------------------------------------------------------------


def test_the_official_layout(tmp_path: Path) -> None:
    other = "A b c."
    content = layout(
        (CONTEXT, [question("q1", "Who?", CONTEXT, "Gustave", "by Gustave")]),
        (other, [question("q2", " What ", other, "b"), question("q3", "And?", other, "c")]),
    )
    raw = read_squad(write(tmp_path / "f.json", content))
    assert raw.contexts == [CONTEXT, other] and raw.paragraphs == [0, 1, 1]
    assert raw.ids == ["q1", "q2", "q3"] and raw.questions == ["Who?", " What ", "And?"]
    assert raw.answers == [["Gustave", "by Gustave"], ["b"], ["c"]]
    assert raw.starts[0] == [CONTEXT.index("Gustave"), CONTEXT.index("by")]
    few = raw.take([2])
    assert (few.contexts, few.paragraphs, few.answers) == ([other], [0], [["c"]])
    assert few.where(0) == f"{tmp_path / 'f.json'}, question q3"


def test_one_question_a_row(tmp_path: Path) -> None:
    rows = {
        "id": ["a", "b"], "context": [CONTEXT] * 2, "question": ["Who?", "Which?"],
        "answers": [{"text": ["Gustave"], "answer_start": [CONTEXT.index("Gustave")]},
                    {"text": [], "answer_start": []}],
    }  # fmt: skip
    write_table(tmp_path / "rows.jsonl", rows)
    raw = read_squad(tmp_path / "rows.jsonl", unanswerable=True)
    assert raw.contexts == [CONTEXT] and raw.answers == [["Gustave"], []]
    items = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    again = read_squad(write(tmp_path / "rows.json", {"data": items}), unanswerable=True)
    assert again.answers == raw.answers and again.ids == raw.ids


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"data": [\n{"title": }', "line 2, column 11: damaged JSON"),
        ({"rows": []}, "not in SQuAD's layout"),
        ({"data": [{"title": "x"}]}, 'article 0: no list "paragraphs"'),
        ({"data": [{"paragraphs": [{"context": "x"}]}]}, 'paragraph 0: no list "qas"'),
        ({"data": []}, "no question in it"),
        (one(id=7), "paragraph 0, question 0: its id is 7"),
        (one(question=" "), "question q1: its question is empty"),
        (one(question="\ud800"), "question q1: its question holds half a surrogate pair"),
        (layout(("  ", [question("q1", "Who?", "ab", "ab")])), "q1: its paragraph is empty"),
        (layout((None, [question("q1", "Who?", "ab", "ab")])), "q1: its paragraph is None"),
        (one(answers=[]), "question q1: it has no answer; --version_2_with_negative"),
        (one(answers=["Gustave"]), "question q1: answer_start is None"),
        (one(answers=[{"text": "Gustave", "answer_start": 3}]),
         "q1: the answer 'Gustave' is not at character 3 of its paragraph, where ' tall  '"),
        (one(answers=[{"text": "Gustave", "answer_start": 3}]), "stands; it is at 44"),
        (one(answers=[{"text": "Gustav E", "answer_start": 3}]), "it is nowhere in it"),
        (one(answers=[{"text": "T", "answer_start": -52}]), "not at character -52"),
        (one(answers=[{"text": "Gustave", "answer_start": "44"}]), "answer_start is '44'"),
        (one(is_impossible=True), "question q1: is_impossible, but it has the answer 'Gustave'"),
        (layout((CONTEXT, [question("q1", "Who?", CONTEXT, "by")] * 2)),
         "q1: there are two of this id, article 0, paragraph 0, question 0 and"),
    ],
)  # fmt: skip
def test_each_fault_is_named(tmp_path: Path, content: object, said: str) -> None:
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(DataError, match=f"^{path}") as error:
        read_squad(path)
    assert said in str(error.value)


def test_no_answer_where_it_is_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", one(answers=[], is_impossible=True))
    assert read_squad(path, unanswerable=True).answers == [[]]
    path = write(tmp_path / "g.json", one(answers=[], is_impossible=False))
    with pytest.raises(DataError, match="q1: not is_impossible, but it has no answer"):
        read_squad(path, unanswerable=True)
    content = one()
    del content["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    path = write(tmp_path / "h.json", content)
    assert read_squad(path, labelled=False).answers is None
    with pytest.raises(DataError, match="q1: no entry `answers`, which this split needs"):
        read_squad(path)


def test_files_are_found_by_version(tmp_path: Path) -> None:
    v1, v2 = task_named("SQuAD"), task_named("squad-v2.0")
    assert (v1.name, v2.name) == ("squad", "squad_v2")
    folder = tmp_path / "squad"
    folder.mkdir()
    names = [f"{split}-{v}.json" for split in ("train", "dev") for v in ("v1.1", "v2.0")]
    for name in names:
        (folder / name).touch()
    assert find_squad(v1, tmp_path, "validation").name == "dev-v1.1.json"
    assert find_squad(v2, folder, "train").name == "train-v2.0.json"
    with pytest.raises(DataError, match="looked for test-v1.1 or test with"):
        find_squad(v1, tmp_path, "test")
    with pytest.raises(ValueError, match="choose among squad, squad_v2"):
        task_named("squad3")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    found = {"text": ["by"], "answer_start": [CONTEXT.index("by")]}
    rows = [{"id": "a", "title": "t", "context": CONTEXT, "question": "?", "answers": found}]
    data = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: data)
    raw = read_squad_hub("rajpurkar/squad", None, "train", unanswerable=False)
    assert raw.answers == [["by"]] and raw.source == "rajpurkar/squad, split train"


# --- windows -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    return AutoTokenizer.from_pretrained(tiny_bert(tmp_path_factory.mktemp("bert")))


def split_of(context: str, asked: str, *answers: str) -> SquadSplit:
    starts = [context.index(answer) for answer in answers]
    return SquadSplit("f.json", [context], [0], ["q1"], [asked], [list(answers)], [starts])


def test_windows_start_a_stride_apart(bert: BertTokenizer) -> None:
    """Fact 25: 400 tokens of context, 10 of question, 384, 128: windows 0 and 128 of 371, 272."""
    bert.model_max_length = 384
    raw = split_of("bado " * 399 + "nosa", "bado " * 10, "nosa")
    found = featurise(raw, bert, cache=False)
    assert found.windows.tolist() == [0, 128] and found.window_lengths.tolist() == [371, 272]
    assert found.lengths.tolist() == [384, 285] and found.first.tolist() == [12, 12]
    # The first window does not hold the answer, the last token; it is kept.
    assert found.spans.tolist() == [[0, 0], [12 + 271] * 2]
    cut = featurise(raw, bert, max_query_length=4, cache=False)
    assert cut.first[0] == 6 and cut.window_lengths.tolist() == [377, 272]


TOKENIZERS = ["wordpiece", "byte-level", "sentencepiece"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, real_data: Callable[[str], Path], deberta_spm: Path):
    """Real vocabularies where there are any."""
    if request.param == "wordpiece":
        made = BertTokenizer.from_pretrained(real_data("tokenizers/bert-base-uncased"))
    elif request.param == "byte-level":
        made = RobertaTokenizer.from_pretrained(real_data("tokenizers/roberta"))
    else:
        made = DebertaV2Tokenizer.from_pretrained(deberta_spm)
    made.model_max_length = 512
    return made


@pytest.mark.filterwarnings("ignore:a sequence has")
def test_features_of_real_questions_follow_the_rules(
    tokenizer, real_data: Callable[[str], Path]
) -> None:
    raw = read_squad(real_data("squad/dev-v1.1.json"))
    raw = raw.take(range(0, len(raw), 50))  # 212 questions, 40 of the articles
    length, stride, query = 100, 33, 9
    found = featurise(
        raw, tokenizer, max_length=length, doc_stride=stride, max_query_length=query, cache=False
    )
    row = 0
    for q in range(len(raw)):
        context, start = raw.contexts[raw.paragraphs[q]], raw.starts[q][0]
        end = start + len(raw.answers[q][0])
        for ids, first, chars in windows(
            tokenizer, context, raw.questions[q], length, stride, query
        ):
            tokens = found.tokens[found.offsets[row] : found.offsets[row + 1]]
            assert tokens.tolist() == ids and found.first[row] == first
            assert found.questions[row] == q and found.window_lengths[row] == len(chars)
            own = found.chars[found.windows[row] : found.windows[row] + len(chars)].tolist()
            for (a, b), (c, d) in zip(own, chars, strict=True):
                assert context[a:b] == context[c:d].strip()
            hit = [i for i, (a, b) in enumerate(own) if b > start and a < end]
            s, e = found.spans[row] - first
            if found.spans[row].any():
                # It begins and ends with the first and the last token that have part of it.
                assert [s, e] == [hit[0], hit[-1]]
                assert context[own[s][0] : own[e][1]].find(raw.answers[q][0]) >= 0
            else:
                whole = hit and own[hit[0]][0] <= start and own[hit[-1]][1] >= end
                assert not whole
            row += 1
    assert row == len(found) > len(raw)


def test_the_answer_is_tightened(tokenizer) -> None:
    for answer in ("1889", "1891", "Gustave", "tall  tower"):
        raw = split_of(CONTEXT, "When?", answer)
        found = featurise(raw, tokenizer, cache=False)
        s, e = found.spans[0] - found.first[0]
        assert CONTEXT[found.chars[s, 0] : found.chars[e, 1]] == answer


def test_no_room(bert: BertTokenizer) -> None:
    bert.model_max_length = 40
    raw = split_of("bado " * 30, "gosa " * 20, "bado")
    with pytest.raises(DataError, match=r"f.json, question q1 \(20 tokens\): it leaves no room"):
        featurise(raw, bert, max_length=23, cache=False)
    with pytest.raises(DataError, match="leaves a window 10 tokens .* --doc_stride 10 or less"):
        featurise(raw, bert, max_length=33, doc_stride=11, cache=False)
    assert len(featurise(raw, bert, max_length=33, doc_stride=10, cache=False)) == 3
    with pytest.raises(ValueError, match="more than the 40 tokens this model takes"):
        featurise(raw, bert, max_length=41, cache=False)
    with pytest.raises(DataError, match="question q1 .* nothing of its paragraph"):
        featurise(split_of("\u200b", "Who?"), bert, max_length=33, cache=False)
    with pytest.raises(DataError, match="question q1: this tokenizer leaves nothing of the answer"):
        featurise(split_of("bado \u200b", "Who?", "\u200b"), bert, max_length=33, cache=False)


def test_the_cache_knows_every_setting(
    bert: BertTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert.model_max_length = 40
    raw = read_squad(squad_task(tmp_path / "data", {"train": 8}) / "train.json")
    settings = {"max_length": 30, "doc_stride": 5, "max_query_length": 6}
    made = []
    real = squad_features._featurise

    def counting(*args):
        made.append(args[3:])
        return real(*args)

    monkeypatch.setattr(squad_features, "_featurise", counting)

    def features(rows: SquadSplit = raw, **changes: int):
        return featurise(rows, bert, **{**settings, **changes}, cache_dir=tmp_path)

    first = features()
    again = features()
    assert len(made) == 1
    for name in squad_features.ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for changes in ({"max_length": 29}, {"doc_stride": 6}, {"max_query_length": 5}):
        features(**changes)
    other = raw.take(range(8))
    other.starts[3][0], other.answers[3][0] = 0, raw.contexts[raw.paragraphs[3]].split()[0]
    features(other)
    about = raw.take(range(8))
    about.paragraphs[7], about.starts[7][0] = 0, 0
    about.answers[7][0] = raw.contexts[0].split()[0]
    features(about)
    assert len(made) == 6
    bert.truncation_side = "left"
    try:
        features()
    finally:
        bert.truncation_side = "right"
    assert len(made) == 7
