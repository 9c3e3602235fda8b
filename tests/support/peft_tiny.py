"""A tiny Hugging Face BERT and adapters on it, for the tests of `peft_custom`."""

import pytest
import torch
from torch import Tensor, nn

from peft_custom import LoraConfig, PeftModel, get_peft_model, iter_adapters

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


ROWS = 4  # of a batch
IDS = torch.arange(28).view(4, 7) % 40
QV = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}


def adapted(**options) -> PeftModel:
    return get_peft_model(bert(), LoraConfig(**{"task_type": "SEQ_CLS", **QV, **options}))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in iter_adapters(model.get_base_model())]


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


def rows() -> list[dict[str, Tensor]]:
    """24 examples of 8 tokens and three classes: six batches of ROWS."""
    made = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(0, 50, (8,), generator=made),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": torch.randint(0, 3, (), generator=made),
        }
        for _ in range(6 * ROWS)
    ]
