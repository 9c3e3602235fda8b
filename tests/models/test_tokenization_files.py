"""Tokenizer files: what is read from what, what is refused with which words."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

import transformers_patched
from transformers_patched import tokenization
from transformers_patched.checkpoint import CheckpointError
from transformers_patched.tokenization import (
    AutoTokenizer,
    BertTokenizer,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "é", "e", "."]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny WordPiece vocabulary."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """A tiny byte-level BPE: `ab` and ` ab` are one token, other bytes of a..c stay single."""
    folder = tmp_path / "roberta"
    folder.mkdir()
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c", "Ġ", "ab", "Ġab", "<mask>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")
    return folder


def test_vocab_txt(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert isinstance(tokenizer, BertTokenizer)
    assert BertTokenizerFast is BertTokenizer
    encoding = tokenizer("The CATS sat.", "é")
    assert encoding.tokens() == "[CLS] the cat ##s sat . [SEP] e [SEP]".split()
    assert encoding.token_type_ids == [0] * 7 + [1] * 2
    assert encoding["input_ids"] == [2, 5, 6, 8, 7, 11, 3, 10, 3]
    assert tokenizer.decode(encoding.input_ids, skip_special_tokens=True) == "the cats sat. e"


def test_lower_casing_follows_config_then_keyword(bert: Path) -> None:
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 7}')
    cased = AutoTokenizer.from_pretrained(bert)
    assert cased.model_max_length == 7
    assert cased.tokenize("The é") == ["[UNK]", "é"]
    assert AutoTokenizer.from_pretrained(bert, do_lower_case=True).tokenize("The é") == ["the", "e"]
    cased.save_pretrained(bert)
    assert AutoTokenizer.from_pretrained(bert).tokenize("The é") == ["[UNK]", "é"]
    # A keyword wins over tokenizer.json as well.
    assert AutoTokenizer.from_pretrained(bert, do_lower_case=True).tokenize("The é") == ["the", "e"]


def test_a_cased_vocabulary_without_config_is_told(bert: Path) -> None:
    with (bert / "vocab.txt").open("a") as file:
        file.write("The\n")
    with pytest.warns(UserWarning, match="do_lower_case=False for a cased model"):
        BertTokenizer.from_pretrained(bert)


def test_windows_line_ends_make_no_other_vocabulary(bert: Path) -> None:
    unix = AutoTokenizer.from_pretrained(bert).get_vocab()
    (bert / "vocab.txt").write_bytes("\r\n".join(WORDS).encode() + b"\r\n")
    assert AutoTokenizer.from_pretrained(bert).get_vocab() == unix


def test_the_tokenizers_config_wins_over_the_map_of_special_tokens(bert: Path) -> None:
    (bert / "special_tokens_map.json").write_text('{"mask_token": ".", "unk_token": "the"}')
    assert AutoTokenizer.from_pretrained(bert).mask_token == "."
    (bert / "tokenizer_config.json").write_text('{"mask_token": "cat", "unk_token": null}')
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert (tokenizer.mask_token, tokenizer.unk_token) == ("cat", "the")


def test_the_mask_of_vocabulary_files_swallows_the_blank_before_it(roberta: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(roberta)
    assert tokenizer("ab <mask> ab").input_ids == [0, 8, 10, 9, 2]  # no lone blank, which is 7


@pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast"])
def test_both_names_of_a_saved_class(bert: Path, name: str) -> None:
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert type(AutoTokenizer.from_pretrained(bert)) is BertTokenizer
    AutoTokenizer.from_pretrained(bert).backend_tokenizer.save(str(bert / "tokenizer.json"))
    (bert / "vocab.txt").unlink()
    assert type(AutoTokenizer.from_pretrained(bert)) is BertTokenizer


def test_the_config_decides_over_a_tokenizer_json(bert: Path) -> None:
    """Lower-casing and accents, as Transformers lets it."""
    AutoTokenizer.from_pretrained(bert).save_pretrained(bert)
    path = bert / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name, text, kept in (
        ("do_lower_case", "The", ["[UNK]"]),
        ("strip_accents", "é", ["é"]),
    ):
        assert AutoTokenizer.from_pretrained(bert).tokenize(text) != kept
        path.write_text(json.dumps({**config, name: False}))
        assert AutoTokenizer.from_pretrained(bert).tokenize(text) == kept
        path.write_text(json.dumps(config))


def test_only_the_first_line_of_merges_is_a_version(roberta: Path) -> None:
    with (roberta / "merges.txt").open("a") as file:
        file.write("#version b\n")
    with pytest.raises(ValueError, match=r"merges\.txt does not belong to the vocab\.json"):
        AutoTokenizer.from_pretrained(roberta)


def test_vocab_json_and_merges(roberta: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(roberta)
    assert isinstance(tokenizer, RobertaTokenizer)
    assert tokenizer.tokenize("ab abc") == ["ab", "Ġab", "c"]
    encoding = tokenizer("ab", "c ab")
    assert encoding.tokens() == ["<s>", "ab", "</s>", "</s>", "c", "Ġab", "</s>"]
    assert set(encoding) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(encoding.input_ids) == "<s>ab</s></s>c ab</s>"
    prefixed = AutoTokenizer.from_pretrained(roberta, add_prefix_space=True)
    assert prefixed.tokenize("ab") == ["Ġab"]


def test_the_mask_swallows_the_blank_before_it(real_data: Callable[[str], Path]) -> None:
    """As in the published RoBERTa: `Paris is the <mask>` has no lone blank before the mask."""
    folder = real_data("tokenizers/roberta/merges.txt").parent
    tokenizer = RobertaTokenizer.from_pretrained(folder)
    ids = tokenizer("Paris is the <mask> of France.")["input_ids"]
    assert ids == [0, 32826, 16, 5, 50264, 9, 1470, 4, 2]


def test_known_ids(real_data: Callable[[str], Path]) -> None:
    roberta = AutoTokenizer.from_pretrained(real_data("tokenizers/roberta/merges.txt").parent)
    assert roberta.encode("Hello world!") == [0, 31414, 232, 328, 2]
    assert len(roberta) == 50265
    bert = AutoTokenizer.from_pretrained(real_data("tokenizers/bert-base-uncased/vocab.txt").parent)
    assert bert.encode("Hello world!") == [101, 7592, 2088, 999, 102]
    assert len(bert) == 30522


def test_settings_baked_into_tokenizer_json_are_ignored(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.backend_tokenizer.save(str(bert / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(bert)
    assert len(loaded("the cat sat the cat sat")["input_ids"]) == 8


def test_the_class_of_a_lone_tokenizer_json(bert: Path, roberta: Path, tmp_path: Path) -> None:
    for folder, kind in ((bert, BertTokenizer), (roberta, RobertaTokenizer)):
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
        lone = tmp_path / f"lone-{folder.name}"
        lone.mkdir()
        shutil.copy(tmp_path / "saved" / "tokenizer.json", lone)
        assert type(AutoTokenizer.from_pretrained(lone)) is kind
        assert type(PreTrainedTokenizerFast.from_pretrained(lone)) is PreTrainedTokenizerFast


def test_config_json_names_the_class(roberta: Path) -> None:
    (roberta / "vocab.txt").write_text("\n".join(WORDS))
    (roberta / "config.json").write_text('{"model_type": "roberta"}')
    assert isinstance(AutoTokenizer.from_pretrained(roberta), RobertaTokenizer)
    (roberta / "config.json").write_text('{"model_type": "bert"}')
    assert isinstance(AutoTokenizer.from_pretrained(roberta), BertTokenizer)


def test_architectures_name_the_class_where_model_type_is_missing(bert: Path) -> None:
    (bert / "config.json").write_text('{"architectures": ["RobertaForMaskedLM"]}')
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt"):
        AutoTokenizer.from_pretrained(bert)
    (bert / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    assert isinstance(AutoTokenizer.from_pretrained(bert), BertTokenizer)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "vocab.txt").unlink(), ["tokenizer.json", "vocab.txt", "holds nothing"]),
        (lambda f: (f / "vocab.txt").rename(f / "vocab.text"), ["looked for", "vocab.text"]),
        (lambda f: (f / "vocab.txt").write_text("the\ncat\n"), ["vocab.txt", "[CLS]", "[SEP]"]),
        (lambda f: (f / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe"), ["vocab.txt", "byte 6"]),
        (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", "mod'), ["tokenizer.jso"]),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\x80\x04pickle"), ["tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("[]"), ["tokenizer.json"]),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), ["tokenizer_config.json"]),
        (lambda f: (f / "tokenizer_config.json").write_text("[1]"), ["tokenizer_config.json"]),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "T5Tokenizer"}'
            ),
            ["T5Tokenizer", "BertTokenizer"],
        ),
    ],
)
def test_missing_and_damaged_files(
    bert: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(bert)
    with pytest.raises((OSError, ValueError)) as error:
        AutoTokenizer.from_pretrained(bert)
    assert str(bert) in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("merges", "words"),
    [
        ("#version: 0.2\na b c\n", ["merges.txt, line 2"]),
        ("#version: 0.2\na z\n", ["merges.txt", "does not belong"]),
    ],
)
def test_damaged_merges(roberta: Path, merges: str, words: list[str]) -> None:
    (roberta / "merges.txt").write_text(merges)
    with pytest.raises(ValueError) as error:
        AutoTokenizer.from_pretrained(roberta)
    for word in words:
        assert word in str(error.value)


def test_no_such_folder_and_a_file_for_a_folder(bert: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AutoTokenizer.from_pretrained(bert / "absent")
    with pytest.raises(NotADirectoryError, match="is a file"):
        AutoTokenizer.from_pretrained(bert / "vocab.txt")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with pytest.raises(NotADirectoryError, match="is a file"):
        tokenizer.save_pretrained(bert / "vocab.txt")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: t("the cat", truncation=True, max_length=1), "leaves no room"),
        (lambda t: t("the cat", truncation=True, max_length=4, stride=2), "stride=2"),
        (lambda t: t("the", "cat sat the", truncation="only_first", max_length=5), "too short"),
        (lambda t: t("the", padding="longest_"), "padding='longest_'"),
        (lambda t: t("the", truncation="first"), "truncation='first'"),
        (lambda t: t(["the", "the cat"], return_tensors="pt"), "padding=True"),
        (lambda t: t("the", return_tensors="tf"), "'pt'"),
        (lambda t: t(["the", "cat"], ["sat"]), "2 sentences but 1 pairs"),
        (lambda t: t.pad([{"ids": [1]}]), "input_ids"),
        (lambda t: t.add_special_tokens({"stop_token": "x"}), "stop_token"),
    ],
)
def test_wrong_calls_say_what_to_do(
    bert: Path, call: Callable[[BertTokenizer], object], words: str
) -> None:
    with pytest.raises(ValueError) as error:
        call(AutoTokenizer.from_pretrained(bert))
    assert words in str(error.value)


@pytest.mark.parametrize("text", [None, 5, ["the", 5], {"a": 1}])
def test_what_is_no_text(bert: Path, text: object) -> None:
    with pytest.raises(TypeError, match="text must be"):
        AutoTokenizer.from_pretrained(bert)(text)


def test_too_long_without_truncation_warns(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert, model_max_length=5)
    with pytest.warns(UserWarning, match="8 tokens and this model takes 5"):
        tokenizer("the cat sat the cat sat")
    assert len(tokenizer("the cat sat the cat sat", truncation=True)["input_ids"]) == 5
    with pytest.warns(UserWarning, match="nothing is truncated"):
        AutoTokenizer.from_pretrained(bert)("the cat", truncation=True)


def test_special_tokens_can_be_added_and_named(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert tokenizer.add_tokens(["dog", AddedToken("mouse")]) == 2
    assert tokenizer.add_special_tokens({"bos_token": "[BOS]"}) == 1
    assert tokenizer.bos_token_id == len(tokenizer) - 1 == 14
    tokenizer.pad_token = "[UNK]"
    assert tokenizer.pad_token_id == 1
    assert tokenizer.tokenize("the dog") == ["the", "dog"]
    tokenizer.save_pretrained(bert)
    again = AutoTokenizer.from_pretrained(bert)
    assert (again.bos_token_id, again.pad_token, len(again)) == (14, "[UNK]", 15)


def test_padding_on_the_left(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert, padding_side="left")
    batch = tokenizer(["the", "the cat"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.input_ids[0, 0] == tokenizer.pad_token_id
    padded = tokenizer.pad([tokenizer("the"), tokenizer("the cat")])
    assert padded["input_ids"] == batch.input_ids.tolist()


def test_without_a_pad_token_padding_says_so(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.pad_token = None
    for call in (
        lambda: tokenizer(["the", "the cat"], padding=True),
        lambda: tokenizer.pad([{"input_ids": [1]}, {"input_ids": [1, 2]}]),
    ):
        with pytest.raises(ValueError, match="no pad_token"):
            call()


def test_encodings_move_and_pickle(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    batch = tokenizer(["the cat"], return_tensors="pt").to(torch.device("meta"))
    assert batch.input_ids.device.type == "meta"
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the cat") == tokenizer.encode("the cat")
    plain = pickle.loads(pickle.dumps(tokenizer.pad([tokenizer("the")])))
    assert plain["input_ids"] == [[2, 5, 3]]
    with pytest.raises(ValueError, match="padded or built"):
        plain.word_ids()
    with pytest.raises(AttributeError):
        _ = plain.absent


def test_a_save_that_fails_leaves_the_old_files(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    written = tokenizer.save_pretrained(tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert sorted(written) == sorted(map(str, before))
    tokenizer.add_tokens(["a new token"])

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save_pretrained(tmp_path / "saved")
    assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


def test_a_hub_id_reads_the_files_the_hub_has(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find(name: str, file: str, revision: str | None, local_files_only: bool) -> Path | None:
        asked.append((name, file, revision))
        return bert / file if (bert / file).exists() else None

    monkeypatch.setattr("transformers_patched.tokenization.files.find_on_hub", find)
    tokenizer = AutoTokenizer.from_pretrained("someone/tiny", revision="v2")
    assert isinstance(tokenizer, BertTokenizer)
    assert ("someone/tiny", "vocab.txt", "v2") in asked
    (bert / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="someone/tiny on the hub holds no tokenizer"):
        AutoTokenizer.from_pretrained("someone/tiny")


def test_a_hub_id_that_is_not_in_the_cache() -> None:
    with pytest.raises(CheckpointError, match="someone/absent.* not in the cache"):
        AutoTokenizer.from_pretrained("someone/absent", local_files_only=True)


def test_every_tokenizer_class_is_exported() -> None:
    for name in tokenization.__all__:
        assert getattr(transformers_patched, name) is getattr(tokenization, name)
