"""DeBERTa-v2/v3 is Transformers' in every number, and packed tokens give what padded ones give."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from support.models import (
    CONV,
    HEADS,
    V2,
    V3,
    assert_both_ways,
    batch,
    labels_of_heads,
)
from torch import nn

import transformers_patched as ours
from transformers_patched.models.deberta_v2 import disentangled
from transformers_patched.models.deberta_v2.disentangled import RelativePositions, log_buckets

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

SMALL = dict(vocab_size=61, num_hidden_layers=2, max_position_embeddings=29)
LONG = (23, 9, 4)  # real tokens of three rows
SETTINGS = {
    "v3": V3,
    "v2": V2,
    "unbucketed": {**V3, "position_buckets": -1, "max_relative_positions": 11},
    "own projections": {**V3, "share_att_key": False, "norm_rel_ebd": "none", "num_labels": 2},
    "c2p alone": {**V3, "pos_att_type": ["c2p"], "hidden_size": 35, "num_attention_heads": 5},
    "p2c alone": {**V3, "pos_att_type": ["p2c"], "share_att_key": False, "pad_token_id": 3},
    "no position term": {**V3, "pos_att_type": [], "position_biased_input": True},
    "not relative": {**V3, "relative_attention": False, "norm_rel_ebd": "none"},
    "everything": {
        **V3,
        **CONV,
        "position_biased_input": True,
        "type_vocab_size": 2,
        "embedding_size": 20,
        "hidden_act": "gelu_new",
        "conv_kernel_size": 5,
        "conv_groups": 4,
        "conv_act": "tanh",
        "pooler_hidden_act": "tanh",
        "tie_word_embeddings": False,
        "position_buckets": 12,
        "max_relative_positions": 20,
    },
    "defaults": dict(hidden_size=24, num_attention_heads=1, intermediate_size=8),
}


def peer(head: str, seed: int, **sizes) -> nn.Module:
    """A Transformers model with every weight random, biases and LayerNorms included."""
    torch.manual_seed(seed)
    labels = 3 if head == "ForSequenceClassification" else 2
    config = hf.DebertaV2Config(**{**SMALL, **sizes, "num_labels": labels})
    model = getattr(hf, f"DebertaV2{head}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:  # of size 1, so that positions and attention count
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 1.0 / config.hidden_size**0.5)
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_both_directions(setting: str, head: str, tmp_path: Path) -> None:
    assert_both_ways(peer(head, 0, **SETTINGS[setting]), LONG, tmp_path)


@pytest.mark.parametrize("setting", ["v3", "v2", "everything", "not relative"])
def test_hidden_states_attentions_and_embeds(setting: str, tmp_path: Path) -> None:
    theirs = peer("ForSequenceClassification", 0, **SETTINGS[setting])
    theirs.save_pretrained(tmp_path)
    model = ours.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(model, ours.DebertaV2ForSequenceClassification)
    inputs = batch("ForSequenceClassification", model.config, LONG)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, expected = model(**inputs, **asked), theirs(**inputs, **asked)
    assert list(got) == list(expected) == ["logits", "hidden_states", "attentions"]
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.hidden_states[0], expected.hidden_states[0])  # 0 at padding
    for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=1e-5, atol=1e-5)
    for x, y in zip(got.attentions, expected.attentions, strict=True):  # (B, heads, L, L)
        rows = mask[:, None, :, None].expand_as(x)
        torch.testing.assert_close(x[rows], y[rows], rtol=1e-5, atol=1e-6)

    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        got, expected = (m(inputs_embeds=embeds, **inputs) for m in (model, theirs))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", ["v3", "v2", "own projections", "everything"])
def test_losses_and_gradients(setting: str, tmp_path: Path) -> None:
    """Every parameter's gradient, the relative table's and both embeddings' among them."""
    torch.manual_seed(3)
    cases = labels_of_heads(LONG[0])
    for head, labels in cases.items():
        theirs = peer(head, 1, **SETTINGS[setting])
        theirs.save_pretrained(tmp_path)
        model = getattr(ours, f"DebertaV2{head}").from_pretrained(tmp_path)
        inputs = batch(head, model.config, LONG)
        if head == "ForQuestionAnswering":
            del inputs["attention_mask"]  # with padding, ours leaves it out of the softmax
        if head == "ForMaskedLM":
            labels["labels"] = labels["labels"].where(inputs["attention_mask"].bool(), -100)
        losses = [m(**inputs, **labels).loss for m in (model, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for loss in losses:
            loss.backward()
        expected = {n: p.grad for n, p in theirs.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # no part in the loss: theirs is zero or absent too
                assert expected[name] is None or not expected[name].any(), name
                continue
            size = expected[name].abs().max().clamp(min=1.0).item()
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=0, atol=2e-5 * size, msg=name
            )


def test_regression_and_several_labels() -> None:
    inputs = {"input_ids": torch.randint(4, 61, (3, 7))}
    for labels, options in (
        (torch.tensor([0.5, 2.0, 4.0]), {"num_labels": 1}),
        (torch.randn(3, 3), {"num_labels": 3, "problem_type": "regression"}),
        (torch.ones(3, 3), {"num_labels": 3, "problem_type": "multi_label_classification"}),
    ):
        sizes = {**SMALL, **V3, **options}
        theirs = hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**sizes)).eval()
        model = ours.DebertaV2ForSequenceClassification(ours.DebertaV2Config(**sizes)).eval()
        model.load_state_dict(theirs.state_dict())
        expected = theirs(**inputs, labels=labels).loss
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


# ---------------------------------------------------------------------- relative positions


@pytest.mark.parametrize("buckets", [-1, 2, 3, 8, 32, 256])
@pytest.mark.parametrize("furthest", [5, 29, 300, 512])
def test_rows_of_relative_positions(buckets: int, furthest: int) -> None:
    """Every i - j reads the row of the table that Transformers' index (L, L) says."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    if buckets > 0 and furthest - 1 <= buckets // 2:
        pytest.skip("no such model")
    for length in (1, 2, 7, 130, furthest, furthest + 9):
        x = torch.empty(1, length, 1)
        relative = build_relative_position(x, x, buckets, furthest)[0]
        span = buckets if buckets > 0 else furthest
        expected = (relative + span).clamp(0, 2 * span - 1)  # (L, L)
        places = RelativePositions(length, buckets, furthest, "cpu")
        assert 0 <= places.first < places.last <= 2 * span
        c2p, p2c = (rows + places.first for rows in places.rows(length))
        i, j = torch.arange(length)[:, None], torch.arange(length)
        assert torch.equal(c2p[length - 1 - i + j], expected)
        assert torch.equal(p2c[length - 1 - j + i], expected)


def test_buckets_of_the_published_models() -> None:
    """256 buckets up to 512: exact to 128, then by the logarithm."""
    x = torch.tensor([0, 1, -127, 128, -129, 200, 511, -511])
    assert log_buckets(x, 256, 512).tolist() == [0, 1, -127, 128, -129, 169, 255, -255]


def test_only_the_rows_in_use_are_projected() -> None:
    places = RelativePositions(20, 256, 512, "cpu")
    assert (places.first, places.last) == (236, 277)
    assert RelativePositions(4000, 256, 512, "cpu").last == 512


# ---------------------------------------------------------------------- packed


LENGTHS = (7, 3, 23, 5, 1, 19)


def model_of(head: str, setting: str = "v2", **options) -> nn.Module:
    torch.manual_seed(0)
    labels = 3 if head == "ForSequenceClassification" else 2
    sizes = {**SMALL, **SETTINGS[setting], "initializer_range": 0.3, "num_labels": labels}
    return getattr(ours, f"DebertaV2{head}")(ours.DebertaV2Config(**{**sizes, **options})).eval()


def both_forms(config: ours.DebertaV2Config) -> tuple[dict, dict, torch.Tensor]:
    """The same six sequences padded and packed, and the mask of real tokens."""
    torch.manual_seed(1)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(max(LENGTHS)) < lengths[:, None]
    ids = torch.randint(4, 61, mask.shape)
    ids[2, 4] = config.pad_token_id
    types = torch.randint(0, max(1, config.type_vocab_size), mask.shape)
    padded = {
        "input_ids": ids.where(mask, config.pad_token_id),
        "attention_mask": mask.long(),
        "token_type_ids": types,
    }
    packed = {
        "input_ids": ids[mask],
        "token_type_ids": types[mask],
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": max(LENGTHS),
    }
    return padded, packed, mask


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got: dict, expected: dict) -> None:
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_states_and_attentions(setting: str) -> None:
    model = model_of("Model", setting)
    padded, packed, mask = both_forms(model.config)
    asked = {"output_hidden_states": True, "output_attentions": True}
    a, b = model(**padded, **asked), model(**packed, **asked)
    for x, y in zip(b.hidden_states, a.hidden_states, strict=True):
        assert x.shape == (sum(LENGTHS), model.config.hidden_size)
        torch.testing.assert_close(x, y[mask], rtol=1e-5, atol=1e-5)
    for x, y in zip(b.attentions, a.attentions, strict=True):  # (B, heads, L, L) in both forms
        rows = mask[:, None, :, None].expand_as(y)
        torch.testing.assert_close(x[rows], y[rows], rtol=1e-5, atol=1e-6)
    embeds = model.get_input_embeddings()(packed.pop("input_ids"))
    again = model(inputs_embeds=embeds, **packed).last_hidden_state
    torch.testing.assert_close(again, b.last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("setting", ["v3", "v2", "own projections"])
def test_packed_heads(setting: str, head: str) -> None:
    model = model_of(head, setting)
    padded, packed, mask = both_forms(model.config)
    extra: tuple[dict, dict] = ({"labels": torch.tensor([0, 2, 1, 1, 0, 2])},) * 2
    if head == "ForMaskedLM":
        labels = torch.randint(0, 61, mask.shape).masked_fill(~mask, -100)
        extra = {"labels": labels}, {"labels": labels[mask]}
    elif head == "ForQuestionAnswering":
        spans = {
            "start_positions": torch.tensor([0, 2, 11, 3, 0, 8]),
            "end_positions": torch.tensor([6, 2, 22, 9, 0, 30]),  # 9 and 30 are no real tokens
        }
        extra = spans, spans
    elif head == "ForMultipleChoice":
        padded = {key: value.view(2, 3, -1) for key, value in padded.items()}
        extra = ({"labels": torch.tensor([2, 0])},) * 2
    a, b = model(**padded, **extra[0]), model(**packed, **extra[1])
    real = mask.view(padded["attention_mask"].shape)
    for x, y in zip(b.to_tuple(), a.to_tuple(), strict=True):
        y = y[real] if y.shape[: real.dim()] == real.shape else y
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(model, b.loss), gradients(model, a.loss))


def test_filler_rows_of_training_change_nothing(monkeypatch) -> None:
    """On a CPU training rounds T up, so that shapes are few; nobody may notice."""
    from transformers_patched import layout

    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = model_of("ForMaskedLM", **plain).train()
    _, packed, _ = both_forms(model.config)
    packed["labels"] = packed["input_ids"]
    assert layout.round_up(sum(LENGTHS), layout.ROW_STEP) > sum(LENGTHS)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "ROW_STEP", layout.NO_STEP)
        expected = gradients(model, model(**packed).loss)
    assert_equal_gradients(gradients(model, model(**packed).loss), expected)


@pytest.mark.parametrize("setting", ["v3", "unbucketed", "c2p alone", "p2c alone"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_products_of_a_cpu_equal_the_plain_formula(setting, packed, monkeypatch) -> None:
    """Both ways through `disentangled_attention` agree, with their gradients."""
    model = model_of("ForSequenceClassification", setting)
    inputs = both_forms(model.config)[packed]
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    products = gradients(model, model(**inputs, labels=labels).loss)
    with monkeypatch.context() as patch:
        patch.setattr(disentangled, "_on_cpu", lambda x: False)
        plain = gradients(model, model(**inputs, labels=labels).loss)
    assert_equal_gradients(products, plain)


def test_bf16_products_are_within_rounding_of_fp32() -> None:
    torch.manual_seed(0)
    lengths = [13, 40, 37, 9]
    layout_of = disentangled.SequenceLayout.packed(
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), 40
    )
    places = RelativePositions(40, 16, 64, "cpu")
    shape = (sum(lengths), 3, 8)
    leaves = [torch.randn(shape) for _ in range(3)]
    leaves += [torch.randn(places.last - places.first, 3, 8) for _ in range(2)]
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.detach().to(dtype, copy=True).requires_grad_() for x in leaves]
        context = disentangled.disentangled_attention(*given, places, layout_of, 0.2)
        context.float().square().sum().backward()
        grads.append([context.detach().float(), *(x.grad.float() for x in given)])
    for exact, rounded in zip(*grads, strict=True):
        assert (rounded - exact).norm() <= 0.02 * exact.norm()


def test_attention_dropout_in_training() -> None:
    """Its mean over draws is the evaluation's context, and it follows the seed."""
    torch.manual_seed(0)
    layout_of = disentangled.SequenceLayout.packed(torch.tensor([0, 5, 12], dtype=torch.int32), 7)
    places = RelativePositions(7, 4, 16, "cpu")
    q, k, v = torch.randn(3, 12, 2, 6)
    table = torch.randn(places.last - places.first, 2, 6)

    def run(p: float) -> torch.Tensor:
        return disentangled.disentangled_attention(q, k, v, table, table, places, layout_of, 0.3, p)

    draws = torch.stack([run(0.25) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - run(0.0)).abs().max() < 0.08
    torch.manual_seed(7)
    first = run(0.25)
    torch.manual_seed(7)
    assert torch.equal(run(0.25), first)


# ---------------------------------------------------------------------- behaviour


IDS = torch.tensor([[5, 9, 11, 4, 30], [7, 8, 3, 2, 6]])


def test_apply_lora_builds_loralib_layers() -> None:
    import loralib as lora

    def adapted(**options) -> list[str]:
        model = model_of("ForSequenceClassification", apply_lora=True, lora_r=2, **options)
        return [n for n, module in model.named_modules() if isinstance(module, lora.Linear)]

    layers = [f"deberta.encoder.layer.{i}" for i in range(2)]
    own = [f"attention.self.{name}" for name in ("query_proj", "key_proj", "value_proj")]
    dense = ["attention.output.dense", "intermediate.dense", "output.dense"]
    assert adapted() == [f"{layer}.{path}" for layer in layers for path in (own[0], own[2])]
    everywhere = ("query_proj", "key_proj", "value_proj", "dense")
    assert adapted(lora_modules=everywhere) == [f"{a}.{b}" for a in layers for b in own + dense]
    assert adapted(lora_modules=("output",)) == [f"{layer}.output.dense" for layer in layers]


def test_parameter_groups_and_tied_weights() -> None:
    model = model_of("ForSequenceClassification")
    groups = {group["name"]: set(group["params"]) for group in model.parameter_groups(1e-3, 0.1)}
    encoder = model.deberta.encoder
    assert {encoder.LayerNorm.weight, encoder.conv.conv.bias} <= groups["no_decay"]
    assert {encoder.rel_embeddings.weight, encoder.conv.conv.weight} <= groups["decay"]
    for legacy in (True, False):
        model = model_of("ForMaskedLM", legacy=legacy)
        assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
        if legacy:
            assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    untied = model_of("ForMaskedLM", "v3", tie_word_embeddings=False)
    assert untied.cls.predictions.decoder.weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing_changes_nothing(packed: bool) -> None:
    model = model_of("ForSequenceClassification").train()
    inputs = both_forms(model.config)[packed]
    runs = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(3)
        loss = model(**inputs, labels=torch.tensor([0, 2, 1, 1, 0, 2])).loss
        runs.append(gradients(model, loss))
    assert model.is_gradient_checkpointing
    for name in runs[0]:
        torch.testing.assert_close(runs[1][name], runs[0][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("layers", [1, 3])
def test_classifiers_leave_out_only_what_nobody_reads(layers: int) -> None:
    """With hidden states asked for, every layer is whole; the logits are the same without."""
    model = model_of("ForSequenceClassification", num_hidden_layers=layers)
    for inputs in both_forms(model.config)[:2]:
        whole = model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(model(**inputs).logits, whole.logits, rtol=1e-5, atol=1e-6)


def test_a_batch_with_a_row_of_padding_alone() -> None:
    """As data loaders make them to fill up the last batch: finite, and no effect on the others."""
    model = model_of("ForSequenceClassification")
    padded, _, _ = both_forms(model.config)
    expected = model(**padded).logits
    more = {key: torch.cat([value, 0 * value[:1]]) for key, value in padded.items()}
    got = model(**more).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[:-1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type has 'p2p'; it may have 'c2p' and 'p2c'"),
        ({"hidden_size": 37}, "hidden_size 37 is no multiple of the 3 attention heads"),
        ({"position_buckets": 1}, "position_buckets 1 must be at least 2"),
        ({"position_buckets": 60}, "half of it below max_relative_positions - 1, here 28"),
        ({"conv_kernel_size": 4}, "conv_kernel_size 4 must be odd"),
        ({"pooler_hidden_size": 20}, "pooler_hidden_size is 20; with hidden_size 36 it must be 36"),
        ({"attention_head_size": 64}, "attention_head_size is 64; .* must be 12"),
        ({"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is unknown"),
        ({"apply_lora": True, "lora_modules": ("query",)}, "deberta-v2 has 'query_proj'"),
    ],
)
def test_impossible_configurations(options: dict, message: str) -> None:
    with pytest.raises(ours.ConfigError, match=message):
        model_of("ForSequenceClassification", **options)


def test_other_errors() -> None:
    with pytest.raises(ours.ConfigError, match="needs the masked LM head of legacy=True"):
        model_of("ForMaskedLM", embedding_size=20)
    model = model_of("Model", position_biased_input=True)
    with pytest.raises(ValueError, match="30 tokens is longer than this model's 29 positions"):
        model(torch.full((1, 30), 5))
    assert model_of("Model")(torch.full((1, 40), 5)).last_hidden_state.shape == (1, 40, 36)


def test_keys_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    """deberta-v3-base's own file: an MLM head, and no pooler."""
    model_of("ForMaskedLM").save_pretrained(tmp_path)
    with pytest.warns(UserWarning) as record:
        ours.DebertaV2ForSequenceClassification.from_pretrained(tmp_path)
    message = str(record[0].message)
    assert "newly initialised, train before use: pooler.dense.weight, pooler.dense.bias" in message
    assert "not in the model: lm_predictions.lm_head.LayerNorm.bias" in message


def test_config_json_says_the_same(tmp_path: Path) -> None:
    theirs = hf.DebertaV2Config(**V3, num_labels=4)
    theirs.save_pretrained(tmp_path)
    config = ours.AutoConfig.from_pretrained(tmp_path, pos_att_type="c2p|p2c")
    assert isinstance(config, ours.DebertaV2Config)
    assert (config.num_labels, config.position_buckets) == (4, 6)
    assert config.position_terms == ("c2p", "p2c") and config.max_distance == 512
    config.save_pretrained(tmp_path)
    back = hf.AutoConfig.from_pretrained(tmp_path)
    assert (back.num_labels, back.position_buckets, back.norm_rel_ebd) == (4, 6, "layer_norm")
    assert back.pos_att_type == ["c2p", "p2c"]


def test_counts_of_deberta_v3_base() -> None:
    """184,423,682 weights; LoRA of rank 2 on the 73 layers of those suffixes trains 336,386."""
    from peft_custom import LoraConfig, get_peft_model

    config = ours.DebertaV2Config(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
    )
    everywhere = ["query_proj", "key_proj", "value_proj", "dense"]
    for rank, trainable in ((2, 336_386), (4, 671_234), (8, 1_340_930)):
        with torch.device("meta"):
            model = ours.DebertaV2ForSequenceClassification(config)
            assert model.num_parameters() == 184_423_682
            options = LoraConfig(task_type="SEQ_CLS", r=rank, target_modules=everywhere)
            adapted = get_peft_model(model, options)
        counted = [p.numel() for p in adapted.parameters() if p.requires_grad]
        assert sum(counted) == trainable
    assert sum(name.endswith("base_layer") for name, _ in adapted.named_modules()) == 73


def test_ranks_are_stacked_only_where_they_can_be() -> None:
    """Relative positions belong to no part of a batch, and their projections differ by rank."""
    import loralib as lora

    nested = {"apply_lora": True, "lora_type": "dylora", "lora_r": 4}
    for modules, possible in (
        (("value_proj", "dense"), True),
        (("query_proj", "value_proj"), False),
        (("key_proj",), False),
    ):
        model = model_of("ForSequenceClassification", lora_modules=modules, **nested)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        assert lora.can_batch_ranks(model) == possible
        if not possible:
            with pytest.raises(ValueError, match=r"\(relative positions\): .* at_rank"):
                lora.batched_ranks(model, [1, 4]).__enter__()
            continue
        with lora.batched_ranks(model, [1, 4]):
            stacked = model(IDS.repeat(2, 1)).logits.chunk(2)
        for rank, logits in zip((1, 4), stacked, strict=True):
            with lora.at_rank(model, rank):
                torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    not_shared = {"share_att_key": False, "lora_modules": ("query_proj", "key_proj")}
    assert lora.can_batch_ranks(model_of("ForSequenceClassification", **not_shared, **nested))


def test_adapters_on_shared_projections_train(tmp_path: Path) -> None:
    """The adapted key_proj also projects relative positions; a reloaded adapter says the same."""
    from peft_custom import LoraConfig, PeftModel, get_peft_model

    options = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query_proj", "key_proj"])
    model = get_peft_model(model_of("ForSequenceClassification"), options)
    padded, packed, _ = both_forms(model.base_model.model.config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**packed, labels=torch.tensor([0, 2, 1, 1, 0, 2])).loss.backward()
        optimizer.step()
    expected = model.eval()(**packed).logits
    torch.testing.assert_close(model(**padded).logits, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(model_of("ForSequenceClassification"), tmp_path).eval()
    torch.testing.assert_close(again(**packed).logits, expected)
    merged = again.merge_and_unload()(**packed).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
