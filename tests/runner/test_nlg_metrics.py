"""The official metrics of text generation: published figures, peers' figures, formulas restated."""

import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from math import exp, log, log2
from pathlib import Path

import pytest
from golden.make_nlg import INSTANCES, random_pairs
from hypothesis import given
from hypothesis import strategies as st

from examples import evaluate_nlg
from examples.data import nlg
from examples.data.tasks.nlg import nlg_task
from examples.errors import DataError
from examples.evaluation.nlg import FORMATS, score
from examples.evaluation.nlg.cider import cider
from examples.evaluation.nlg.meteor import MeteorError, jar_path, meteor
from examples.evaluation.nlg.overlap import _common_subsequence, bleu, chrf, nist, rouge, rouge_l
from examples.evaluation.nlg.ter import edit_distance_to, edit_rate, ter
from examples.evaluation.nlg.texts import FORMS, clean, read_pairs_to_score
from examples.evaluation.nlg.words import mteval_words, nltk_words, ptb_words

pytest.importorskip("sacrebleu")
METEOR = sys.modules["examples.evaluation.nlg.meteor"]  # the package has a function of that name
METEOR_RUNS = jar_path() is not None and shutil.which("java") is not None
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nlg.json").read_text())
# A published system's outputs for the first five contexts of the E2E test set, and what the
# official script prints for each alone (CIDEr: with the whole set's document frequencies).
FIVE = [
    "Blue Spice is a coffee shop in the city centre .",
    "Blue Spice is a coffee shop in the riverside area .",
    "Blue Spice is a coffee shop near Crowne Plaza Hotel . It has a customer rating of 5 out of 5 "
    ".",
    "Blue Spice is a coffee shop with an average customer rating . It is located near Burger King "
    ".",
    "Blue Spice is a coffee shop with an average customer rating . It is located near Crowne Plaza "
    "Hotel .",
]
FIVE_SCORES = [
    (0.9672, 4.5424, 0.5519, 0.9564, 7.2511),
    (0.5834, 3.6437, 0.5087, 0.7554, 3.8384),
    (0.7085, 5.3508, 0.5582, 0.9033, 4.3479),
    (0.5632, 5.3048, 0.4714, 0.5121, 3.3358),
    (0.3226, 2.8612, 0.4553, 0.4756, 3.6586),
]
PUBLISHED = {
    "BLEU": 0.690008008478824,
    "NIST": 8.683170704467278,
    "METEOR": 0.4635634433826454,
    "ROUGE_L": 0.7129547640769492,
    "CIDEr": 2.510848267225781,
}
PUBLISHED_WEBNLG = {  # the same outputs by WebNLG's script: lower-cased, split, six references
    "BLEU": 0.6606593456,
    "METEOR": 0.4531685910974751,
    "TER": 0.3839482059953531,
    "chrF++": 0.7278887561851362,
}


@pytest.fixture(scope="module")
def groups(real_data: Callable[[str], Path]) -> list[nlg.Instance]:
    """The 630 instances of the E2E test set."""
    return nlg.instances(nlg.read_pairs(nlg_task("e2e"), real_data("e2e/test.txt")))


def references_file(groups: list[nlg.Instance], path: Path) -> Path:
    """The reference file of the E2E scripts."""
    text = "".join("".join(r.strip() + "\n" for r in g.references) + "\n" for g in groups)
    path.write_text(text)
    return path


# -- published figures --------------------------------------------------------------------------


def test_five_published_segments(groups: list[nlg.Instance]) -> None:
    references = [[text.strip() for text in group.references] for group in groups]
    targets = [[ptb_words(text) for text in texts] for texts in references]
    for i, (text, wanted) in enumerate(zip(FIVE, FIVE_SCORES, strict=True)):
        words = ptb_words(text)
        others = [["@"]] * (len(targets) - 1)
        found = [
            bleu([text], [references[i]], lowercase=True),
            nist([text], [references[i]]),
            rouge_l([words], [targets[i]]),
            630 * cider([words, *others], [targets[i], *targets[:i], *targets[i + 1 :]]),
        ]
        assert [round(value, 4) for value in found] == [wanted[k] for k in (0, 1, 3, 4)]


@pytest.mark.skipif(not METEOR_RUNS, reason="METEOR needs Java and its jar")
def test_five_published_segments_of_meteor(groups: list[nlg.Instance]) -> None:
    for text, group, wanted in zip(FIVE, groups, FIVE_SCORES, strict=False):
        found = meteor([ptb_words(text)], [[ptb_words(r) for r in group.references]])
        assert round(found, 4) == wanted[2]


def test_reference_file_is_the_published_one(groups: list[nlg.Instance], tmp_path: Path) -> None:
    """So what the scores above are of is the official file, byte for byte."""
    path = references_file(groups, tmp_path / "ref.txt")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("cda3fdb4ce7f50ed7926e9e5c98e")


@pytest.mark.parametrize(("format", "wanted"), [("e2e", PUBLISHED), ("webnlg", PUBLISHED_WEBNLG)])
def test_all_published_outputs(
    format: str,
    wanted: dict[str, float],
    groups: list[nlg.Instance],
    real_data: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = real_data("e2e/e2e_pred.txt")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("67471892213c0ef08d9fd997c2e69")
    pairs = [nlg.Pair(g.context, text) for g in groups for text in g.references]
    formatted = tmp_path / "test_formatted.jsonl"
    formatted.write_text("".join(nlg.formatted_lines(pairs)))
    found, notes = score(format, *read_pairs_to_score(path, formatted, format))
    assert set(found) | ({"METEOR"} if notes else set()) == set(wanted)
    for name, value in found.items():
        assert value == pytest.approx(wanted[name], abs=1e-10), name


def test_xsum_by_first_lines(real_data: Callable[[str], Path]) -> None:
    pytest.importorskip("rouge_score.rouge_scorer")
    lines = real_data("xsum/test-1000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first = [row["document"].split("\n")[0] for row in rows]
    found = rouge(first, [[row["summary"]] for row in rows])
    wanted = {"rouge1": 16.1857, "rouge2": 1.7054, "rougeL": 11.7434, "rougeLsum": 11.7434}
    assert {name: round(value, 4) for name, value in found.items()} == wanted


def test_rouge_of_a_pair() -> None:
    pytest.importorskip("rouge_score.rouge_scorer")
    found = rouge(["the cats sat on the mats ."], [["a cat was sitting on the mat ."]])
    shares = [found[name] / 100 for name in ("rouge1", "rouge2", "rougeL")]
    assert shares == pytest.approx([0.6153846154, 0.3636363636, 0.6153846154], abs=1e-10)


# -- peers' figures (golden/make_nlg.py) --------------------------------------------------------


def test_words_of_stanfords_tokenizer(real_data: Callable[[str], Path]) -> None:
    task = nlg_task("e2e")
    paths = [real_data(f"e2e/{name}.txt") for name in ("train", "valid", "test")]
    words = [" ".join(ptb_words(p.completion)) for f in paths for p in nlg.read_pairs(task, f)]
    assert len(words) == GOLDEN["ptb_texts"] == 51426
    assert hashlib.sha256("\n".join(words).encode()).hexdigest() == GOLDEN["ptb_sha256"]


def test_rouge_l_cider_and_ter_of_peers(groups: list[nlg.Instance]) -> None:
    chosen = [g.references for g in groups if len(g.references) > 1][:INSTANCES]
    words = [[ptb_words(text) for text in texts] for texts in chosen]
    hypotheses, references = [g[0] for g in words], [g[1:] for g in words]
    assert rouge_l(hypotheses, references) == pytest.approx(GOLDEN["ROUGE_L"], abs=1e-12)
    assert cider(hypotheses, references) == pytest.approx(GOLDEN["CIDEr"], abs=1e-12)
    rates = [edit_rate(g[0].split(), g[1].split()) for g in chosen[:40]]
    assert rates == pytest.approx(GOLDEN["edit_rates_e2e"], abs=1e-12)


def test_edit_rates_of_peers() -> None:
    rates = [edit_rate(h, r) for h, r in random_pairs(200)]
    assert rates == pytest.approx(GOLDEN["edit_rates"], abs=1e-12)


# -- formulas restated --------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("abcd"), max_size=70)


@given(WORDS, WORDS)
def test_distance_and_common_subsequence(first: list[str], second: list[str]) -> None:
    distance = list(range(len(second) + 1))
    common = [0] * (len(second) + 1)
    for i, x in enumerate(first, 1):
        above, common_above = distance[:], common[:]
        distance[0] = i
        for j, y in enumerate(second, 1):
            distance[j] = min(above[j] + 1, distance[j - 1] + 1, above[j - 1] + (x != y))
            same = common_above[j - 1] + 1
            common[j] = same if x == y else max(common_above[j], common[j - 1])
    assert edit_distance_to(second)(first) == distance[-1]
    assert _common_subsequence(first, second) == common[-1]


def test_nist_by_hand() -> None:
    """Four words of two references of three words; nothing longer than two words is shared."""
    references = [["a b c", "a d e"]]
    info = {"a": log2(6 / 2), "b": log2(6), "a b": log2(2 / 1)}
    found = nist(["A b A x"], references)  # the second a is not in any reference twice
    assert found == pytest.approx((info["a"] + info["b"]) / 4 + info["a b"] / 3, abs=1e-12)


def test_nist_brevity_is_a_half_at_two_thirds() -> None:
    long, short = nist(["a b c"], [["a b z"]]), nist(["a b"], [["a b z"]])
    assert long == pytest.approx(2 * log2(3) / 3 + 0 / 2, abs=1e-12)
    assert short == pytest.approx(0.5 * (2 * log2(3) / 2 + 0 / 1), abs=1e-12)
    assert nist([""], [["a"]]) == 0


def test_bleu_by_hand() -> None:
    """The closest length counts for brevity, the shorter of two; hits are clipped."""
    references = [["a b c d e f g", "a b c d e f g h i"]]  # 7 and 9 words against 8
    assert bleu(["a b c d x x x x"], references, lowercase=True) == pytest.approx(
        (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25
    )
    short = bleu(["a b c d e"], references, lowercase=True)
    assert short == pytest.approx(exp(1 - 7 / 5))
    assert bleu(["A B C D E"], references, lowercase=False) < 1e-9 < short


def test_cider_by_hand() -> None:
    """Two instances of one reference: df is 1 or 2, a word in both has no weight."""
    found = cider([["a", "b"], ["c"]], [[["a", "b"]], [["a", "d", "e"]]])
    # instance 1: unigram b and bigram ab agree, of four orders two; instance 2 shares nothing
    assert found == pytest.approx(10 * (2 / 4 + 0) / 2)
    found = cider([["b"], ["c"]], [[["a", "b"]], [["a", "d", "e"]]])  # one bigram fewer
    assert found == pytest.approx(10 * exp(-1 / 72) / 4 / 2)
    assert log(2) > 0 and cider([[]], [[["a"]]]) == 0


def test_rouge_l_takes_its_maxima_apart() -> None:
    found = rouge_l([list("abcd")], [[list("abcx") + list("yz"), list("ab")]])
    precision, recall = 3 / 4, 2 / 2
    wanted = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert found == pytest.approx(wanted) and rouge_l([[]], [[["a"]]]) == 0


def test_ter_by_hand() -> None:
    assert edit_rate(list("cab"), list("abc")) == pytest.approx(1 / 3)  # one shift
    assert ter([list("ab"), ["x"]], [[list("abc"), list("abcd")], [[], ["y", "z"]]]) == (
        pytest.approx((1 / 3 + 1) / 2)
    )


def test_chrf_restated() -> None:
    """F2 for characters without blanks 1..6 and words 1..2, its mean over all eight orders."""
    rng = random.Random(3)
    texts = [[" ".join(rng.choices(["ab", "bc", "cab", "a"], k=9)) for _ in range(2)] for _ in "xy"]

    def counts(text: str, n: int, words: bool) -> Counter:
        units = text.split() if words else list(text.replace(" ", ""))
        return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))

    values = []
    for n, words in [*((n, False) for n in range(1, 7)), (1, True), (2, True)]:
        pairs = [(counts(h, n, words), counts(r, n, words)) for h, r in texts]
        hits = sum((h & r).total() for h, r in pairs)
        precision = hits / sum(h.total() for h, _ in pairs)
        recall = hits / sum(r.total() for _, r in pairs)
        values.append(5 * precision * recall / (4 * precision + recall))
    assert chrf([h for h, _ in texts], [[r] for _, r in texts]) == pytest.approx(sum(values) / 8)


def test_words_of_each_metric() -> None:
    text = "It's £20-25 (cheap), don't go; 3.5 stars: family-friendly!"
    assert ptb_words(text) == (
        "it 's # 20-25 -lrb- cheap -rrb- do n't go 3.5 stars family-friendly".split()
    )
    assert mteval_words("A 5 &amp; 3.5, £20-25 x") == [
        "a",
        "5",
        "&",
        "3.5",
        ",",
        "£20",
        "-",
        "25",
        "x",
    ]
    assert nltk_words("Don't go.") == ["Do", "n't", "go", "."]


# -- METEOR without its parts -------------------------------------------------------------------

FAKE_JAVA = """#!{python}
import sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
    for line in sys.stdin:
        print(line, end="", file=log)
        parts = line.rstrip("\\n").split(" ||| ")
        if parts[0] == "SCORE":
            print("7.0 8.0", flush=True)
        else:
            for _ in parts[1:]:
                print("0.1")
            print("0.25", flush=True)
"""


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `java` that knows METEOR's protocol only, and what it was told."""
    java, log_file = tmp_path / "bin" / "java", tmp_path / "log"
    java.parent.mkdir()
    java.write_text(FAKE_JAVA.format(python=sys.executable, log=str(log_file)))
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(java.parent))
    monkeypatch.setattr(METEOR, "jar_path", lambda: tmp_path / "meteor-1.5.jar")
    return log_file


def test_meteor_is_asked_as_its_authors_do(fake_java: Path) -> None:
    assert meteor([["a", "|||", "b"], ["é"]], [[["a"], ["b", "c"]], [["e"]]]) == 0.25
    lines = fake_java.read_text().splitlines()
    assert lines[0].endswith("-Xmx2G -jar " + str(fake_java.parent / "meteor-1.5.jar") + (
        " - - -stdio -l en -norm"
    ))  # fmt: skip
    assert lines[1:] == ["SCORE ||| a ||| b c ||| a   b", "SCORE ||| e ||| é",
                         "EVAL ||| 7.0 8.0 ||| 7.0 8.0"]  # fmt: skip


@pytest.mark.parametrize("lacking", ["java", "jar", "memory"])
def test_the_others_stand_without_meteor(
    lacking: str, fake_java: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "java":
        monkeypatch.setenv("PATH", os.devnull)
    elif lacking == "jar":
        monkeypatch.setattr(METEOR, "jar_path", lambda: None)
    else:
        java = fake_java.parent / "bin" / "java"
        java.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no memory for the heap')\n")
    found, [note] = score("e2e", ["a b c d"], [["a b c d"]])
    assert list(found) == ["BLEU", "NIST", "ROUGE_L", "CIDEr"]
    says = {"java": "install a Java", "jar": "pip install", "memory": "no memory for the heap"}
    assert note.startswith("METEOR is left out: ") and says[lacking] in note and "\n" not in note


def test_meteor_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(MeteorError, match="no java"):
        meteor([["a"]], [[["a"]]])


# -- files and the program ----------------------------------------------------------------------


def files(tmp_path: Path, predictions: str, references: str) -> tuple[Path, Path]:
    (tmp_path / "pred.txt").write_text(predictions)
    (tmp_path / "ref.txt").write_text(references)
    return tmp_path / "pred.txt", tmp_path / "ref.txt"


@pytest.mark.parametrize(
    ("predictions", "references", "wanted"),
    [
        ("x\ny\n", "a\nb\n\nc\n\n", [["a", "b"], ["c"]]),  # as decoded, ends with a new line
        ("x\ny", "a\r\nb\r\n\r\nc", [["a", "b"], ["c"]]),
        ("x\ny\n\n", "a\nb\n", [["a"], ["b"]]),
        ("x\n", "a\nb\n", [["a", "b"]]),
        ("x\n\n", "a\n\nb\n\n", [["a"], ["b"]]),  # the second prediction is empty
    ],
)
def test_files_of_texts(
    predictions: str, references: str, wanted: list[list[str]], tmp_path: Path
) -> None:
    texts, targets = read_pairs_to_score(*files(tmp_path, predictions, references), "e2e")
    assert targets == wanted and len(texts) == len(wanted) and texts[0] == "x"


def test_folder_of_references(tmp_path: Path) -> None:
    folder = tmp_path / "refs"
    folder.mkdir()
    for k in range(11):
        (folder / f"reference{k}").write_text(f"a{k}\nb{k}\n")
    pred, _ = files(tmp_path, "x\ny\n", "")
    _, targets = read_pairs_to_score(pred, folder, "webnlg")
    assert targets[1] == [f"b{k}" for k in range(11)]
    (folder / "reference3").write_text("one line\n")
    with pytest.raises(DataError, match=r"differ in their numbers of lines \(reference3\)"):
        read_pairs_to_score(pred, folder, "webnlg")


def test_formatted_rows_take_the_recipes_form(tmp_path: Path) -> None:
    pairs = [nlg.Pair("c", f"Text-{k}, so.") for k in range(8)] + [nlg.Pair("d", "End.")]
    path = tmp_path / "test_formatted.jsonl"
    path.write_text("".join(nlg.formatted_lines(pairs)))
    pred, _ = files(tmp_path, "Text-0, so.\nEnd.<|endoftext|> more\n", "")
    texts, targets = read_pairs_to_score(pred, path, "webnlg")
    assert texts == ["text - 0 , so .", "end ."] and len(targets[0]) == 6
    assert targets[0][0] == texts[0]
    texts, targets = read_pairs_to_score(pred, path, "e2e")
    assert texts == ["Text-0, so.", "End."] and len(targets[0]) == 8
    assert clean(" a b\n\nc", FORMS["e2e"]) == "a b"


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture, fake_java: Path) -> None:
    pred, ref = files(tmp_path, "A b c d .\nx y\n", "a b c d .\na b\n\nx y\n\n")
    output = tmp_path / "scores.json"
    where = ["--pred", str(pred), "--ref", str(ref), "--output", str(output)]
    assert evaluate_nlg.main(where) == 0 and evaluate_nlg.FORMATS == tuple(FORMATS)
    found = json.loads(output.read_text())
    assert list(found) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert found["BLEU"] == pytest.approx(1) and found["METEOR"] == 0.25
    assert "BLEU       1.0000" in capsys.readouterr().out
    assert evaluate_nlg.main([*where, "--format", "webnlg"]) == 0
    assert list(json.loads(output.read_text())) == ["BLEU", "METEOR", "TER", "chrF++"]


def test_boolq_answers(tmp_path: Path) -> None:
    pred, ref = files(tmp_path, " True.\nfalse\nfalse it is\n", "true\ntrue\nfalse\n")
    output = tmp_path / "scores.json"
    where = ["--pred", str(pred), "--ref", str(ref), "--output", str(output)]
    assert evaluate_nlg.main([*where, "--format", "boolq"]) == 0
    assert json.loads(output.read_text()) == {"accuracy": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--pred": "none.txt"}, "none.txt: no such file"),
        ({"--ref": "none.txt"}, "none.txt: no such file"),
        ({"--ref": "empty.txt"}, "empty.txt: empty"),
        ({"--pred": "three.txt"}, "three.txt has 3 predictions, but"),
        ({"--output": "missing/o.json"}, "give a file in a folder that exists"),
        ({"--output": "pred.txt"}, "this is one of the files to be scored"),
        ({"--ref": "."}, "no files reference0"),
    ],
)
def test_refusals(
    change: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files(tmp_path, "x\ny\n", "a\n\nb\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "three.txt").write_text("x\ny\nz\n")
    options = {"--pred": "pred.txt", "--ref": "ref.txt", "--output": "o.json"} | change
    argv = [part for name, path in options.items() for part in (name, str(tmp_path / path))]
    assert evaluate_nlg.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "o.json").exists()
    assert (tmp_path / "pred.txt").read_text() == "x\ny\n"


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pred, ref = files(tmp_path, "x\n", "a\n")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    where = ["--pred", str(pred), "--ref", str(ref), "--output", str(tmp_path / "o.json")]
    assert evaluate_nlg.main([*where, "--format", "xsum"]) == 2
    assert "pip install 'rankwise[nlg]'" in capsys.readouterr().err
