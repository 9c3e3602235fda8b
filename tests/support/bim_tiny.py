"""Small models and batches that the BIM-LoRA tests share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peft_custom import BimLoraConfig, PeftModel, get_peft_model

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip


def base(kind: str = "Bert", seed: int = 0) -> nn.Module:
    """A random classifier of Hugging Face's."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def tiny(seed: int = 0, **options: Any) -> PeftModel:
    """It, with adapters; block 5 leaves ragged edges everywhere."""
    model = base(seed=seed)
    given = {"r": 2, "lora_alpha": 4, "block_size": 5, "collection_steps": 3, **options}
    return get_peft_model(model, BimLoraConfig(task_type="SEQ_CLS", **given))


def batches(count: int, rows: int = 4, length: int = 8, seed: int = 3) -> list[dict[str, Tensor]]:
    """Batches with padding."""
    made = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        ids = torch.randint(1, 50, (rows, length), generator=made) * mask
        labels = torch.randint(0, 3, (rows,), generator=made)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def adamw(model: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameter_groups(lr, 0.01))


def loss_of(model: nn.Module) -> Any:
    return lambda batch: model(**batch).loss


def logits(model: nn.Module) -> Tensor:
    """Of the first batch."""
    [batch] = batches(1)
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: trainable parameters and the temperatures."""
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return {
        n: t.detach().clone()
        for n, t in model.state_dict().items()
        if n in names or n.endswith("temperature") or n.endswith("block_scores")
    }


def frozen_bytes(model: nn.Module) -> dict[str, bytes]:
    """The base's tensors, byte by byte."""
    return {
        n: t.detach().contiguous().numpy().tobytes()
        for n, t in model.state_dict().items()
        if ".bim." not in n and "modules_to_save" not in n and t.dtype == torch.float32
    }
