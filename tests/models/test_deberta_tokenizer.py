"""DeBERTa's tokenizer from `spm.model`: SentencePiece's own ids, files read and files refused."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_patched.tokenization import (
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    DebertaV2TokenizerFast,
)
from transformers_patched.tokenization.spm import CONTROL, UNKNOWN, read_spm


def train(folder: Path, **options: Any) -> Path:
    """A tiny model with DeBERTa's special pieces; `options` are SentencePiece's."""
    words = "the cat sat on the mat , and the dogs ran after cats ; well - they sat ."
    names = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    ids = {f"{name}_id": i for i, name in enumerate(names)}
    pieces = {f"{name}_piece": piece for name, piece in names.items()}
    settings = {"vocab_size": 60, "model_type": "unigram", "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, words.upper(), words.title()] * 20),
        model_prefix=str(folder / "spm"),
        minloglevel=2,
        **{**settings, **ids, **pieces, **options},
    )
    return folder


@pytest.fixture(scope="module")
def sentences(real_data: Callable[[str], Path]) -> list[str]:
    """Real texts: MRPC's validation file, and SQuAD's paragraphs with characters of all kinds."""
    rows = real_data("glue/MRPC/dev.tsv").read_text(encoding="utf-8-sig").split("\n")[1:-1]
    squad = json.loads(real_data("squad/dev-v1.1.json").read_text(encoding="utf-8"))["data"]
    texts = [paragraph["context"] for article in squad for paragraph in article["paragraphs"]]
    odd = [text for text in texts if not text.isascii()]
    return [column for row in rows for column in row.split("\t")[3:5]] + odd


# ---------------------------------------------------------------------- ids


def test_the_file_is_read_as_sentencepiece_reads_it(deberta_spm: Path) -> None:
    model = read_spm(deberta_spm / "spm.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(deberta_spm / "spm.model"))
    ids = range(theirs.get_piece_size())
    assert model.pieces == [(theirs.id_to_piece(i), theirs.get_score(i)) for i in ids]
    assert [kind == CONTROL for kind in model.types] == [theirs.is_control(i) for i in ids]
    assert [kind == UNKNOWN for kind in model.types] == [theirs.is_unknown(i) for i in ids]
    assert model.unk_id == theirs.unk_id() == 3
    assert len(model.charsmap) > 200_000  # nmt_nfkc, SentencePiece's default and DeBERTa's


def test_ids_are_sentencepiece_s(deberta_spm: Path, sentences: list[str]) -> None:
    ours = AutoTokenizer.from_pretrained(deberta_spm)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(deberta_spm / "spm.model"))
    assert type(ours) is DebertaV2Tokenizer is DebertaV2TokenizerFast
    assert sum(not unicodedata.is_normalized("NFKC", text) for text in sentences) > 5
    got = ours(sentences)["input_ids"]
    assert [row[1:-1] for row in got] == theirs.encode(sentences)
    assert {(row[0], row[-1]) for row in got} == {(1, 2)}


UNITS = [*"aeht .,  \t\n\u3000\u00a0ﬁ½…éE①東😀\u200b－", "e\u0301"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(UNITS), max_size=30).map("".join))
def test_ids_of_any_text_are_sentencepiece_s(deberta_spm: Path, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(deberta_spm / "spm.model"))
    ours = _cached(deberta_spm)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


def _cached(folder: Path, known: dict[Path, DebertaV2Tokenizer] = {}) -> DebertaV2Tokenizer:  # noqa: B006
    if folder not in known:
        known[folder] = DebertaV2Tokenizer.from_pretrained(folder)
    return known[folder]


def test_transformers_gives_the_same(deberta_spm: Path, sentences: list[str]) -> None:
    """Its version 5 as it is, wherever text has nothing that SentencePiece's table changes."""
    transformers = pytest.importorskip("transformers")
    ours = AutoTokenizer.from_pretrained(deberta_spm)
    theirs = transformers.DebertaV2Tokenizer.from_pretrained(deberta_spm)
    texts = [text for text in sentences if unicodedata.is_normalized("NFKC", text)]
    texts = [text for text in texts if "Cf" not in map(unicodedata.category, text)]  # invisible
    assert len(texts) > 1000
    texts = [text[:200] for text in texts]
    for columns in (texts,), (texts[:-1], texts[1:]):
        options = dict(truncation=True, max_length=60, padding=True, return_offsets_mapping=True)
        a, b = (t(*columns, **options) for t in (ours, theirs))
        assert set(a) == set(b)
        for name in b:
            rows = enumerate(zip(a[name], b[name], strict=True))
            other = [i for i, (one, another) in rows if one != another]
            assert not other, (name, [texts[i] for i in other[:2]])


# ---------------------------------------------------------------------- special tokens, options


def test_special_tokens(deberta_spm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(deberta_spm)
    assert (tokenizer.vocab_size, len(tokenizer)) == (3000, 3001)
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (3, 3000)
    assert tokenizer.bos_token == "[CLS]" and tokenizer.eos_token == "[SEP]"
    pair = tokenizer("She was [MASK].", "Who?")
    assert pair.tokens()[:4] == ["[CLS]", "▁She", "▁was", "[MASK]"]
    ends = [i for i, token in enumerate(pair["input_ids"]) if token == 2]
    assert pair["token_type_ids"] == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])
    assert tokenizer.decode(pair["input_ids"], skip_special_tokens=True) == "She was . Who?"
    tokenizer.add_tokens(["Rankwise"])
    assert tokenizer.tokenize("by Rankwise")[-1] == "Rankwise" and len(tokenizer) == 3002


def test_pieces_that_the_user_defined_stay_whole(tmp_path: Path) -> None:
    folder = train(tmp_path, user_defined_symbols=["<br>"])
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    assert "<br>" in tokenizer.tokenize("the cat<br>sat")
    ids = tokenizer.encode("the cat<br>sat")
    assert "<br>" in tokenizer.decode(ids, skip_special_tokens=True)  # it is text


def test_lower_case_and_punctuation(tmp_path: Path) -> None:
    folder = train(tmp_path)
    plain = DebertaV2Tokenizer.from_pretrained(folder)
    assert plain.tokenize("THE CAT") != plain.tokenize("the cat")
    lower = DebertaV2Tokenizer.from_pretrained(folder, do_lower_case=True)
    assert lower.tokenize("THE CAT") == plain.tokenize("the cat")
    lower.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").tokenize("THE") == lower.tokenize(
        "the"
    )
    with pytest.raises(ValueError, match="do_lower_case=False, but tokenizer.json lower-cases"):
        AutoTokenizer.from_pretrained(tmp_path / "saved", do_lower_case=False)
    plain.save_pretrained(tmp_path / "plain")  # a keyword wins over tokenizer.json
    again = AutoTokenizer.from_pretrained(tmp_path / "plain", do_lower_case=True)
    assert again.tokenize("THE CAT") == plain.tokenize("the cat")
    split = DebertaV2Tokenizer.from_pretrained(folder, split_by_punct=True)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DebertaV2Tokenizer.from_pretrained(folder, split_by_punct=True)
    text = "the cat-mat, sat;the dogs."
    assert split.tokenize(text) == theirs.tokenize(text) != plain.tokenize(text)


# ---------------------------------------------------------------------- files


def test_a_saved_tokenizer_comes_back(deberta_spm: Path, tmp_path: Path) -> None:
    ours = AutoTokenizer.from_pretrained(deberta_spm, model_max_length=77)
    ours.save_pretrained(tmp_path)
    text = "½ of the ﬁnest [MASK] …"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is DebertaV2Tokenizer and again.model_max_length == 77
    assert again(text) == ours(text) and again.special_tokens_map == ours.special_tokens_map
    (tmp_path / "tokenizer_config.json").unlink()  # its algorithm tells it from BERT's
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is DebertaV2Tokenizer


def test_the_class_is_found_without_a_config(deberta_spm: Path, tmp_path: Path) -> None:
    shutil.copy(deberta_spm / "spm.model", tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is DebertaV2Tokenizer
    (tmp_path / "spm.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"or spm.model \(DeBERTa\); the folder holds noth"):
        AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json, or spm.model; the folder holds"):
        DebertaV2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json, or vocab.txt; the folder holds"):
        BertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 10, 1000, 20_000, -1])
def test_a_damaged_file_is_named(deberta_spm: Path, tmp_path: Path, keep: int) -> None:
    data = (deberta_spm / "spm.model").read_bytes()
    (tmp_path / "spm.model").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="spm.model: damaged, or no SentencePiece model"):
        AutoTokenizer.from_pretrained(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_are_read_as_something_else(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.model"
    path.write_bytes(data)
    try:
        read_spm(path)
    except ValueError as error:
        assert "noise.model" in str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "is a SentencePiece BPE model; DeBERTa's are unigram models"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix or remove_extra_whitespaces is off"),
        ({"pad_id": -1, "bos_id": 0, "eos_id": 1, "unk_id": 2}, r"it lacks \[PAD\]"),
    ],
)
def test_models_that_are_none_of_deberta_s(tmp_path: Path, options: dict, message: str) -> None:
    train(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        DebertaV2Tokenizer.from_pretrained(tmp_path)


def test_a_pointer_to_the_file_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(ValueError, match="is a Git LFS pointer: run `git lfs pull` there"):
        AutoTokenizer.from_pretrained(tmp_path)
