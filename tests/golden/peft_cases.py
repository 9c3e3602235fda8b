"""Cases of the file exchange with PEFT: tiny models, variants, one way to save and load each.

Imports neither this project nor any fixed version of PEFT: the library is handed in, so the same
code runs under PEFT 0.11.1 with an old Transformers, under the newest pair, and under ours.
Weights come from NumPy by parameter name, so that every process has the same base model.
"""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

SEQ_CLS = {"task_type": "SEQ_CLS", "r": 8, "target_modules": ["query", "value"]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "q/v, r 8": ("bert", SEQ_CLS),
    "patterns": ("bert", {**SEQ_CLS, "rank_pattern": {"0.attention.self.query": 3, "value": 5},
                          "alpha_pattern": {"0.attention.self.query": 9, "value": 2}}),
    "rslora": ("bert", {**SEQ_CLS, "use_rslora": True, "lora_alpha": 4}),
    "modules_to_save": ("bert", {"r": 4, "target_modules": ["key"],
                                 "modules_to_save": ["classifier", "pooler.dense"]}),
    "embedding": ("bert", {**SEQ_CLS, "r": 4, "target_modules": ["word_embeddings", "query"]}),
    "Conv2d": ("conv", {"r": 3, "target_modules": ["first", "second", "head"]}),
    "Conv1D": ("gpt2", {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn", "c_proj"],
                        "fan_in_fan_out": True}),
    "all-linear": ("bert", {"task_type": "SEQ_CLS", "r": 4, "target_modules": "all-linear"}),
    "bias all": ("bert", {**SEQ_CLS, "bias": "all"}),
    "bias lora_only": ("bert", {**SEQ_CLS, "bias": "lora_only"}),
    "layers": ("bert", {**SEQ_CLS, "layers_to_transform": [1], "layers_pattern": "layer"}),
    "pissa": ("bert", {**SEQ_CLS, "init_lora_weights": "pissa"}),
}  # fmt: skip


def folder_name(variant: str) -> str:
    """The variant's name as a folder."""
    return variant.replace("/", "").replace(", ", "_").replace(" ", "_")


class ConvNet(nn.Module):
    """Two convolutions of different geometry and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 5, (2, 3))
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def noise(name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    """Normal noise that depends on the name alone."""
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32) * scale)


def build(kind: str) -> nn.Module:
    """The base model, with weights by name."""
    import transformers

    if kind == "conv":
        model: nn.Module = ConvNet()
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(noise(name, tuple(parameter.shape), 0.3))
    return model.eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """A batch of 4."""
    if kind == "conv":
        return {"x": noise("input", (4, 3, 9, 8), 1.0)}
    return {"input_ids": torch.arange(28).view(4, 7) % 40}


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> np.ndarray:
    """What the model computes on the batch."""
    out = model(**inputs(kind))
    return (out if isinstance(out, torch.Tensor) else out.logits).float().numpy()


def save(library: ModuleType, variant: str, folder: Path) -> None:
    """Adapts, moves every trained parameter, and writes the adapter and its logits."""
    kind, options = VARIANTS[variant]
    model = library.get_peft_model(build(kind), library.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += noise(f"moved {name}", tuple(parameter.shape), 0.2)
    model.save_pretrained(str(folder))
    np.save(folder / "logits.npy", logits(model, kind))


def difference(library: ModuleType, variant: str, folder: Path) -> float:
    """Loads the adapter onto a fresh base and compares with the logits stored beside it."""
    kind, _ = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.PeftModel.from_pretrained(build(kind), str(folder)).eval()
    return float(np.abs(logits(model, kind) - np.load(folder / "logits.npy")).max())


def run(library: ModuleType, action: str, root: Path) -> dict[str, Any]:
    """Saves every variant below `root`, or loads each and returns its largest logit difference."""
    results: dict[str, Any] = {}
    for variant in VARIANTS:
        folder = root / folder_name(variant)
        try:
            if action == "save":
                save(library, variant, folder)
            else:
                results[variant] = difference(library, variant, folder)
        except Exception as error:  # a peer's failure is a result, too
            results[variant] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps(results))
    return results
