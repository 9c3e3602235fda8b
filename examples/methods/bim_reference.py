"""The original's configuration of BIM-LoRA, by task, under the names it has there."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.errors import OptionError

MODULES = (
    "query", "key", "value", "dense", "attention.output.dense", "intermediate.dense",
    "output.dense",
)  # fmt: skip


@dataclass
class BIMLoRAConfig:
    """The original's fields that have an effect, under its names, at its global defaults.

    `peft_custom.tuners.bim_lora.get_bim_lora_model` takes it. `learning_rate` is the rate at which
    the original moved weights while it collected features; training is at `lora_lr`.
    """

    model_name_or_path: str = "models/roberta-base"
    task_name: str = "sst2"
    max_seq_length: int = 128
    lora_r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(MODULES))
    block_size: int = 4
    collection_steps: int = 3000
    initial_block_score: float = 0.5
    mask_temperature: float = 1.0
    mlp_hidden_dim: int = 64
    mlp_dropout: float = 0.1
    mlp_lr: float = 1e-3
    mlp_epochs: int = 3
    mlp_batch_size: int = 67349
    feature_weights: list[float] = field(default_factory=lambda: [0.60, 0.20, 0.15, 0.05])
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lora_lr: float = 5e-4
    max_grad_norm: float = 1.0
    num_train_epochs: int = 10
    eval_steps: int = 500
    seed: int = 42

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BIMLoRAConfig:
        """Reads what `save` wrote.

        Raises:
            OptionError: a field is unknown.
        """
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise OptionError(f"{path}: no such field: {', '.join(sorted(unknown))}")
        return cls(**values)


# (epochs, collecting rate, dropout, collecting steps, network epochs, evaluation every); the rest
# of the original's table is at its defaults, but for those in `_OTHERS`.
_TABLE = {
    "sst2": (15, 1e-4, 0.0, 3000, 3, 100), "mrpc": (22, 1e-5, 0.10, 1200, 12, 10),
    "cola": (22, 1e-5, 0.10, 1200, 12, 10), "mnli": (3, 2e-4, 0.0, 3000, 3, 500),
    "qnli": (15, 3e-5, 0.05, 5000, 4, 200), "qqp": (15, 3e-4, 0.05, 5000, 10, 800),
    "rte": (22, 2e-5, 0.10, 1200, 3, 20), "stsb": (18, 2e-5, 0.05, 1500, 5, 20),
    "wnli": (10, 2e-4, 0.0, 3000, 3, 500),
}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "qnli": {"max_seq_length": 256},
    "qqp": {"per_device_eval_batch_size": 128, "mlp_lr": 8e-4, "mlp_dropout": 0.08},
    "rte": {"mlp_lr": 8e-4},
}
# What the original names and has no values for: what it needs beside the global defaults.
_NAMED: dict[str, dict[str, Any]] = {
    "arc_easy": {}, "arc_challenge": {}, "squad": {"max_seq_length": 384},
}  # fmt: skip
# Text generation, which the original has not: hparams/gpt2_medium_bim_lora.yaml in its words.
_GENERATION: dict[str, dict[str, Any]] = {
    "e2e": {}, "webnlg": {}, "dart": {"lora_dropout": 0.0},
    "boolq": {"per_device_train_batch_size": 6}, "xsum": {"max_seq_length": 1024},
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "model_name_or_path": "gpt2-medium", "target_modules": ["c_attn", "c_fc", "c_proj"],
    "max_seq_length": 512, "lora_dropout": 0.05, "block_size": 16, "num_train_epochs": 5,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "max_grad_norm": 0.0,
    "seed": 110,
}  # fmt: skip


def get_default_config(task_name: str = "sst2") -> BIMLoRAConfig:
    """The original's configuration of a GLUE task; GPT-2 medium's of a text generation task.

    ARC and SQuAD, which the original names without values, have its global defaults.

    Raises:
        OptionError: the task is unknown.
    """
    if task_name in _GENERATION:
        return BIMLoRAConfig(task_name=task_name, **{**_GPT2, **_GENERATION[task_name]})
    if task_name in _NAMED:
        return BIMLoRAConfig(task_name=task_name, **_NAMED[task_name])
    if task_name not in _TABLE:
        known = ", ".join([*sorted(_TABLE), *sorted({*_NAMED, *_GENERATION})])
        raise OptionError(f"get_default_config({task_name!r}): one of {known}")
    epochs, rate, dropout, steps, mlp_epochs, every = _TABLE[task_name]
    return BIMLoRAConfig(
        task_name=task_name,
        num_train_epochs=epochs,
        learning_rate=rate,
        lora_dropout=dropout,
        collection_steps=steps,
        mlp_epochs=mlp_epochs,
        eval_steps=every,
        **_OTHERS.get(task_name, {}),
    )
