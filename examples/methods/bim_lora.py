"""Builds BIM-LoRA for training, draws its masks, and has the original's configuration by task."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli.fields import OptionError

if TYPE_CHECKING:
    from examples.methods.common import Adapted, ModelSource
    from examples.methods.registry import BimLoraOptions
    from examples.training.run_folder import RunFolder

MODULES = (
    "query", "key", "value", "dense", "attention.output.dense", "intermediate.dense",
    "output.dense",
)  # fmt: skip


def bim_lora(source: ModelSource, options: BimLoraOptions) -> Adapted:
    """Block-masked increments, started from `options.lora_path` where given."""
    from examples.methods.common import Adapted, continue_from, random_parts, read_adapter
    from peft_custom import BimLoraConfig, get_peft_model

    base = source.load(frozen=True)
    modules, alpha = list(options.lora_modules), options.lora_alpha
    same = (
        "lora_dropout", "block_size", "mask_init", "initial_block_score", "train_mask",
        "mlp_epochs", "mlp_lr", "mlp_dropout", "mask_temperature", "temperature_schedule",
        "temperature_decay_rate", "temperature_decay_steps", "min_temperature", "score_lr_ratio",
        "head_lr_ratio",
    )  # fmt: skip
    threshold = options.hard_mask_threshold
    config = BimLoraConfig(
        task_type=source.task_type,
        r=options.lora_r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        modules_to_save=random_parts(base) or None,
        collection_steps=options.collection_steps or None,
        features_file=options.features_path,
        hard_mask_threshold=threshold if threshold >= 0 else None,
        **{name: getattr(options, name) for name in same},
    )
    model = get_peft_model(base, config)
    if options.lora_path is not None:
        agree = {"r": ("lora_r", options.lora_r), "lora_alpha": ("lora_alpha", alpha)}
        agree["block_size"] = ("block_size", options.block_size)
        path = Path(options.lora_path).expanduser()
        said = continue_from(model, path, agree)
        if any(name.endswith(".block_scores") for name in read_adapter(path)[0]):
            model.base_model.initialised.add("default")
        if said and source.speak:
            print(said)

    def pictures(folder: RunFolder, title: str) -> None:
        _draw(model, folder.path, title)

    return Adapted(model, model.save_pretrained, pictures=pictures)


def _draw(model: Any, folder: Path, title: str) -> None:
    """Masks, their histogram over training, and the features they started from."""
    from examples.plots import block_masks as bim_plots
    from peft_custom.tuners.bim_lora import MaskAllocator

    bim_plots.block_masks(folder / bim_plots.MASKS, MaskAllocator(model).masks(), title)
    tuner = model.base_model
    for history in tuner.mask_history.values():
        bim_plots.mask_history(folder / bim_plots.HISTORY, history, title)
    for features in tuner.features.values():
        bim_plots.feature_maps(folder / bim_plots.FEATURES, features, title)


# -- the original's configuration -----------------------------------------------------------------


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


def get_default_config(task_name: str = "sst2") -> BIMLoRAConfig:
    """The original's configuration of a GLUE task.

    Raises:
        OptionError: the task is unknown.
    """
    if task_name not in _TABLE:
        raise OptionError(f"get_default_config({task_name!r}): one of {', '.join(sorted(_TABLE))}")
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
