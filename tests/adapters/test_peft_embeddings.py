"""Embedding tables in adapter files: rows added after loading must not be lost; PEFT's keys."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from support.peft_tiny import IDS, bert, transformers
from torch import Tensor, nn

import peft_custom
from peft_custom.save_and_load import load_adapter, read_adapter

peft = pytest.importorskip("peft")
LIBRARIES = [peft, peft_custom]
NEW_IDS = IDS + 2  # the last of 0 … 41 among them
TABLE = "base_model.model.bert.embeddings.word_embeddings"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert(head="MaskedLM").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base(folder: Path, rows: int = 42) -> nn.Module:
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def adapted(library: ModuleType, model: nn.Module, *more: str) -> nn.Module:
    """Two new rows of their own, and adapters on query and value."""
    torch.manual_seed(3)
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:] += torch.randn(2, 16)
    options = {"r": 2, "target_modules": ["query", "value", *more], "init_lora_weights": False}
    return library.get_peft_model(model, library.LoraConfig(**options)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=NEW_IDS).logits


@pytest.mark.parametrize("more", [(), ("word_embeddings",)])
@pytest.mark.parametrize("writer", LIBRARIES)
@pytest.mark.parametrize("reader", LIBRARIES)
def test_resized_tables_travel_both_ways(writer, reader, more, folder, tmp_path) -> None:
    model = adapted(writer, base(folder), *more)
    want = logits(model)
    with pytest.warns(UserWarning, match="resized during|the vocabulary is 42, and 40 in the base"):
        model.save_pretrained(tmp_path / "adapter")
    again = reader.PeftModel.from_pretrained(base(folder), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("more", [(), ("word_embeddings",), ("decoder",)])
def test_the_keys_are_pefts(more, folder, tmp_path) -> None:
    keys = []
    for library in LIBRARIES:
        model = adapted(library, base(folder), *more)
        with pytest.warns(UserWarning):
            model.save_pretrained(tmp_path / library.__name__)
        keys.append(set(load_file(tmp_path / library.__name__ / "adapter_model.safetensors")))
    assert keys[0] == keys[1]


def test_an_adapted_embed_tokens_is_saved_as_peft_does(tmp_path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    keys = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model = library.get_peft_model(
            model, library.LoraConfig(r=2, target_modules=["embed_tokens"])
        )
        with pytest.warns(UserWarning, match="save"):
            model.save_pretrained(tmp_path / library.__name__)
        keys.append(set(load_file(tmp_path / library.__name__ / "adapter_model.safetensors")))
    assert keys[0] == keys[1]
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys[1]


def test_a_vocabulary_as_it_was_stays_out_of_the_file(folder, tmp_path) -> None:
    model = adapted(peft_custom, transformers.BertForMaskedLM.from_pretrained(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "same")
    keys = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all("lora_" in key for key in keys)
    grown = adapted(peft_custom, base(folder))
    grown.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert all("lora_" in k for k in load_file(tmp_path / "without" / "adapter_model.safetensors"))
    for file in folder.iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="no config.json to be read there"):
        grown.save_pretrained(tmp_path / "gone")


def test_a_base_without_the_rows_says_what_to_do(folder, tmp_path) -> None:
    with pytest.warns(UserWarning, match="the vocabulary is 42"):
        adapted(peft_custom, base(folder)).save_pretrained(tmp_path / "adapter")
    small = transformers.BertForMaskedLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"file \(42, 16\), model \(40, 16\); resize the model"):
        peft_custom.PeftModel.from_pretrained(small, tmp_path / "adapter")
    file = read_adapter(tmp_path / "adapter")
    fresh = adapted(peft_custom, small)
    with pytest.raises(ValueError, match=r"word_embeddings.weight: file \(42, 16\)"):
        load_adapter(fresh, file)
    right = adapted(peft_custom, base(folder))
    with torch.no_grad():
        right.get_input_embeddings().weight.zero_()
    assert load_adapter(right, file).unexpected_keys == []
    assert torch.equal(logits(right), logits(adapted(peft_custom, base(folder))))


def test_a_merged_table_is_saved_and_loaded_unmerged(folder, tmp_path) -> None:
    model = adapted(peft_custom, base(folder), "word_embeddings")
    layer = model.get_base_model().bert.embeddings.word_embeddings
    table = layer.base_layer.weight.detach().clone()
    model.merge_adapter(untie=True)
    with pytest.warns(UserWarning, match="the vocabulary is 42"):
        model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved[f"{TABLE}.base_layer.weight"], table)
    saved[f"{TABLE}.base_layer.weight"] += 1.0
    with pytest.warns(UserWarning, match="everything is unmerged"):
        peft_custom.set_peft_model_state_dict(model, saved)
    assert torch.equal(layer.base_layer.weight, table + 1.0)
