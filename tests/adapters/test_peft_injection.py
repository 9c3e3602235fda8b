"""Which modules an adapter goes into, what it refuses, and what is trained."""

import copy
import warnings

import pytest
import torch
from support.peft_tiny import IDS, QV, adapted, bert, names, transformers
from torch import nn

from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    LoraConfig,
    get_peft_model,
    iter_adapters,
)


# --- choosing modules ----------------------------------------------------------------------------
def test_layers_to_transform() -> None:
    options = {"target_modules": ["query"], "layers_to_transform": [1, 3]}
    for pattern in ("layer", None):
        model = get_peft_model(bert(4), LoraConfig(**options, layers_pattern=pattern))
        assert names(model) == [f"bert.encoder.layer.{i}.attention.self.query" for i in (1, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform: no target is in layer 7; .* 0, 1"),
        ({"layers_to_transform": [0, -1, 2]}, "no target is in layer -1, 2;"),
        ({"layers_to_transform": [0], "target_modules": ["query", "pooler.dense"]},
         r"target_modules: 'pooler.dense' adapts nothing.*layers \[0\]"),
        ({"layers_to_transform": 1, "target_modules": ["bert.encoder.layer.0.output.dense", "key"]},
         "'bert.encoder.layer.0.output.dense' adapts nothing"),
        ({"exclude_modules": ["pooler", "layer.9"]}, "exclude_modules: 'layer.9' names no module"),
        ({"exclude_modules": r".*layer\.9.*"}, "names no module"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [LoraConfig, AdaLoraConfig, BimLoraConfig])
def test_entries_without_effect_are_named(config, options, message) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        get_peft_model(bert(), config(**{"target_modules": ["query"], **options}))
    assert len(caught) == 1


def test_entries_with_an_effect_are_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = {"layers_to_transform": [1], "layers_pattern": ["h", "layer"]}
        model = get_peft_model(bert(), LoraConfig(target_modules=["query", "dense"], **some))
        assert all(".layer.1." in name for name in names(model)) and len(names(model)) == 4
        without = LoraConfig(target_modules="all-linear", exclude_modules=["pooler.dense"])
        assert len(names(get_peft_model(bert(), without))) == 2 * 6
        config = BimLoraConfig(layers_to_transform=[0])  # of all linear maps
        model = get_peft_model(bert(), config)
        assert len(names(model)) == 6
        again = get_peft_model(bert(), model.peft_config["default"])  # as a file has it
        assert names(again) == names(model)


def test_of_nested_lists_the_outer_number_counts() -> None:
    experts = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(4, 4)}) for _ in range(2)])
    block = nn.ModuleDict({"experts": experts})
    net = nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)])})
    options = {"target_modules": ["gate"], "layers_to_transform": [1]}
    model = get_peft_model(net, LoraConfig(**options))
    assert names(model) == ["layers.1.experts.0.gate", "layers.1.experts.1.gate"]


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
        ({"loftq_config": {"loftq_bits": 4}}, NotImplementedError, "loftq_config"),
        ({"layer_replication": [(0, 2)]}, NotImplementedError, "layer_replication"),
        ({"megatron_config": {"a": 1}}, NotImplementedError, "megatron_config"),
        ({"init_lora_weights": "corda"}, NotImplementedError, "corda"),
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
