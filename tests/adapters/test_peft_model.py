"""Switching, mixing and merging adapters, and the wrapper around the model."""

import copy
import inspect

import pytest
import torch
from support.peft_tiny import IDS, QV, adapted, bert, transformers, two_adapters
from torch import nn

import peft_custom
from peft_custom import (
    LoraConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    iter_adapters,
    set_peft_model_state_dict,
)


# --- adapters ------------------------------------------------------------------------------------
def test_switching_flips_what_is_trained() -> None:
    model = two_adapters()
    assert model.active_adapter == "default"

    def trained(adapter: str) -> set[bool]:
        found = {
            p.requires_grad for _, m in iter_adapters(model) for p in m.adapter_parameters(adapter)
        }
        head = model.get_base_model().classifier.modules_to_save[adapter]
        return found | {p.requires_grad for p in head.parameters()}

    assert trained("default") == {True} and trained("b") == {False}
    a = model(input_ids=IDS).logits
    model.set_adapter("b")
    assert trained("default") == {False} and trained("b") == {True}
    assert not torch.allclose(model(input_ids=IDS).logits, a, atol=1e-2)
    model.set_adapter("default", inference_mode=True)
    assert trained("default") == {False}
    torch.testing.assert_close(model(input_ids=IDS).logits, a)
    with pytest.raises(ValueError, match="no adapter 'c'; there are: default, b"):
        model.set_adapter("c")
    with pytest.raises(ValueError, match="only one of them"):
        model.set_adapter(["default", "b"])


def test_disable_and_delete() -> None:
    model = two_adapters()
    with torch.no_grad():
        base = bert()(input_ids=IDS).logits
        mine = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)
        assert torch.equal(model(input_ids=IDS).logits, mine)
        model.merge_adapter()
        merged = model(input_ids=IDS).logits
        with pytest.raises(RuntimeError), model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, base)
            raise RuntimeError
        assert torch.equal(model(input_ids=IDS).logits, merged)
        model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapter == "b" and list(model.peft_config) == ["b"]
    assert not any("default" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="there is an adapter 'b' already"):
        model.add_adapter("b", LoraConfig(task_type="SEQ_CLS", **QV))
    with pytest.raises(ValueError, match="without a dot"):
        model.add_adapter("b.c", LoraConfig(task_type="SEQ_CLS", **QV))


def test_mixed_batch_equals_separate_runs() -> None:
    model = two_adapters()
    order = ["b", "__base__", "default", "b"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=order).logits
        rows = []
        for i, name in enumerate(order):
            if name == "__base__":
                with model.disable_adapter():
                    rows.append(model(input_ids=IDS[i : i + 1]).logits)
            else:
                model.set_adapter(name)
                rows.append(model(input_ids=IDS[i : i + 1]).logits)
    torch.testing.assert_close(mixed, torch.cat(rows), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="3 names for 4 samples"):
        model(input_ids=IDS, adapter_names=order[:3])
    with pytest.raises(ValueError, match="no adapter 'x'"):
        model(input_ids=IDS, adapter_names=["x"] * 4)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=IDS, adapter_names=order)
    torch.testing.assert_close(model.eval()(input_ids=IDS[3:]).logits, rows[3])


def test_mixed_batch_of_packed_tokens() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 3)

        def forward(self, x, cu_seqlens):
            return self.map(x)

    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["map"], "init_lora_weights": False}
    model = get_peft_model(Packed(), LoraConfig(**options))
    model.add_adapter("b", LoraConfig(**options))
    model.eval()
    x, bounds = torch.randn(6, 3), torch.tensor([0, 4, 6], dtype=torch.int32)
    mixed = model(x, cu_seqlens=bounds, adapter_names=["b", "default"])
    torch.testing.assert_close(mixed[4:], model(x, cu_seqlens=bounds)[4:])
    model.set_adapter("b")
    torch.testing.assert_close(mixed[:4], model(x, cu_seqlens=bounds)[:4])


def test_status() -> None:
    model = two_adapters()
    status = get_model_status(model)
    assert status.available_adapters == ["b", "default"] and status.enabled is True
    assert status.merged_adapters == [] and status.adapter_layers == 6
    first = get_layer_status(model)[0]
    assert first.name.endswith("query") and first.requires_grad == {"default": True}
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == "irregular"


# --- merging -------------------------------------------------------------------------------------
def test_merge_and_unload_verifies(capsys) -> None:
    model = adapted()
    want = model(input_ids=IDS).logits
    plain = model.merge_and_unload(verify={"input_ids": IDS}, tolerance=1e-5)
    assert capsys.readouterr().out.startswith("merged; largest logit difference ")
    assert type(plain) is type(bert())
    torch.testing.assert_close(plain(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-5)

    assert not plain.training  # as it was

    model = get_peft_model(bert().bfloat16(), LoraConfig(task_type="SEQ_CLS", **QV)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="rounded away"),
        pytest.raises(ValueError, match="unmerged again"),
    ):
        for _, layer in iter_adapters(model):
            layer.set_scale("default", 1e-3)
        model.merge_and_unload(verify={"input_ids": IDS}, tolerance=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert get_model_status(model).merged_adapters == []


def test_unload_drops_the_adapter() -> None:
    model = adapted()
    head = model.get_base_model().classifier.modules_to_save["default"]
    model.merge_adapter()
    plain = model.unload()
    want = bert().state_dict()
    assert all(torch.equal(v, want[k]) for k, v in plain.state_dict().items())
    assert plain.classifier is head


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids):
            return self.out(self.table(ids))

    torch.manual_seed(0)
    return Tied()


@pytest.mark.parametrize("target", ["table", "out"])
def test_tied_weights_are_not_merged_behind_the_users_back(target: str) -> None:
    model = get_peft_model(
        tied(), LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    )
    ids = torch.arange(9)
    want = model(ids)
    with pytest.raises(ValueError, match=f"{target!r} shares its weight with"):
        model.merge_and_unload()
    torch.testing.assert_close(model(ids), want)
    plain = model.merge_and_unload(untie=True, verify=ids)
    torch.testing.assert_close(plain(ids), want, rtol=1e-5, atol=1e-5)
    assert plain.table.weight is not plain.out.weight


def test_a_merged_language_model_saves_and_loads_untied(tmp_path) -> None:
    model = get_peft_model(
        bert(head="MaskedLM"), LoraConfig(**{**QV, "target_modules": ["word_embeddings"]})
    ).eval()
    want = model(input_ids=IDS).logits
    model.merge_and_unload(untie=True).save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_a_saved_copy_of_a_tied_embedding_stays_untied(tmp_path) -> None:
    with pytest.warns(UserWarning, match="Embedding shares its weight with cls.predictions"):
        model = get_peft_model(
            bert(head="MaskedLM"),
            LoraConfig(target_modules=["query"], modules_to_save=["word_embeddings"]),
        ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    want = model(input_ids=IDS).logits
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False  # else some releases tie them when loading
    plain.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


# --- the wrapper ---------------------------------------------------------------------------------
def test_task_classes_spell_their_arguments_out() -> None:
    for name in ("SequenceClassification", "TokenClassification", "CausalLM", "FeatureExtraction"):
        signature = inspect.signature(getattr(peft_custom, f"PeftModelFor{name}").forward)
        assert {"input_ids", "attention_mask", "token_type_ids", "labels", "cu_seqlens",
                "max_seqlen"} <= set(signature.parameters)  # fmt: skip
    signature = inspect.signature(peft_custom.PeftModelForQuestionAnswering.forward)
    assert {"start_positions", "end_positions"} <= set(signature.parameters)
    assert (
        "decoder_input_ids"
        in inspect.signature(peft_custom.PeftModelForSeq2SeqLM.forward).parameters
    )


def test_only_given_arguments_are_passed_on() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(3, 2)
            self.body = nn.Linear(3, 3)

        def forward(self, input_ids, cu_seqlens=None, max_seqlen=None):
            return self.score(self.body(input_ids)), cu_seqlens, max_seqlen

    model = get_peft_model(Small(), LoraConfig(task_type="SEQ_CLS", target_modules=["body"]))
    bounds = torch.tensor([0, 2])
    assert model(torch.randn(2, 3), cu_seqlens=bounds, max_seqlen=2)[1:] == (bounds, 2)


def test_attributes_come_from_the_model() -> None:
    model = adapted()
    assert model.config.hidden_size == 16 and model.device == torch.device("cpu")
    assert model.get_base_model() is model.base_model.model
    assert model.get_input_embeddings().num_embeddings == 40
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    with pytest.raises(TypeError, match="PeftModel already"):
        get_peft_model(model, LoraConfig(**QV))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_with_frozen_embeddings(reentrant) -> None:
    grads = []
    for checkpoint in (False, True):
        model = adapted().train()
        if checkpoint:
            options = None if reentrant is None else {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(options)
        model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g is not None and g.abs().max() > 0 for g in grads[1])
    torch.testing.assert_close(grads[1], grads[0])


def test_head_of_a_bf16_model_trains_in_fp32() -> None:
    model = get_peft_model(bert().bfloat16(), LoraConfig(task_type="SEQ_CLS", **QV)).train()
    out = model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0]))
    assert out.logits.dtype == torch.float32
    out.loss.backward()
    for p in model.parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32 and p.grad.dtype == torch.float32


def test_injection_without_a_wrapper() -> None:
    model = inject_adapter_in_model(LoraConfig(**QV), bert())
    assert type(model) is type(bert()) and len(list(iter_adapters(model))) == 4
    assert len(list(peft_custom.tuners.base.iter_tuners(model))) == 1
    state = get_peft_model_state_dict(model)
    assert len(state) == 8
    other = inject_adapter_in_model(LoraConfig(**QV), bert())
    set_peft_model_state_dict(other, state)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    inject_adapter_in_model(LoraConfig(**QV), model, "second")
    assert next(iter_adapters(model))[1].adapters == ["default", "second"]
    copied = copy.deepcopy(model)
    assert len(list(peft_custom.tuners.base.iter_tuners(copied))) == 1
    assert next(peft_custom.tuners.base.iter_tuners(copied)).model is copied


def test_trained_embeddings_and_gathered_values_go_into_the_file() -> None:
    model = adapted(target_modules=["query", "word_embeddings"])
    key = "base_model.model.bert.embeddings.word_embeddings.base_layer.weight"  # as PEFT's files
    assert key not in get_peft_model_state_dict(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert state[key].shape == (40, 16)
    fresh = adapted(target_modules=["query", "word_embeddings"])
    with torch.no_grad():
        fresh.get_base_model().bert.embeddings.word_embeddings.base_layer.weight.zero_()
    set_peft_model_state_dict(fresh, state)
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    state[key.replace(".base_layer", "")] = 2 * state.pop(key)  # as some files have it
    set_peft_model_state_dict(fresh, state)
    assert not torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    gathered = {k: torch.full_like(v, 7) for k, v in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered)
    assert all((v == 7).all() for v in state.values())
