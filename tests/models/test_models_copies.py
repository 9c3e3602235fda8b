"""One file per model, edited by hand: what is meant to be equal in all of them stays equal."""

import ast
import re
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / "transformers_patched" / "models"
FILES = {  # model: its file, and the name of the bare model in its heads
    "Bert": ("bert/modeling_bert.py", "bert"),
    "Roberta": ("roberta/modeling_roberta.py", "roberta"),
    "DebertaV2": ("deberta_v2/modeling_deberta_v2.py", "deberta"),
}
# What each model copies from BERT, without the model's name. Different on purpose, so not listed:
# embeddings (positions), DeBERTa's attention, layer, encoder and `linear` (relative positions,
# names of layers), heads that pool (RoBERTa's has layers of its own, DeBERTa's holds the pooler),
# and the masked LM heads (each has the names of its checkpoints).
COPIES = {
    "Roberta": [
        "linear", "SelfAttention", "SelfOutput", "Attention", "Intermediate", "Output", "Layer",
        "Encoder", "Pooler", "PreTrainedModel", "Model", "ForQuestionAnswering",
        "ForMultipleChoice", "ForSequenceClassification.forward:signature",
        "ForMaskedLM.forward:signature",
    ],
    "DebertaV2": [
        "SelfOutput", "Intermediate", "Output", "PreTrainedModel", "Model.get_input_embeddings",
        "Model.set_input_embeddings", "Model.forward:signature", "ForQuestionAnswering.forward",
        "ForSequenceClassification.forward:signature", "ForMultipleChoice.forward:signature",
        "ForMaskedLM.forward:signature",
    ],
}  # fmt: skip


def parts(model: str) -> dict[str, str]:
    """The source of every class, method and function, with general names for the model's own."""
    file, attribute = FILES[model]
    source = (MODELS / file).read_text(encoding="utf-8")
    source = re.sub(rf"\b{model}(?=[A-Z])", "", source)
    source = re.sub(rf"\bself\.{attribute}\b", "self.base", source)
    source = source.replace(f'base_model_prefix = "{attribute}"', 'base_model_prefix = "base"')
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = ast.unparse(node)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                name = f"{node.name}.{method.name}"
                found[name] = ast.unparse(method)
                found[f"{name}:signature"] = ast.unparse(method.args)
    return found


@pytest.mark.parametrize(
    "model, part", [(m, part) for m, copied in COPIES.items() for part in copied]
)
def test_copies_are_equal(model: str, part: str) -> None:
    assert parts(model)[part] == parts("Bert")[part]
