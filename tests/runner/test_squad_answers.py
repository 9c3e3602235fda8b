"""Answers from logits equal to the rules' plain ones; exact match and F1; the program that scores.

The metric's own cases are the issue's and the official scripts' (1.1's rule for a question without
a prediction, 2.0's for empty texts).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runner_cases import tiny_bert
from support.squad_cases import layout, n_best, question, squad_task

from examples import evaluate_squad
from examples.data.squad import SquadSplit, read_squad
from examples.data.squad_features import SquadFeatures, featurise
from examples.errors import DataError
from examples.evaluation import squad_answers
from examples.evaluation.squad import Scorer, exact_match, f1, in_order, normalised
from examples.evaluation.squad_answers import Decoding, decode, write_answers
from transformers_patched import AutoTokenizer

STRIDE = 7


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> SquadFeatures:
    """Of 16 questions, about 30; words are cut into pieces, so texts repeat and overlap."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(folder / "bert"))
    raw = read_squad(squad_task(folder, {"dev": 16}, empty=True) / "dev.json", unanswerable=True)
    raw.contexts[1] = "bado  " * 15 + "bado"  # many equal texts, and two blanks between words
    raw = raw.take([0, 1, *range(4, 16)])
    twice = SquadSplit("f", ["bado  " * 15 + "bado."], [0], ["x"], ["gosa"], [["bado"]], [[6]])
    for name in ("ids", "questions", "answers", "starts"):
        getattr(raw, name).extend(getattr(twice, name))
    raw.paragraphs.append(len(raw.contexts))
    raw.contexts.extend(twice.contexts)
    made = featurise(raw, tokenizer, max_length=22, doc_stride=STRIDE, cache=False)
    assert len(made) > len(raw) + 8
    return made


def random_logits(features: SquadFeatures, seed: int, levels: int) -> np.ndarray:
    """(m, 2, L) of few different values, so that many are equal."""
    rng = np.random.default_rng(seed)
    shape = (len(features), 2, int(features.lengths.max()))
    logits = rng.integers(-levels, levels, shape).astype(np.float32) / 64
    inside = np.arange(shape[2]) < features.lengths[:, None, None]
    return np.where(inside, logits, -np.inf).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    levels=st.sampled_from([3, 50, 1000]),
    most=st.sampled_from([1, 2, 5, 20]),
    longest=st.sampled_from([1, 3, 30]),
    null=st.booleans(),
    threshold=st.sampled_from([0.0, -2.5, 4.0]),
    at_once=st.sampled_from([1, 4, 2048]),
)
def test_answers_follow_the_rules(
    features, seed, levels, most, longest, null, threshold, at_once
) -> None:
    logits = random_logits(features, seed, levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squad_answers, "FEATURES_AT_ONCE", at_once)
        found = decode(features, logits, Decoding(most, longest, null, threshold))
    raw = features.raw
    for q in range(len(raw)):
        rows = np.flatnonzero(features.questions == q)
        windows = []
        for row in rows:
            first = features.windows[row]
            own = features.chars[first : first + features.window_lengths[row]].tolist()
            windows.append((int(features.first[row]), own))
        given_logits = [logits[r, :, : features.lengths[r]].tolist() for r in rows]
        context = raw.contexts[raw.paragraphs[q]]
        entries, odds = n_best(context, windows, given_logits, most, longest, STRIDE, null)
        assert [e["text"] for e in found.n_best[q]] == [e["text"] for e in entries]
        for ours, plain in zip(found.n_best[q], entries, strict=True):
            assert ours == pytest.approx(plain)
        best = next(entry["text"] for entry in entries if entry["text"])
        assert found.best[q] == best
        assert found.texts[q] == ("" if null and odds > threshold else best)
        if null:
            assert found.null_odds[q] == pytest.approx(odds)
    assert null or found.null_odds is None


def test_an_answer_found_nowhere_is_called_empty(features) -> None:
    """All weight on the question: no pair lies in the window."""
    logits = random_logits(features, 0, 3)
    logits[:, :, 1] = 1000
    found = decode(features, logits, Decoding(n_best_size=1))
    entry = {"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "probability": 1.0}
    assert set(found.texts) == {"empty"} and found.n_best[0] == [entry]


def test_numbers_that_are_none_are_refused(features) -> None:
    logits = random_logits(features, 0, 3)
    for bad in (np.nan, np.inf):
        logits[3, 1, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            decode(features, logits, Decoding())


def test_files_are_the_official_ones(features, tmp_path: Path) -> None:
    found = decode(features, random_logits(features, 1, 50), Decoding(3, 30, True))
    path = write_answers(tmp_path / "out", features.raw, found)
    assert json.loads(path.read_text("utf-8")) == dict(
        zip(features.raw.ids, found.texts, strict=True)
    )
    n_bests = json.loads((tmp_path / "out" / "nbest_predictions.json").read_text("utf-8"))
    odds = json.loads((tmp_path / "out" / "null_odds.json").read_text("utf-8"))
    assert list(n_bests) == list(odds) == features.raw.ids
    for entries in n_bests.values():
        keys = {"text", "probability", "start_logit", "end_logit"}
        assert all(entry.keys() == keys for entry in entries)
        assert sum(entry["probability"] for entry in entries) == pytest.approx(1)


# --- metrics -------------------------------------------------------------------------------------


def test_words_that_are_compared() -> None:
    """Fact 24."""
    assert exact_match(normalised("The Cat!"), normalised("cat")) == 1
    assert f1(normalised("the big cat sat"), normalised("big cat")) == pytest.approx(0.8)
    assert exact_match(normalised(""), []) == f1(normalised("The"), []) == 1
    assert f1(["a"], []) == 0 and f1(["x", "x", "y"], ["x", "z"]) == pytest.approx(0.4)
    assert normalised("A theatre, anne’s  an-other") == ["theatre", "anne’s", "another"]


def golds(*answers: list[str]) -> SquadSplit:
    ids = [f"q{i}" for i in range(len(answers))]
    places = [[0] * len(own) for own in answers]
    return SquadSplit("f.json", ["x"], [0] * len(ids), ids, ["?"] * len(ids), [*answers], places)


def test_the_best_gold_counts_and_no_prediction_is_wrong() -> None:
    raw = golds(["a dog", "big cat"], ["the"], ["ten"], ["x"])
    scorer = Scorer(raw)
    texts = in_order(raw, {"q0": "the big cat sat", "q1": "", "q3": "x"}, "p.json")
    assert texts == ["the big cat sat", "", None, "x"]
    # "the" normalises to nothing, so q1 wants nothing.
    found = scorer.score(texts)
    assert found == pytest.approx({"exact": 50, "f1": 70, "total": 4})
    assert scorer.unanswered(texts) == ["q2"]


def test_questions_without_an_answer_have_their_own_means() -> None:
    found = Scorer(golds(["a b"], [], [])).score(["b c", "", "no"])
    assert found["HasAns_f1"] == pytest.approx(200 / 3) and found["HasAns_total"] == 1
    assert (found["NoAns_exact"], found["NoAns_f1"], found["NoAns_total"]) == (50, 50, 2)
    assert found["exact"] == pytest.approx(100 / 3)
    assert "HasAns_f1" not in Scorer(golds(["a"])).score(["b"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(-3, 3)), min_size=1))
def test_the_best_threshold(rows: list[tuple[bool, bool, int]]) -> None:
    """Beside every threshold tried by itself; equal odds may be parted, as officially."""
    raw = golds(*(["yes"] if has else [] for has, _, _ in rows))
    texts = ["yes" if right else "no" for _, right, _ in rows]
    odds = [float(value) + i / 1000 for i, (_, _, value) in enumerate(rows)]  # all different
    found = Scorer(raw).score(texts, odds)
    tried = []
    for threshold in (-10.0, *odds):
        said = [text if o <= threshold else "" for text, o in zip(texts, odds, strict=True)]
        tried.append(Scorer(raw).score(said)["f1"])
    assert found["best_f1"] == pytest.approx(max(tried))
    said = [t if o <= found["best_f1_thresh"] else "" for t, o in zip(texts, odds, strict=True)]
    if found["best_f1_thresh"]:
        assert Scorer(raw).score(said)["f1"] == pytest.approx(max(tried))


# --- the program ---------------------------------------------------------------------------------


def files(folder: Path, predictions: object) -> list[str]:
    context = "The dog saw the big cat."
    content = layout(
        (context, [question("a", "Who?", context, "dog"), question("b", "Whom?", context, "cat")])
    )
    # A position that is wrong does not matter to the score.
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 1000
    (folder / "data.json").write_text(json.dumps(content))
    text = predictions if isinstance(predictions, str) else json.dumps(predictions)
    (folder / "pred.json").write_text(text)
    names = {"--data": "data.json", "--pred": "pred.json", "--output": "out.json"}
    return [word for name, file in names.items() for word in (name, str(folder / file))]


def test_the_program_scores_a_file(tmp_path: Path, capsys) -> None:
    assert evaluate_squad.main(files(tmp_path, {"a": "The dog!", "b": "a big cat"})) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == pytest.approx({"exact": 50, "f1": (1 + 2 / 3) * 50, "total": 2})
    assert "f1                 83.3333" in capsys.readouterr().out


def test_the_program_names_unanswered_questions(tmp_path: Path, capsys) -> None:
    assert evaluate_squad.main(files(tmp_path, {"b": "cat"})) == 0
    assert json.loads((tmp_path / "out.json").read_text())["exact"] == 50
    assert "no prediction for 1 questions, which counts as wrong: a\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ({"a": "dog", "z": "x", "y": "x"}, "pred.json: question z and 1 more not in "),
        ({"a": ["dog"]}, "pred.json, question a: its answer is ['dog'], not a text"),
        (["dog"], "pred.json: {id: value} is expected"),
        ("{", "pred.json, line 1, column 2: damaged JSON"),
    ],
)
def test_the_program_names_faults(tmp_path: Path, capsys, predictions: object, said: str) -> None:
    assert evaluate_squad.main(files(tmp_path, predictions)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_the_program_writes_over_no_input(tmp_path: Path, capsys) -> None:
    words = files(tmp_path, {"a": "dog"})
    assert evaluate_squad.main([*words[:-1], words[3]]) == 2
    assert "one of the files to be scored" in capsys.readouterr().err


def test_null_odds_give_the_best_threshold(tmp_path: Path, capsys) -> None:
    words = files(tmp_path, {"a": "cow", "b": "cat"})
    (tmp_path / "odds.json").write_text('{"a": 3.5, "b": -1}')
    assert evaluate_squad.main([*words, "--null_odds", str(tmp_path / "odds.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["best_exact"], found["best_exact_thresh"]) == (50, -1)
    (tmp_path / "odds.json").write_text('{"a": 3.5}')
    assert evaluate_squad.main([*words, "--null_odds", str(tmp_path / "odds.json")]) == 2
    assert "question b: there is no number" in capsys.readouterr().err


def test_constructed_predictions_on_the_real_file(real_data: Callable[[str], Path]) -> None:
    """Its first answers are all right; without the last half of the questions half are wrong."""
    raw = read_squad(real_data("squad/dev-v1.1.json"))
    assert len(raw) == 10570 and len(raw.contexts) == 2067
    scorer = Scorer(raw)
    texts: list[str | None] = [own[0] for own in raw.answers]
    assert scorer.score(texts) == {"exact": 100.0, "f1": 100.0, "total": 10570}
    texts[5285:] = [None] * 5285
    assert scorer.score(texts)["exact"] == 50


def test_unlabelled_data_is_not_scored() -> None:
    raw = SquadSplit("t.json", ["x"], [0], ["q"], ["?"], None, [[]])
    with pytest.raises(DataError, match="t.json: its questions have no answers"):
        Scorer(raw)
