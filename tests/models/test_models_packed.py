"""Packed tokens, without padding, give what the padded batch gives: outputs, losses, gradients."""

import pytest
import torch

import transformers_patched as ours

LENGTHS = (7, 3, 12, 5, 1, 9)
SIZES = dict(
    vocab_size=61,
    hidden_size=36,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=20,
    type_vocab_size=2,
    initializer_range=0.3,
)


def model_of(name: str, head: str) -> torch.nn.Module:
    torch.manual_seed(0)
    labels = 3 if head == "ForSequenceClassification" else 2
    config = getattr(ours, f"{name}Config")(num_labels=labels, **SIZES)
    return getattr(ours, name + head)(config).eval()


def batches(pad: int) -> tuple[dict, dict, torch.Tensor]:
    """The same six sequences padded and packed, and the mask of real tokens.

    One token has the padding's id without being padding: RoBERTa's positions must agree on it.
    """
    torch.manual_seed(1)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(4, 61, mask.shape)
    ids[2, 4] = pad
    types = torch.randint(0, 2, mask.shape)
    padded = {
        "input_ids": ids.where(mask, pad),
        "attention_mask": mask.long(),
        "token_type_ids": types,
    }
    packed = {
        "input_ids": ids[mask],
        "token_type_ids": types[mask],
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen": max(LENGTHS),
    }
    return padded, packed, mask


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(model, padded_out, packed_out) -> None:
    torch.testing.assert_close(packed_out.loss, padded_out.loss, rtol=1e-5, atol=1e-5)
    expected, got = gradients(model, padded_out.loss), gradients(model, packed_out.loss)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_base_model(name: str) -> None:
    model = model_of(name, "Model")
    padded, packed, mask = batches(model.config.pad_token_id)
    asked = {"output_hidden_states": True, "output_attentions": True}
    a, b = model(**padded, **asked), model(**packed, **asked)
    torch.testing.assert_close(b.pooler_output, a.pooler_output, rtol=1e-5, atol=1e-5)
    for x, y in zip(b.hidden_states, a.hidden_states, strict=True):
        assert x.shape == (sum(LENGTHS), 36)
        torch.testing.assert_close(x, y[mask], rtol=1e-5, atol=1e-5)
    for x, y in zip(b.attentions, a.attentions, strict=True):  # (B, heads, L, L) in both forms
        rows = mask[:, None, :, None].expand_as(y)
        torch.testing.assert_close(x[rows], y[rows], rtol=1e-5, atol=1e-6)
    ids = packed.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    assert model(inputs_embeds=embeds, **packed).last_hidden_state.shape == (sum(LENGTHS), 36)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_sequence_classification(name: str) -> None:
    model = model_of(name, "ForSequenceClassification")
    padded, packed, _ = batches(model.config.pad_token_id)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    a, b = model(**padded, labels=labels), model(**packed, labels=labels)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-5, atol=1e-5)
    assert_equal_runs(model, a, b)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_masked_lm(name: str) -> None:
    model = model_of(name, "ForMaskedLM")
    padded, packed, mask = batches(model.config.pad_token_id)
    labels = torch.randint(0, 61, mask.shape).masked_fill(torch.rand(mask.shape) < 0.6, -100)
    labels[~mask] = -100
    a, b = model(**padded, labels=labels), model(**packed, labels=labels[mask])
    torch.testing.assert_close(b.logits, a.logits[mask], rtol=1e-5, atol=1e-5)
    assert_equal_runs(model, a, b)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_question_answering(name: str) -> None:
    model = model_of(name, "ForQuestionAnswering")
    padded, packed, mask = batches(model.config.pad_token_id)
    spans = {
        "start_positions": torch.tensor([0, 2, 11, 3, 0, 8]),
        "end_positions": torch.tensor([6, 2, 11, 9, 0, 30]),  # 9 is padding, 30 beyond: ignored
    }
    a, b = model(**padded, **spans), model(**packed, **spans)
    torch.testing.assert_close(b.start_logits, a.start_logits[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.end_logits, a.end_logits[mask], rtol=1e-5, atol=1e-5)
    assert_equal_runs(model, a, b)
    # by hand, sequence by sequence
    parts = a.start_logits[mask].split(LENGTHS), a.end_logits[mask].split(LENGTHS)
    losses = []
    for logits, positions in zip(parts, spans.values(), strict=True):
        rows = zip(logits, positions.tolist(), strict=True)
        terms = [-row.log_softmax(0)[p] for row, p in rows if p < len(row)]
        losses.append(torch.stack(terms).mean())
    torch.testing.assert_close(b.loss, sum(losses) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_multiple_choice(name: str) -> None:
    model = model_of(name, "ForMultipleChoice")
    padded, packed, _ = batches(model.config.pad_token_id)
    padded = {key: value.view(2, 3, -1) for key, value in padded.items()}
    labels = torch.tensor([2, 0])
    a, b = model(**padded, labels=labels), model(**packed, labels=labels)
    assert a.logits.shape == (2, 3)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-5, atol=1e-5)
    assert_equal_runs(model, a, b)
    torch.testing.assert_close(model(**packed, num_choices=3).logits, a.logits.detach())
    with pytest.raises(ValueError, match="num_choices"):
        model(**packed)
    with pytest.raises(ValueError, match="6 sequences are no choices of 4"):
        model(**packed, labels=torch.zeros(4, dtype=torch.long))


def test_training_with_dropout_and_checkpointing() -> None:
    """Recomputing layers in a packed training step draws the same dropout masks."""
    model = model_of("Bert", "ForSequenceClassification").train()
    _, packed, _ = batches(0)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    runs = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(3)
        runs.append(gradients(model, model(**packed, labels=labels).loss))
    assert model.is_gradient_checkpointing
    for name in runs[0]:
        torch.testing.assert_close(runs[1][name], runs[0][name], rtol=0, atol=0, msg=name)


def test_wrong_calls_are_named() -> None:
    model = model_of("Bert", "ForSequenceClassification")
    padded, packed, _ = batches(0)
    with pytest.raises(ValueError, match="need cu_seqlens"):
        model(packed["input_ids"])
    with pytest.raises(ValueError, match="no attention_mask"):
        model(**packed, attention_mask=torch.ones(37))
    with pytest.raises(ValueError, match="max_seqlen is None"):
        model(packed["input_ids"], cu_seqlens=packed["cu_seqlens"])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(attention_mask=padded["attention_mask"])
    for name in ("Bert", "Roberta"):
        room = 20 if name == "Bert" else 18
        model = model_of(name, "Model")
        model(torch.full((1, room), 5))
        with pytest.raises(ValueError, match=f"{room + 1} tokens .* {room} positions"):
            model(torch.full((1, room + 1), 5))


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForMaskedLM", "ForQuestionAnswering"]
)
def test_filler_rows_of_training_change_nothing(name: str, head: str, monkeypatch) -> None:
    """On a CPU training rounds T up, so that shapes are few; nobody may notice."""
    from transformers_patched import layout

    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(ours, f"{name}Config")(**SIZES, **plain)
    torch.manual_seed(0)
    model = getattr(ours, name + head)(config)
    _, packed, _ = batches(config.pad_token_id)
    if head == "ForMaskedLM":
        packed["labels"] = packed["input_ids"]
    elif head == "ForQuestionAnswering":
        ends = torch.tensor(LENGTHS) - 1
        packed |= {"start_positions": ends // 2, "end_positions": ends}
    else:
        packed["labels"] = torch.arange(len(LENGTHS)) % 2

    tokens = len(packed["input_ids"])
    assert layout.round_up(tokens, layout.ROW_STEP) > tokens
    with monkeypatch.context() as patch:
        patch.setattr(layout, "ROW_STEP", layout.NO_STEP)
        expected = model.train()(**packed, output_hidden_states=True)
    expected_gradients = gradients(model, expected.loss)
    seen = []
    model.base_model.encoder.layer[0].register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    found = model(**packed, output_hidden_states=True)
    assert seen[0].shape[0] == layout.round_up(tokens, layout.ROW_STEP)
    for one, other in zip(expected.to_tuple(), found.to_tuple(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients(model, found.loss).items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-6)


def test_rounding_up_costs_a_sixteenth_at_most_and_leaves_few_shapes() -> None:
    from transformers_patched.layout import ROW_STEP, round_up

    rounded = [round_up(n, ROW_STEP) for n in range(512, 8193)]
    assert all(n <= up <= n * (1 + 1 / 16) for n, up in zip(range(512, 8193), rounded, strict=True))
    assert rounded == sorted(rounded) and len(set(rounded)) <= 4 * 16 + 1


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_classifier_computes_its_last_layer_for_first_tokens_only(name, packed) -> None:
    model = model_of(name, "ForSequenceClassification").double()
    ids = torch.randint(2, 31, (7,))
    call = {"input_ids": ids[None]}
    if packed:
        call = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 3, 7]).int(), "max_seqlen": 4}
    call["labels"] = torch.arange(2 if packed else 1)
    rows: list[int] = []
    wide = model.base_model.encoder.layer[-1].intermediate
    wide.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    found = []
    for all_states in (False, True):  # whoever asks for all states gets the last one whole
        model.zero_grad()
        output = model(**call, output_hidden_states=all_states)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([output.logits, *gradients])
    assert rows == [len(call["labels"]), 7]
    torch.testing.assert_close(*found)
