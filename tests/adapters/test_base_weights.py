"""An adapter knows its base: other weights of the same shapes are an error, a copy is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.gpt2_tiny import tiny_gpt2

from peft_custom import LoraConfig, PeftModel, get_peft_model
from peft_custom.base_weights import FILE, OtherBaseError, describe, refuse_other_base, write
from transformers_patched import GPT2ForSequenceClassification, GPT2LMHeadModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("base"), num_labels=2)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = GPT2LMHeadModel.from_pretrained(base)
    found = describe(model, str(base))
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    write(tmp_path / "adapter", found)
    return tmp_path / "adapter"


def changed(base: Path) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel.from_pretrained(base)
    with torch.no_grad():
        model.transformer.ln_f.bias[3] += 1e-4
    return model


def test_other_weights_are_refused_and_stay_as_they_were(base: Path, adapter: Path) -> None:
    PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), adapter)
    other = changed(base)
    before = list(other.state_dict())
    with pytest.raises(OtherBaseError, match=f"other base weights .*{base}"):
        PeftModel.from_pretrained(other, adapter)
    assert list(other.state_dict()) == before
    (adapter / FILE).unlink()
    PeftModel.from_pretrained(other, adapter)


def test_the_head_does_not_count(base: Path, adapter: Path) -> None:
    refuse_other_base(adapter, GPT2ForSequenceClassification.from_pretrained(base))


def test_transformers_own_model_is_the_same_base(base: Path, adapter: Path) -> None:
    theirs = pytest.importorskip("transformers").GPT2LMHeadModel
    PeftModel.from_pretrained(theirs.from_pretrained(base), adapter)


def test_rounded_weights_are_compared_where_that_can_be(base: Path, tmp_path: Path) -> None:
    half = GPT2LMHeadModel.from_pretrained(base).bfloat16()
    write(tmp_path, describe(half, "half"))
    refuse_other_base(tmp_path, GPT2LMHeadModel.from_pretrained(base))
    other = changed(base)
    with torch.no_grad():
        other.transformer.ln_f.bias[3] += 1.0
    with pytest.raises(OtherBaseError):
        refuse_other_base(tmp_path, other)
    write(tmp_path, describe(GPT2LMHeadModel.from_pretrained(base), "whole"))
    refuse_other_base(tmp_path, half)  # what was rounded away cannot be known


def test_random_parts_do_not_count(base: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(base)
    write(tmp_path, describe(model, "", without=["transformer.ln_f.bias"]))
    refuse_other_base(tmp_path, changed(base))


def test_a_damaged_file_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"name": "x", "sum": 3}', "utf-8")
    with pytest.raises(ValueError, match=FILE):
        refuse_other_base(tmp_path, GPT2LMHeadModel.from_pretrained(base))
