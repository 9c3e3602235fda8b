"""Model folders of strangers: each fault is one error that names file and field, at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import transformers_patched as tp
from transformers_patched.checkpoint import CheckpointError
from transformers_patched.configuration import ConfigError

pytestmark = pytest.mark.timeout(120)
SIZES = dict(
    vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, max_position_embeddings=16, num_labels=3,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tp.BertForSequenceClassification(tp.BertConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def refused(folder: Path, *words: str) -> None:
    for load in (tp.AutoModelForSequenceClassification, tp.BertForSequenceClassification):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            load.from_pretrained(folder)
        for word in (*words, str(folder)):
            assert word in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": 1.5},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 1_000_000},
        {"hidden_size": "12"},
        {"hidden_size": True},
        {"layer_norm_eps": "1e-12"},
        {"layer_norm_eps": float("nan")},
        {"hidden_dropout_prob": [0.1]},
        {"hidden_act": 3},
        {"id2label": ["a", "b", "c"]},
        {"id2label": {"first": "a"}},
        {"id2label": None, "label2id": None, "num_labels": 300_000_000},
        {"tie_word_embeddings": "no"},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_or_size_is_named(changed: dict, folder: Path) -> None:
    field = next(reversed(changed))
    change(folder, **changed)
    refused(folder, "invalid literal" if changed == {"id2label": {"first": "a"}} else field)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size"])
def test_sizes_that_the_checkpoint_does_not_have_are_not_built(field: str, folder: Path) -> None:
    change(folder, **{field: 3 * 10**11})
    refused(folder, str(3 * 10**11))


def test_what_the_checkpoint_lacks_is_not_drawn_without_bound(folder: Path) -> None:
    change(folder, type_vocab_size=10**12)
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["bert.embeddings.token_type_embeddings.weight"]
    save_file(state, path, metadata={"format": "pt"})
    refused(folder, "token_type_embeddings", "config.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"a": ', "\x00"], ids=range(4))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object_is_named(name: str, text: str, folder: Path) -> None:
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    refused(folder, name)


def test_nesting_that_python_cannot_copy_is_refused(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f'{text}, "x": {"[" * 800 + "]" * 800}}}')
    refused(folder, "config.json", "nested")


def test_a_cut_checkpoint_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(folder, "model.safetensors")


def test_overrides_and_unusual_but_sound_files_load(folder: Path) -> None:
    change(
        folder,
        id2label={"0": 7, "1": 8, "2": 9},
        hidden_dropout_prob=0,
        classifier_dropout=None,
        somebody_elses={"a": [1]},
    )
    model = tp.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.config.somebody_elses == {"a": [1]}
    with pytest.warns(UserWarning, match="newly initialised"):
        deeper = tp.BertForSequenceClassification.from_pretrained(folder, num_hidden_layers=3)
    assert torch.isfinite(deeper(torch.ones(1, 4, dtype=torch.long)).logits).all()
