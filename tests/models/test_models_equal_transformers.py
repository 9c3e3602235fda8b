"""The models are Hugging Face's in everything that a checkpoint or a reader of outputs can see."""

from pathlib import Path

import pytest
import torch
from support.models import HEADS, assert_both_ways, assert_same, batch, labels_of_heads

import transformers_patched as ours

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

LENGTHS = (17, 9, 4)  # real tokens of three rows
SIZES = [  # odd sizes, every activation, other paddings and position counts, tied and untied
    dict(hidden_size=36, num_attention_heads=3, intermediate_size=37, hidden_act="gelu"),
    dict(hidden_size=35, num_attention_heads=5, intermediate_size=64, hidden_act="gelu_new"),
    dict(hidden_size=384, num_attention_heads=12, intermediate_size=41, hidden_act="relu"),
    dict(hidden_size=24, num_attention_heads=1, intermediate_size=8, tie_word_embeddings=False),
    dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, pad_token_id=3),
]


def peer(name: str, head: str, seed: int, **sizes) -> torch.nn.Module:
    """A Hugging Face model with every weight random, biases and LayerNorms included."""
    torch.manual_seed(seed)
    labels = 3 if head == "ForSequenceClassification" else 2
    config = getattr(hf, f"{name}Config")(
        vocab_size=61,
        num_hidden_layers=2,
        max_position_embeddings=29,
        num_labels=labels,
        layer_norm_eps=1e-6,
        **sizes,
    )
    model = getattr(hf, name + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7 / config.hidden_size**0.5)
    return model


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_both_directions(name: str, head: str, tmp_path: Path) -> None:
    for seed, sizes in enumerate(SIZES):
        theirs = peer(name, head, seed, **sizes)
        assert_both_ways(theirs, LENGTHS, tmp_path)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_hidden_states_attentions_and_embeds(name: str, tmp_path: Path) -> None:
    theirs = peer(name, "ForSequenceClassification", 0, **SIZES[0])
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    model = ours.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inputs = batch("ForSequenceClassification", model.config, LENGTHS)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, expected = model(**inputs, **asked), theirs(**inputs, **asked)
    assert list(got) == list(expected) == ["logits", "hidden_states", "attentions"]
    mask = inputs["attention_mask"].bool()
    for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=1e-5, atol=1e-5)
    for x, y in zip(got.attentions, expected.attentions, strict=True):  # (B, heads, L, L)
        rows = mask[:, None, :, None].expand_as(x)
        torch.testing.assert_close(x[rows], y[rows], rtol=1e-5, atol=1e-6)

    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        got, expected = (m(inputs_embeds=embeds, **inputs) for m in (model, theirs))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_losses_and_gradients(name: str, tmp_path: Path) -> None:
    """Losses of the classification, choice and MLM heads, and the gradient of the first embedding.

    (The span loss is compared on full rows: here padding takes no part in it.)
    """
    cases = labels_of_heads(LENGTHS[0])
    for head, labels in cases.items():
        theirs = peer(name, head, 1, **SIZES[0])
        theirs.save_pretrained(tmp_path)
        model = getattr(ours, name + head).from_pretrained(tmp_path)
        inputs = batch(head, model.config, LENGTHS)
        if head == "ForQuestionAnswering":
            del inputs["attention_mask"]
        losses = [m(**inputs, **labels).loss for m in (model, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for loss in losses:
            loss.backward()
        a, b = (m.base_model.get_input_embeddings().weight.grad for m in (model, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, torch.tensor([0.5, 2.0, 4.0])),  # STS-B
        (3, None, torch.tensor([2, 0, 1])),
        (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])),
        (3, "regression", torch.randn(3, 3)),
        (3, "multi_label_classification", torch.ones(3, 3)),
        (2, "single_label_classification", torch.tensor([1, 0, 1])),
    ],
)
def test_problem_types(num_labels: int, problem_type: str | None, labels: torch.Tensor) -> None:
    sizes = dict(hidden_size=12, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
    options = dict(vocab_size=61, num_labels=num_labels, problem_type=problem_type, **sizes)
    theirs = hf.BertForSequenceClassification(hf.BertConfig(**options)).eval()
    model = ours.BertForSequenceClassification(ours.BertConfig(**options)).eval()
    model.load_state_dict(theirs.state_dict())
    inputs = batch("ForSequenceClassification", model.config, LENGTHS)
    expected = theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected, rtol=1e-5, atol=1e-6)


def test_config_json_says_the_same(tmp_path: Path) -> None:
    theirs = hf.RobertaConfig(num_labels=4, hidden_size=24, num_attention_heads=3, vocab_size=77)
    theirs.save_pretrained(tmp_path)
    config = ours.AutoConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.0)
    assert isinstance(config, ours.RobertaConfig)
    assert (config.num_labels, config.hidden_dropout_prob, config.use_cache) == (4, 0.0, True)
    config.num_labels = 3
    config.save_pretrained(tmp_path)
    back = hf.AutoConfig.from_pretrained(tmp_path)
    assert (back.num_labels, back.hidden_dropout_prob, back.vocab_size) == (3, 0.0, 77)
    assert back.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_real_weights(minilm_dir: Path) -> None:
    """MiniLM on a real sentence pair: every hidden state, the pooler, and a head with `bert.`."""
    theirs = hf.BertModel.from_pretrained(minilm_dir).eval()
    model = ours.BertModel.from_pretrained(minilm_dir)
    tokenizer = ours.AutoTokenizer.from_pretrained(minilm_dir)
    inputs = tokenizer(
        ["Amrozi accused his brother of distorting his evidence.", "They had it on sale."],
        ["Referring to him as only the witness, he said so.", "It was for sale."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        got = model(**inputs, output_hidden_states=True)
        expected = theirs(**inputs, output_hidden_states=True)
    assert_same(got, expected, inputs["attention_mask"])
    with pytest.warns(UserWarning, match="newly initialised.*classifier.weight, classifier.bias"):
        head = ours.BertForSequenceClassification.from_pretrained(minilm_dir)
    with torch.no_grad():
        pooled = head.bert(**inputs).pooler_output
    assert torch.equal(pooled, got.pooler_output)
