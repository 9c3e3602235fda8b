"""What people do with a model beside running it: edit it, adapt it, freeze it, read its outputs."""

import copy
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.models import HEADS, SIZES, V2
from support.paths import ROOT
from torch import nn

import transformers_patched as tp
from transformers_patched.heads import ModelOutput, SequenceClassifierOutput

IDS = torch.tensor([[5, 9, 11, 4, 30], [7, 8, 3, 2, 6]])
TARGETS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


MODELS = {  # name -> its options beyond SIZES, and the linear maps that get LoRA
    "Bert": ({}, ("query", "value")),
    "Roberta": ({}, ("query", "value")),
    "DebertaV2": (V2, ("query_proj", "key_proj", "value_proj", "dense")),
}


def classifier(name: str = "Bert", **options) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(tp, f"{name}Config")(**{**SIZES, **options})
    return getattr(tp, f"{name}ForSequenceClassification")(config).eval()


# ---------------------------------------------------------------------- the package


def test_every_name_is_exported() -> None:
    for name in tp.__all__:
        assert isinstance(getattr(tp, name), type), name
    with pytest.raises(AttributeError, match="BertForNothing"):
        tp.BertForNothing  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    script = (
        "import sys, transformers_patched as tp; tp.RobertaConfig(); print('torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "False"


# ---------------------------------------------------------------------- editing a model


def test_an_edit_of_the_file_acts() -> None:
    """A copy of the modelling file whose attention output is halved gives another model."""
    package = "transformers_patched.models.bert"
    source = (ROOT / "transformers_patched/models/bert/modeling_bert.py").read_text()
    line = "self.LayerNorm(self.dropout(self.dense(context)) + residual)"
    assert source.count(line) == 1
    edited = source.replace(line, line.replace("self.dropout(", "0.5 * self.dropout("))

    def run(text: str) -> torch.Tensor:
        spec = importlib.util.spec_from_loader(f"{package}.modeling_edited", loader=None)
        module = importlib.util.module_from_spec(spec)
        module.__package__ = package
        exec(compile(text, "modeling_edited.py", "exec"), module.__dict__)
        torch.manual_seed(0)
        return module.BertModel(tp.BertConfig(**SIZES)).eval()(IDS).last_hidden_state

    torch.manual_seed(0)
    expected = tp.BertModel(tp.BertConfig(**SIZES)).eval()
    assert torch.equal(run(source), expected(IDS).last_hidden_state)
    for layer in expected.encoder.layer:  # the same edit, made on the weights
        layer.attention.output.dense.weight.data *= 0.5
        layer.attention.output.dense.bias.data *= 0.5
    halved = run(edited)
    torch.testing.assert_close(halved, expected(IDS).last_hidden_state)
    assert not torch.allclose(halved, run(source), atol=1e-2)


# ---------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_apply_lora_builds_loralib_layers(name: str) -> None:
    import loralib as lora

    model = classifier(name, apply_lora=True, lora_r=2, lora_alpha=6)
    adapted = [n for n, module in model.named_modules() if isinstance(module, lora.Linear)]
    prefix = f"{name.lower()}.encoder.layer"
    assert adapted == [
        f"{prefix}.{i}.attention.self.{target}" for i in range(2) for target in ("query", "value")
    ]
    everywhere = classifier(name, apply_lora=True, lora_modules=list(TARGETS))
    adapted = {n for n, module in everywhere.named_modules() if isinstance(module, lora.Linear)}
    assert adapted == {f"{prefix}.{i}.{path}" for i in range(2) for path in TARGETS.values()}

    # B starts at zero; then the layer is Wx + b + (alpha / r)·B·A·x
    layer = model.base_model.encoder.layer[0].attention.self.query
    x = torch.randn(5, 12)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), plain)
    nn.init.normal_(layer.lora_B)
    update = 3.0 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), plain + update)


def test_plain_weights_load_under_lora_and_lora_checkpoints_come_back(tmp_path: Path) -> None:
    plain = classifier()
    plain.save_pretrained(tmp_path / "plain")
    options = {"apply_lora": True, "lora_r": 2, "lora_modules": ("key", "output")}
    with pytest.warns(UserWarning, match="newly initialised.*key.lora_A"):
        model = tp.BertForSequenceClassification.from_pretrained(tmp_path / "plain", **options)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            assert (weight.count_nonzero() > 0) == name.endswith("lora_A")
            nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = tp.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapted")
    assert (again.config.lora_r, again.config.lora_modules) == (2, ("key", "output"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not torch.allclose(again(IDS).logits, plain(IDS).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "lora_r is 0; the rank must be a positive integer, for example 8"),
        ({"lora_r": -4}, "lora_r is -4"),
        ({"lora_r": 2.5}, "lora_r is 2.5"),
        ({"lora_type": "lora2"}, "lora_type is 'lora2'; known are lora"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_modules": ("query", "q_proj")}, "names 'q_proj'; bert has 'query', 'key', 'value'"),
        ({"lora_modules": ()}, "lora_modules names nothing"),
    ],
)
def test_impossible_lora(options: dict, message: str) -> None:
    with pytest.raises(tp.ConfigError, match=message):
        classifier(apply_lora=True, **options)


# ---------------------------------------------------------------------- freezing


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_freeze_base_trains_lora_and_the_head(name: str) -> None:
    model = classifier(name, apply_lora=True, lora_r=2)
    model.freeze_base()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {n for n, _ in model.named_parameters() if "lora_" in n}
    head = {n for n, _ in model.named_parameters() if n.startswith("classifier.")}
    assert trained == factors | head and len(factors) == 8
    assert model.num_parameters(only_trainable=True) == sum(
        p.numel() for n, p in model.named_parameters() if n in trained
    )
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in trained), n


def test_nothing_random_is_frozen(tmp_path: Path) -> None:
    """A checkpoint without a pooler: it is drawn anew, so it stays trainable."""
    bare = tp.BertModel(tp.BertConfig(**SIZES), add_pooling_layer=False)
    assert bare(IDS).pooler_output is None
    bare.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="bert.pooler.dense.weight"):
        model = tp.BertForSequenceClassification.from_pretrained(tmp_path)
    model.freeze_base()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_base_in_bf16(name: str, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options, modules = MODELS[name]
    config = getattr(tp, f"{name}Config")(**{**SIZES, **options})
    reference = getattr(tp, name + head)(config).eval()
    reference.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="lora_A"):
        model = type(reference).from_pretrained(
            tmp_path, base_dtype=torch.bfloat16, apply_lora=True, lora_r=2, lora_modules=modules
        )
    ids = IDS[:, None].repeat(1, 2, 1) if head == "ForMultipleChoice" else IDS
    labels = {
        "ForMaskedLM": {"labels": ids},
        "ForQuestionAnswering": dict.fromkeys(("start_positions", "end_positions"), ids[:, 0] % 5),
    }.get(head, {"labels": torch.tensor([0, 1])})
    logits, expected = (m(ids, **labels).to_tuple()[1] for m in (model, reference))
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * max(1.0, expected.abs().max())
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 0.1))
    model(ids, **labels).loss.backward()
    optimizer.step()
    for n, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), n
        assert (p.grad is not None) == p.requires_grad, n
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    in_head = {n for n, _ in model.named_parameters() if not n.startswith(model.base_model_prefix)}
    assert trained == in_head | {n for n, _ in model.named_parameters() if "lora_" in n}


def test_parameter_groups() -> None:
    model = classifier(apply_lora=True, lora_r=2)
    groups = {group["name"]: group for group in model.parameter_groups(1e-3, 0.1)}
    names = {p: n for n, p in model.named_parameters()}
    in_group = {key: {names[p] for p in group["params"]} for key, group in groups.items()}
    assert in_group["decay"] | in_group["no_decay"] == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert all(n.endswith("bias") or "LayerNorm" in n for n in in_group["no_decay"])
    assert not any(n.endswith("bias") or "LayerNorm" in n for n in in_group["decay"])
    assert (groups["decay"]["lr"], groups["decay"]["weight_decay"]) == (1e-3, 0.1)
    assert groups["no_decay"]["weight_decay"] == 0.0
    for p in model.parameters():
        p.requires_grad_(False)
    assert model.parameter_groups(1e-3, 0.1) == []


def test_tied_weights_stay_tied() -> None:
    model = tp.RobertaForMaskedLM(tp.RobertaConfig(**SIZES))
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    model.set_input_embeddings(nn.Embedding(31, 12))
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    model = copy.deepcopy(model).double()
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert (model.dtype, model.device.type) == (torch.float64, "cpu")
    untied = tp.RobertaForMaskedLM(tp.RobertaConfig(**SIZES, tie_word_embeddings=False))
    assert untied.lm_head.decoder.weight is not untied.get_input_embeddings().weight


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = classifier(name).train()
    grads = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model.zero_grad()
        model(IDS, labels=torch.tensor([0, 1])).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=1, offload=False)
    with pytest.raises(ValueError, match="non-re-entrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="'offload': True"):
        model.gradient_checkpointing_enable(offload=True)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    model = classifier(num_hidden_layers=4).train()

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(IDS, labels=torch.tensor([0, 1]))
        return sum(sizes)

    before = kept()
    model.gradient_checkpointing_enable()
    assert kept() < before / 2


def test_dropout_acts_in_training_only() -> None:
    model = classifier()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    still = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert torch.equal(still.train()(IDS).logits, still.eval()(IDS).logits)


def test_initialisation() -> None:
    model = tp.BertForSequenceClassification(tp.BertConfig(**{**SIZES, "hidden_size": 60}))
    state = model.state_dict()
    assert state["bert.embeddings.word_embeddings.weight"][0].count_nonzero() == 0
    assert state["classifier.bias"].count_nonzero() == 0
    assert (state["bert.encoder.layer.0.output.LayerNorm.weight"] == 1).all()
    assert abs(state["bert.encoder.layer.1.intermediate.dense.weight"].std() - 0.3) < 0.03


# ---------------------------------------------------------------------- configurations and outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_act": "gelu_fast"},
            "hidden_act 'gelu_fast' is unknown; known are gelu, gelu_new",
        ),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"hidden_size": 13}, "hidden_size 13 is no multiple of the 3 attention heads"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"is_decoder": True}, "encoders only"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"num_labels": 0}, "num_labels must be a positive integer, not 0"),
    ],
)
def test_impossible_configurations(options: dict, message: str) -> None:
    with pytest.raises(tp.ConfigError, match=message):
        classifier(**options)


def test_outputs() -> None:
    model = classifier()
    output = model(IDS, labels=torch.tensor([0, 1]))
    assert output.logits is output["logits"] is output[1] is output.to_tuple()[1]
    assert output[:1] == (output.loss,) and output.attentions is None and "attentions" not in output
    assert list(output) == ["loss", "logits"]
    as_tuple = model(IDS, labels=torch.tensor([0, 1]), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], output.logits)
    assert len(model(IDS, return_dict=False)) == 1
    model.config.return_dict, model.config.output_hidden_states = False, True
    assert len(model(IDS)) == 2 and len(model(IDS)[1]) == 3
    with pytest.raises(AttributeError, match="no field 'start_logits'"):
        output.start_logits  # noqa: B018
    with pytest.raises(TypeError, match="no field 'start_logits'"):
        SequenceClassifierOutput(start_logits=1)
    again = type(output)(
        {key: value.detach().double() for key, value in output.items()}
    )  # as accelerate does
    assert again.logits.dtype == torch.float64 and isinstance(again, ModelOutput)
    assert copy.deepcopy(again).keys() == again.keys()
    again.loss = None
    assert again.loss is None


def test_labels_follow_their_number() -> None:
    config = tp.BertConfig(id2label={"0": "no", "1": "maybe", "2": "yes"})
    assert (config.num_labels, config.label2id["yes"]) == (3, 2)
    config.num_labels = 3
    assert config.id2label[1] == "maybe"
    config.num_labels = 2
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    again = tp.BertConfig.from_dict(config.to_dict())
    assert again == config and copy.deepcopy(config) == config


def test_auto_classes(tmp_path: Path) -> None:
    for head in ("ForMaskedLM", "ForQuestionAnswering", "ForMultipleChoice"):
        classifier("Roberta").roberta.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="newly initialised"):
            model = getattr(tp, f"AutoModel{head}").from_pretrained(tmp_path)
        assert type(model) is getattr(tp, f"Roberta{head}")
    config = tp.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1)
    assert len(tp.AutoModel.from_config(config).encoder.layer) == 1
    given = copy.deepcopy(config)
    with pytest.warns(UserWarning, match="not in the model: .*layer.1"):
        loaded = tp.AutoModel.from_pretrained(tmp_path, config=config, hidden_dropout_prob=0.5)
    assert len(loaded.encoder.layer) == 1 and loaded.config.hidden_dropout_prob == 0.5
    assert config == given  # the caller's stays as it was


def test_peft_adapts_these_models(tmp_path: Path) -> None:
    """The public PEFT wraps, trains, saves and reloads adapters on a model from here."""
    peft = pytest.importorskip("peft")
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2}
    model = peft.get_peft_model(classifier("Roberta"), peft.LoraConfig(**options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(input_ids=IDS).logits
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    after = model.eval()(input_ids=IDS).logits
    assert not torch.allclose(before, after, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(classifier("Roberta"), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, after)


@pytest.mark.parametrize("name", ["Roberta", "DebertaV2"])
def test_compiles_in_one_graph(name: str) -> None:
    model = classifier(name, **MODELS[name][0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
