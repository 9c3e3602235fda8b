"""Injection, switching, saved modules, merging and files of `PeftModel`."""

import copy
import inspect
import json
import warnings

import pytest
import torch
from torch import nn

import peft_custom
from peft_custom import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    iter_adapters,
    set_peft_model_state_dict,
)

transformers = pytest.importorskip("transformers")


def bert(layers: int = 2, head: str = "SequenceClassification") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
        num_labels=2 if head == "QuestionAnswering" else 3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{head}")(config).eval()


IDS = torch.arange(28).view(4, 7) % 40
QV = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}


def adapted(**options) -> PeftModel:
    return get_peft_model(bert(), LoraConfig(**{"task_type": "SEQ_CLS", **QV, **options}))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in iter_adapters(model.get_base_model())]


# --- choosing modules -----------------------------------------------------------------------------
def test_layers_to_transform() -> None:
    options = {"target_modules": ["query"], "layers_to_transform": [1, 3]}
    for pattern in ("layer", None):
        model = get_peft_model(bert(4), LoraConfig(**options, layers_pattern=pattern))
        assert names(model) == [f"bert.encoder.layer.{i}.attention.self.query" for i in (1, 3)]


def test_regular_expression() -> None:
    pattern = r".*\.layer\.[01]\.attention\.self\.(query|key)"
    assert len(names(get_peft_model(bert(4), LoraConfig(target_modules=pattern)))) == 4


def test_all_linear_leaves_the_head_alone() -> None:
    found = names(adapted(target_modules="all-linear"))
    assert len(found) == 2 * 6 + 1 and "bert.pooler.dense" in found and "classifier" not in found
    model = get_peft_model(bert(head="MaskedLM"), LoraConfig(target_modules="all-linear"))
    assert all(name.startswith("bert.") for name in names(model))
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(config)
    found = names(get_peft_model(gpt2, LoraConfig(target_modules="all-linear")))
    assert [name.rsplit(".", 1)[-1] for name in found] == ["c_attn", "c_proj", "c_fc", "c_proj"]


def test_default_targets_by_architecture() -> None:
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS"))
    assert len(names(model)) == 4 and model.peft_config["default"].target_modules == [
        "query", "value"]  # fmt: skip
    with pytest.raises(ValueError, match="target_modules is not set"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query", "valeu"]}, "'valeu'; did you mean 'value'"),
        ({"target_modules": "quer"}, "matches no module"),
        ({"target_modules": ["LayerNorm"]}, "'bert.embeddings.LayerNorm' is a LayerNorm"),
        ({"modules_to_save": ["clasifier"]}, "'clasifier'; did you mean 'classifier'"),
        ({"rank_pattern": {"quer": 3}}, "rank_pattern: 'quer' matches none"),
        ({"alpha_pattern": {"key": 3}}, "alpha_pattern: 'key' matches none"),
        ({"layers_to_transform": [7]}, "leave none of them"),
        ({"exclude_modules": ["query", "value"]}, "leave none of them"),
    ],
)
def test_what_matches_nothing_is_an_error_and_leaves_the_model_alone(options, message) -> None:
    model = bert()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**{**QV, **options}))
    assert [name for name, _ in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r=0: a rank is a positive whole number"),
        ({"r": 2.5}, ValueError, "r=2.5"),
        ({"rank_pattern": {"q": -1}}, ValueError, "rank_pattern"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout=1.0"),
        ({"bias": "some"}, ValueError, "bias='some'"),
        ({"init_lora_weights": "magic"}, ValueError, "init_lora_weights='magic'"),
        ({"task_type": "CLS"}, ValueError, "task_type='CLS'"),
        ({"target_modules": "(", }, ValueError, "not a regular expression"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, ValueError, "list of target"),
        ({"layers_pattern": "layer"}, ValueError, "layers_to_transform"),
        ({"use_dora": True}, NotImplementedError, "use_dora"),
        ({"loftq_config": {"loftq_bits": 4}}, NotImplementedError, "loftq_config"),
        ({"layer_replication": [(0, 2)]}, NotImplementedError, "layer_replication"),
        ({"megatron_config": {"a": 1}}, NotImplementedError, "megatron_config"),
        ({"init_lora_weights": "olora"}, NotImplementedError, "olora"),
        ({"init_lora_weights": "loftq"}, NotImplementedError, "loftq"),
    ],
)  # fmt: skip
def test_configurations_are_refused_in_words(options, error, message) -> None:
    with pytest.raises(error, match=message):
        LoraConfig(**options)


def test_torch_transformer_layers_do_not_bypass_their_adapters() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    options = {"r": 2, "init_lora_weights": False}
    model = get_peft_model(
        nn.TransformerEncoder(layer, 2), LoraConfig(target_modules="all-linear", **options)
    )
    assert sorted({name.rsplit(".", 1)[-1] for name in names(model)}) == ["linear1", "linear2"]
    x = torch.randn(2, 5, 8)
    want = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), want)
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-5)
    assert all(child.activation_relu_or_gelu for child in plain.layers)
    with pytest.raises(NotImplementedError, match="reads this weight past the module"):
        get_peft_model(nn.TransformerEncoder(layer, 1), LoraConfig(target_modules=["out_proj"]))


def test_quantised_base_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="quantised"):
        get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))


def test_rank_and_alpha_patterns_apply_to_each_on_its_own() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"l1": nn.Linear(4, 4), "l2": nn.Linear(4, 4)})
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["l1", "l2"], rank_pattern={"l2": 3},
        alpha_pattern={"l2": 9},
    )  # fmt: skip
    layers = dict(iter_adapters(get_peft_model(net, config).get_base_model()))
    assert layers["l2"].scaling["default"] == 3 and layers["l1"].scaling["default"] == 1
    assert layers["l2"].r["default"] == 3


def test_a_module_with_two_names_is_wrapped_once_under_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

    model = get_peft_model(Shared(), LoraConfig(target_modules=["a"]))
    inner = model.get_base_model()
    assert inner.a is inner.b and len(list(iter_adapters(inner))) == 1
    plain = model.unload()
    assert type(plain.a) is nn.Linear and plain.a is plain.b


# --- parameters ----------------------------------------------------------------------------------
def test_names_counts_and_the_printed_line(capsys) -> None:
    model = adapted()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    first = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
    assert trainable[0] == first
    assert trainable[-1] == "base_model.model.classifier.modules_to_save.default.bias"
    adapter, head = 4 * (4 * 16 + 16 * 4), 3 * 17
    total = sum(p.numel() for p in bert().parameters()) + adapter + head
    assert model.get_nb_trainable_parameters() == (adapter + head, total)
    model.print_trainable_parameters()
    share = 100 * (adapter + head) / total
    assert capsys.readouterr().out == (
        f"trainable params: {adapter + head:,} || all params: {total:,} || "
        f"trainable%: {share:.4f}\n"
    )


def test_bias_options() -> None:
    def biases(**options) -> list[str]:
        model = adapted(**options)
        return [
            name for name, p in model.get_base_model().named_parameters()
            if p.requires_grad and name.endswith("bias") and "classifier" not in name
        ]  # fmt: skip

    assert biases() == []
    assert len(biases(bias="lora_only")) == 4
    every = [name for name, _ in bert().named_parameters() if name.endswith(".bias")]
    assert len(biases(bias="all")) == len(every) - 1  # the head's are its copy's
    model = adapted(bias="all")
    with pytest.raises(ValueError, match="only one adapter may train them"):
        model.add_adapter("b", LoraConfig(task_type="SEQ_CLS", **QV, bias="lora_only"))
    half = nn.Sequential(nn.Linear(3, 3).bfloat16())
    with pytest.raises(ValueError, match="must be float32"):
        get_peft_model(half, LoraConfig(target_modules=["0"], bias="lora_only"))


def test_trained_biases_get_their_gradient() -> None:
    model = adapted(bias="lora_only").train()
    model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for _, layer in iter_adapters(model):
        assert layer.base_layer.bias.grad.abs().max() > 0
        assert layer.base_layer.weight.grad is None


def test_parameter_groups() -> None:
    model = adapted(bias="all", modules_to_save=["LayerNorm"])
    groups = {group["name"]: group for group in model.parameter_groups(1e-3, 0.1)}
    assert groups["decay"]["weight_decay"] == 0.1 and groups["no_decay"]["weight_decay"] == 0.0
    plain = {id(p) for p in groups["no_decay"]["params"]}
    count = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            count += 1
            assert (id(p) in plain) == (name.endswith("bias") or "LayerNorm" in name), name
    assert count == sum(len(group["params"]) for group in groups.values())


# --- adapters -------------------------------------------------------------------------------------
def two_adapters() -> PeftModel:
    model = adapted()
    torch.manual_seed(5)
    options = {**QV, "target_modules": ["key", "value"]}
    model.add_adapter("b", LoraConfig(task_type="SEQ_CLS", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p += torch.randn_like(p)
    return model.eval()


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
    with pytest.raises(NotImplementedError, match="use_dora"):
        PeftConfig.from_dict({**values, "use_dora": True})
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


# --- merging --------------------------------------------------------------------------------------
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
    model.merge_and_unload().save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


# --- the wrapper ----------------------------------------------------------------------------------
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
    key = "base_model.model.bert.embeddings.word_embeddings.weight"
    assert key not in get_peft_model_state_dict(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert state[key].shape == (40, 16)
    fresh = adapted(target_modules=["query", "word_embeddings"])
    with torch.no_grad():
        fresh.get_base_model().bert.embeddings.word_embeddings.base_layer.weight.zero_()
    set_peft_model_state_dict(fresh, state)
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    gathered = {k: torch.full_like(v, 7) for k, v in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered)
    assert all((v == 7).all() for v in state.values())
