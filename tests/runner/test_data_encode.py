"""Encoding: the tokenizer's own numbers, kept on disk and never trusted blindly."""

import errno
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.data import encode as module
from examples.data.encode import default_cache_dir, encode
from examples.data.readers import RawSplit, read_split
from examples.data.tasks import get_task
from transformers_patched.tokenization import AutoTokenizer, PreTrainedTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizer:
    """WordPiece over single letters: any lower-case word is as many tokens as letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return AutoTokenizer.from_pretrained(folder, model_max_length=64)


@pytest.fixture(scope="module")
def rows() -> RawSplit:
    return read_split(get_task("wording"), None, "validation")


def same(a: module.EncodedSplit, b: module.EncodedSplit) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "offsets", "first", "labels")
    )


@pytest.mark.parametrize("max_length", [16, 64])
def test_rows_are_what_the_tokenizer_says(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, max_length: int
) -> None:
    split = encode(rows, tokenizer, max_length, cache=False)
    expected = tokenizer(*rows.text, truncation=True, max_length=max_length)
    assert len(split) == len(rows) == 400
    assert split.tokens.dtype == np.int32
    assert split.labels.tolist() == rows.labels and split.labels.dtype == np.int64
    for i in range(len(rows)):
        ids = split.tokens[split.offsets[i] : split.offsets[i + 1]]
        assert ids.tolist() == expected["input_ids"][i]
        assert split.first[i] == expected["token_type_ids"][i].count(0)
    assert split.lengths.max() == max_length


def test_both_kinds_of_real_tokenizer(real_data: Callable[[str], Path]) -> None:
    for task, name, file in (
        ("stsb", "roberta", "merges.txt"),
        ("cola", "bert-base-uncased", "vocab.txt"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(real_data(f"tokenizers/{name}/{file}").parent)
        rows = read_split(get_task(task), real_data("glue"), "validation")
        split = encode(rows, tokenizer, 128, cache=False)
        expected = tokenizer(*rows.text, truncation=True, max_length=128)
        assert split.tokens.tolist() == sum(expected["input_ids"], [])
        assert split.token_types == (name != "roberta")
        assert split.pad_id == tokenizer.pad_token_id
        assert split.labels.dtype == (np.float32 if task == "stsb" else np.int64)


def test_chunks_do_not_show(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(rows, tokenizer, 64, cache=False)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert same(whole, encode(rows, tokenizer, 64, cache=False))


def test_the_second_time_comes_from_disk(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(rows, tokenizer, 64, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1

    def refuse(*args: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(module, "_tokenise", refuse)
    assert same(first, encode(rows, tokenizer, 64, cache_dir=tmp_path))
    # Labels are not part of what is cached.
    assert encode(replace(rows, labels=None), tokenizer, 64, cache_dir=tmp_path).labels is None
    with pytest.raises(AssertionError, match="tokenised again"):
        encode(rows, tokenizer, 63, cache_dir=tmp_path)


def test_whatever_the_tokens_depend_on_changes_the_key(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path
) -> None:
    def keys() -> int:
        return len(list(tmp_path.rglob("*.safetensors")))

    swapped = replace(rows, text=rows.text[::-1])
    moved = replace(
        rows,
        text=(
            [rows.text[0][0] + rows.text[0][1][:1], rows.text[0][1][1:], *rows.text[0][2:]],
            rows.text[1],
        ),
    )
    single = replace(rows, text=rows.text[:1])
    for count, other in enumerate((rows, swapped, moved, single, rows.take(range(399))), 1):
        encode(other, tokenizer, 64, cache_dir=tmp_path)
        assert keys() == count
    tokenizer(["x"], truncation=True, max_length=9)  # the settings of a call are no difference
    encode(rows, tokenizer, 64, cache_dir=tmp_path)
    assert keys() == 5
    left = AutoTokenizer.from_pretrained(tokenizer.name_or_path, truncation_side="left")
    encode(rows, left, 64, cache_dir=tmp_path)
    cased = AutoTokenizer.from_pretrained(tokenizer.name_or_path, do_lower_case=False)
    encode(rows, cased, 64, cache_dir=tmp_path)
    assert keys() == 7


def test_arrays_of_another_version_are_not_read(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(rows, tokenizer, 64, cache_dir=tmp_path)
    monkeypatch.setattr(module, "VERSION", module.VERSION + "x")
    encode(rows, tokenizer, 64, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("name", ["tokens", "offsets", "first"])
def test_a_changed_number_is_noticed_in_every_array(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path, name: str
) -> None:
    first = encode(rows, tokenizer, 64, cache_dir=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, framework="numpy") as file:
        arrays = {key: file.get_tensor(key).copy() for key in ("tokens", "offsets", "first")}
        metadata = file.metadata()
    arrays[name][0] += 1
    save_file(arrays, path, metadata=metadata)
    with pytest.warns(UserWarning, match="the checksum does not match"):
        assert same(first, encode(rows, tokenizer, 64, cache_dir=tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
)
def test_a_damaged_cache_is_noticed_and_made_anew(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = encode(rows, tokenizer, 64, cache_dir=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.warns(UserWarning, match="damaged .* made anew"):
        assert same(first, encode(rows, tokenizer, 64, cache_dir=tmp_path))
    assert path.read_bytes() == good


def test_a_full_disk_costs_the_cache_only(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        split = encode(rows, tokenizer, 64, cache_dir=tmp_path)
    assert same(split, encode(rows, tokenizer, 64, cache=False))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_cannot_be(
    tokenizer: PreTrainedTokenizer, rows: RawSplit, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep the encoded data"):
        encode(rows, tokenizer, 64, cache_dir=tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("RANKWISE_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "rankwise"


def test_what_cannot_be_encoded(tokenizer: PreTrainedTokenizer, rows: RawSplit) -> None:
    with pytest.raises(ValueError, match="max_length=65 is more than the 64 tokens"):
        encode(rows, tokenizer, 65, cache=False)
    with pytest.raises(ValueError, match="leaves no room"):
        encode(rows, tokenizer, 2, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(rows, tokenizer, 3, cache=False).lengths.tolist() == [3] * 400
