"""Every number a tokenizer gives equals Transformers', on real sentences and real vocabularies."""

import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformers_patched.tokenization import (
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    RobertaTokenizer,
)

transformers = pytest.importorskip("transformers")
FIELDS = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_token_type_ids": True,
    "return_attention_mask": True,
    "return_length": True,
}


@pytest.fixture(scope="module", params=["minilm", "bert", "roberta", "deberta"])
def both(request: pytest.FixtureRequest, real_data: Callable[[str], Path]) -> tuple[Any, Any]:
    """Our tokenizer and Transformers', from the same files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "minilm":
            folder = request.getfixturevalue("minilm_dir")
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder), theirs
        if request.param == "bert":
            folder = real_data("tokenizers/bert-base-uncased/vocab.txt").parent
            theirs = transformers.BertTokenizer.from_pretrained(folder)
            return BertTokenizer.from_pretrained(folder), theirs
        if request.param == "deberta":
            return deberta(request.getfixturevalue("deberta_spm"))
        folder = real_data("tokenizers/roberta/merges.txt").parent
        theirs = transformers.RobertaTokenizer.from_pretrained(folder)
        return RobertaTokenizer.from_pretrained(folder), theirs


def deberta(folder: Path) -> tuple[Any, Any]:
    """Theirs with SentencePiece's table of characters, which its version 5 leaves out.

    `test_deberta_tokenizer.py` compares with theirs as it is.
    """
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    theirs = transformers.DebertaV2Tokenizer.from_pretrained(folder)
    table = SentencePieceExtractor(str(folder / "spm.model")).proto.normalizer_spec
    theirs.backend_tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(table.precompiled_charsmap),
            theirs.backend_tokenizer.normalizer,
        ]
    )
    return DebertaV2Tokenizer.from_pretrained(folder), theirs


@pytest.fixture(scope="module")
def pairs(real_data: Callable[[str], Path]) -> tuple[list[str], list[str]]:
    """The 3,668 pairs of MRPC's training file."""
    lines = real_data("glue/MRPC/train.tsv").read_text(encoding="utf-8-sig").split("\n")[1:-1]
    first, second = zip(*(line.split("\t")[3:5] for line in lines), strict=True)
    return list(first), list(second)


@pytest.fixture(scope="module")
def sentences(real_data: Callable[[str], Path], pairs: tuple[list[str], list[str]]) -> list[str]:
    """10,000 sentences: MRPC's and as many of SST-2's as that takes."""
    lines = real_data("glue/SST-2/train.tsv").read_text(encoding="utf-8").split("\n")[1:]
    both = pairs[0] + pairs[1]
    return both + [line.split("\t")[0] for line in lines[: 10_000 - len(both)]]


def assert_equal(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name] == theirs[name], name


def test_ten_thousand_sentences(both: tuple[Any, Any], sentences: list[str]) -> None:
    assert len(sentences) == 10_000
    ours, theirs = (tokenizer(sentences, **FIELDS) for tokenizer in both)
    assert_equal(ours, theirs)


def test_gpt2_on_ten_thousand_sentences(
    real_data: Callable[[str], Path], sentences: list[str]
) -> None:
    """Without padding, for which GPT-2 has no token."""
    folder = real_data("tokenizers/gpt2/vocab.json").parent
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    texts = [*sentences, "a<|endoftext|>b", " é £20-25\n\n "]
    assert_equal(ours(texts, **FIELDS), theirs(texts, **FIELDS))
    ids = [tokenizer(texts[-1])["input_ids"] for tokenizer in (ours, theirs)]
    assert ours.decode(ids[0]) == theirs.decode(ids[1]) == texts[-1]


def test_all_pairs_cut_and_padded(both: tuple[Any, Any], pairs: tuple[list, list]) -> None:
    options = {"truncation": True, "max_length": 48, "padding": True}
    ours, theirs = (tokenizer(*pairs, **options, **FIELDS) for tokenizer in both)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
@pytest.mark.parametrize("length", [33, 70])
def test_truncation_strategies(
    both: tuple[Any, Any], pairs: tuple[list, list], strategy: str, length: int
) -> None:
    # Sentences that one-sided truncation can shorten enough: the other must leave room.
    counts = [both[1](column[:600], return_length=True)["length"] for column in pairs]
    fits = [i for i in range(600) if max(counts[0][i], counts[1][i]) < length - 4]
    texts = [[column[i] for i in fits] for column in pairs]
    assert len(fits) >= 10
    options = {"truncation": strategy, "max_length": length, "padding": "max_length"}
    ours, theirs = (tokenizer(*texts, **options, **FIELDS) for tokenizer in both)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("stride", [0, 8])
def test_overflow_with_stride(both: tuple[Any, Any], pairs: tuple[list, list], stride: int) -> None:
    texts = [pairs[0][i][:60] for i in range(64)], [" ".join(pairs[1][:6])] * 64
    options = {
        "truncation": "only_second",
        "max_length": 64,
        "stride": stride,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
        "padding": "max_length",
    }
    ours, theirs = (tokenizer(*texts, **options) for tokenizer in both)
    assert len(ours["input_ids"]) > 100
    assert_equal(ours, theirs)
    assert ours.sequence_ids(1) == theirs.sequence_ids(1)
    assert ours.word_ids(1) == theirs.word_ids(1)
    assert ours.char_to_token(0, 5, 1) == theirs.char_to_token(0, 5, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t("one sentence"),
        lambda t: t(""),
        lambda t: t("naïve café 東京 \t tab — dash… 1,234.5 #tag don't ÀÉÎ\u2028x\u0085y 😀"),
        lambda t: t("one", "two words"),
        lambda t: t([("a b", "c"), ("d", "e f g")], padding="longest"),
        lambda t: t(["split", "words here"], is_split_into_words=True),
        lambda t: t([["a", "b c"], ["d"]], is_split_into_words=True, padding=True),
        lambda t: t("no special tokens", add_special_tokens=False),
        lambda t: t("a b c d e f", max_length=4),
        lambda t: t("a b c d e f", max_length=4, truncation=False),
        lambda t: t("a b c d e f", max_length=4, padding="max_length"),
        lambda t: t("a b", max_length=9, padding="max_length", truncation=True),
        lambda t: t(["a b c", "d"], padding=True, max_length=2),
        lambda t: t("a b c", padding=True, pad_to_multiple_of=8),
        lambda t: t(["a b", "c"], return_length=True),
        lambda t: t(["a b", "c"], padding=True, return_tensors="pt"),
        lambda t: t("a b", return_tensors="np"),
        lambda t: t("a b c d e", truncation=True, max_length=4, return_overflowing_tokens=True),
        lambda t: t.pad([t("a b"), t("c", "d e f")], pad_to_multiple_of=8),
        lambda t: t.pad({"input_ids": [5, 6]}, padding="max_length", max_length=4),
        lambda t: t.pad([{"input_ids": [5], "labels": 1}, {"input_ids": [6, 7], "labels": 0}]),
        lambda t: t.encode("a b", "c"),
        lambda t: t.tokenize("Hello there, unbelievably"),
        lambda t: t.convert_tokens_to_ids(["a", "nonsensical-token"]),
        lambda t: t.convert_ids_to_tokens([0, 101, 7592]),
        lambda t: t.convert_ids_to_tokens([0, 101, 102, 2, 7592], skip_special_tokens=True),
        lambda t: t.convert_tokens_to_string(t.tokenize("Hello there, unbelievably")),
        lambda t: t.num_special_tokens_to_add(True),
        lambda t: t.batch_decode([[101, 7592, 2], [102, 5]], skip_special_tokens=True),
        lambda t: t.decode(7592),
        lambda t: t.decode([]),
        lambda t: (len(t), t.vocab_size, t.padding_side, t.model_input_names),
        lambda t: (t.special_tokens_map, t.all_special_ids, t.all_special_tokens),
        lambda t: (t.cls_token_id, t.sep_token_id, t.pad_token_id, t.mask_token_id),
        lambda t: t.get_vocab(),
        lambda t: t.model_max_length,
    ],
)
def test_every_kind_of_call(both: tuple[Any, Any], call: Callable[[Any], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (call(tokenizer) for tokenizer in both)
    if hasattr(theirs, "keys"):
        assert set(ours) == set(theirs)
        ours, theirs = ({k: plain(v) for k, v in x.items()} for x in (ours, theirs))
    assert ours == theirs


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def test_decoding_real_sentences(both: tuple[Any, Any], sentences: list[str]) -> None:
    ours, theirs = both
    for text in sentences[:400]:
        ids = ours(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )


def test_clean_up_of_wordpiece(minilm_dir: Path) -> None:
    ours = AutoTokenizer.from_pretrained(minilm_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    ids = ours("it 's a charming , is n't it ? they 've ' quoted ' .")["input_ids"]
    for clean in (False, True):
        assert ours.decode(ids, True, clean) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean
        )


def test_saved_files_load_in_transformers(
    both: tuple[Any, Any], sentences: list[str], tmp_path: Path
) -> None:
    ours = both[0]
    ours(["left over"], padding="max_length", truncation=True, max_length=9)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(ours)
    # (Transformers 5 leaves SentencePiece's NFKC out.)
    texts = [text for text in sentences[:300] if unicodedata.is_normalized("NFKC", text)]
    expected = ours(texts)["input_ids"]
    assert loaded(texts)["input_ids"] == expected == again(texts)["input_ids"]
    assert loaded.special_tokens_map == again.special_tokens_map == ours.special_tokens_map
    assert loaded.model_max_length == again.model_max_length == ours.model_max_length


def test_files_saved_by_transformers_load_here(
    both: tuple[Any, Any], sentences: list[str], tmp_path: Path
) -> None:
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(ours)
    assert loaded(sentences[:300])["input_ids"] == theirs(sentences[:300])["input_ids"]
    assert loaded.special_tokens_map == ours.special_tokens_map
