"""Heads that travel, strict loading, and the files themselves."""

import copy
import json
import warnings

import pytest
import torch
from support.peft_tiny import IDS, QV, adapted, bert, two_adapters
from torch import nn

from peft_custom import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


# --- saved modules and strict loading ------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "head", "extra"),
    [
        ("SEQ_CLS", "SequenceClassification", {}),
        ("TOKEN_CLS", "TokenClassification", {}),
        ("QUESTION_ANS", "QuestionAnswering", {}),
        (None, "MultipleChoice", {"modules_to_save": ["classifier"]}),
    ],
)
def test_the_head_travels_with_the_adapter(task, head, extra, tmp_path) -> None:
    base = bert(head=head)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type=task, **QV, **extra)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    ids = IDS[None] if head == "MultipleChoice" else IDS
    want = model(input_ids=ids).to_tuple()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert type(again) is type(model)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for a, b in zip(again(input_ids=ids).to_tuple(), want, strict=True):
        assert torch.equal(a, b)
    more = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert more.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    merged = again.merge_and_unload()
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(merged(input_ids=ids).to_tuple(), want, rtol=1e-4, atol=1e-5)


def test_a_task_without_its_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="no head called classifier or score"):
        get_peft_model(
            nn.Sequential(nn.Linear(2, 2)), LoraConfig(task_type="SEQ_CLS", target_modules=["0"])
        )


def test_random_frozen_weights_are_named() -> None:
    model = bert()
    model.newly_initialised = ("bert.pooler.dense.weight", "bert.pooler.dense.bias",
                               "classifier.weight", "classifier.bias")  # fmt: skip
    with pytest.warns(UserWarning, match=r"^bert.pooler.dense: newly initialised.*'bert.pooler"):
        get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **QV))
    model = bert()
    model.newly_initialised = ("bert.pooler.dense.weight", "classifier.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", **QV, modules_to_save=["pooler.dense"])
        )


def test_loading_is_strict(tmp_path) -> None:
    model = adapted()
    state = get_peft_model_state_dict(model)
    assert set(state) >= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    first = next(iter(state))
    cut = {k: v for k, v in state.items() if "classifier" not in k}
    with pytest.raises(
        ValueError, match=r"(?s)missing \(2\):\n    base_model.model.classifier.weight\n.*bias"
    ):
        set_peft_model_state_dict(model, cut)
    report = set_peft_model_state_dict(model, cut, strict=False)
    assert [k[17:] for k in report.missing_keys] == ["classifier.weight", "classifier.bias"]
    with pytest.raises(ValueError, match=r"unknown \(1\):\n    base_model.model.typo.weight"):
        set_peft_model_state_dict(model, {**state, "base_model.model.typo.weight": state[first]})
    with pytest.raises(
        ValueError, match=r"(?s)wrong shape \(1\):.*file \(3, 16\), model \(4, 16\)"
    ):
        set_peft_model_state_dict(model, {**state, first: state[first][:3]})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(ValueError, match="wrong shape"):
        PeftModel.from_pretrained(bert(), tmp_path)
    model = adapted()
    with pytest.raises(ValueError, match="wrong shape"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]  # a failed load leaves nothing behind
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither adapter_model.safetensors nor"):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_files(tmp_path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
        "b/README.md", "b/adapter_config.json", "b/adapter_model.safetensors",
    ]  # fmt: skip
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config) and text.startswith('{\n  "alpha_pattern"')
    assert config["inference_mode"] is True and config["modules_to_save"] == ["classifier"]
    assert model.peft_config["default"].inference_mode is False
    model.set_adapter("b")
    want = model(input_ids=IDS).logits
    again = PeftModel.from_pretrained(bert(), tmp_path / "b", adapter_name="x")
    assert torch.equal(again(input_ids=IDS).logits, want)
    again.load_adapter(tmp_path, "y")
    assert again.active_adapter == "x"
    again.set_adapter("y")
    model.set_adapter("default")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    for file in tmp_path.glob("*.*"):  # tensors as readable as the rest
        assert file.stat().st_mode == (tmp_path / "adapter_config.json").stat().st_mode
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, safe_serialization=False, selected_adapters=["default"])
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not (tmp_path / "adapter_model.safetensors").exists()
    binary = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(binary(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_pickle_is_not_executed(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    adapted().peft_config["default"].save_pretrained(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def broken(state, path, metadata) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("peft_custom.save_and_load.save_file", broken)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_keys_of_newer_configurations(tmp_path, monkeypatch) -> None:
    values = LoraConfig(**QV).to_dict()
    new = {"use_qalora": False, "qalora_group_size": 16, "eva_config": None, "peft_version": "9.9",
           "some_future_option": None, "another": [], "lora_bias": False}  # fmt: skip
    assert isinstance(PeftConfig.from_dict({**values, **new}), LoraConfig)
    for key, value in [("lora_bias", True), ("some_future_option", 3), ("qalora_group_size", 32),
                       ("trainable_token_indices", [1, 2])]:  # fmt: skip
        with pytest.raises(ValueError, match=key):
            PeftConfig.from_dict({**values, **new, key: value})
    with pytest.raises(NotImplementedError, match="megatron_config"):
        PeftConfig.from_dict({**values, "megatron_config": {"a": 1}})
    assert PeftConfig.from_dict({**values, "init_lora_weights": "eva"}).init_lora_weights is True
    with pytest.raises(ValueError, match="'LOHA' is not supported here; known types:.*LORA"):
        PeftConfig.from_dict({**values, "peft_type": "LOHA"})
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a hub id"):
        PeftConfig.from_pretrained("runs/no/such/folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="the hub could not be asked for adapter_config"):
        PeftConfig.from_pretrained("nobody/nothing", cache_dir=tmp_path / "cache")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)
