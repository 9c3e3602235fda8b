"""What the methods' builders share: injecting adapters, LoRA's two wirings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from examples.methods.options import IncrementOptions
from examples.methods.registry import AdaptedModel
from examples.methods.source import ModelSource
from examples.training.file_names import MASK_SHARES
from loralib import lora_state_dict
from peft_custom import PeftConfig, get_peft_model
from peft_custom.save_and_load import LORALIB_CONFIG, LORALIB_WEIGHTS, PREFIX
from peft_custom.task_models import HEAD_NAMES
from transformers_patched import PreTrainedModel
from transformers_patched.checkpoint import write_safetensors
from transformers_patched.files import write_atomically

__all__ = [
    "AdaptedModel",
    "ModelSource",
    "initialisation",
    "with_loralib",
    "with_peft",
    "write_mask_shares",
]


class AdapterOptions(Protocol):
    """The options that every method with adapters has."""

    lora_alpha: float
    lora_dropout: float
    lora_modules: tuple[str, ...]


def with_peft(
    source: ModelSource, options: AdapterOptions, config: type[PeftConfig], **fields: Any
) -> AdaptedModel:
    """A model with adapters injected.

    Args:
        source: of the model.
        options: of the method.
        config: class of the adapters' configuration.
        fields: of the configuration, beside those that all methods' options name, or instead.
    """
    base = source.load(frozen=True)
    alpha = options.lora_alpha
    modules: list[str] | str | None = list(options.lora_modules) or None  # None: the model's own
    if modules == ["all-linear"]:
        modules = "all-linear"
    shared = {
        "task_type": source.task_type,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # as PEFT writes it
        "lora_dropout": options.lora_dropout,
        "target_modules": modules,
        "modules_to_save": random_parts(base) or None,
    }
    model = get_peft_model(base, config(**{**shared, **fields}))
    return AdaptedModel(model, model.save_pretrained)


def with_loralib(
    source: ModelSource, options: IncrementOptions, lora_type: str = "lora", **more: Any
) -> AdaptedModel:
    """A model whose modelling file builds loralib's layers.

    Args:
        source: of the model.
        options: of the increments.
        lora_type: which layers.
        more: for the saved description, beside what every adapter has.
    """
    model = source.load(
        frozen=True,
        apply_lora=True,
        lora_type=lora_type,
        lora_r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        **({"lora_modules": options.lora_modules} if options.lora_modules else {}),
    )
    values = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "target_modules": list(model.config.lora_modules),
        "base_model_name_or_path": source.name_or_path,
        **more,
    }

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        write_safetensors(folder / LORALIB_WEIGHTS, {**lora_state_dict(model), **trained})
        (folder / LORALIB_CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")

    return AdaptedModel(model, save)


def initialisation(word: str) -> bool | str:
    """`--init_lora_weights` as a configuration has it."""
    return {"true": True, "false": False}.get(word, word)


def random_parts(model: PreTrainedModel) -> list[str]:
    """Modules of the base that the checkpoint lacks: they are random, so they must train."""
    names = [name for name in model.newly_initialised if name.partition(".")[0] not in HEAD_NAMES]
    return sorted({name.rpartition(".")[0] for name in names})


def write_mask_shares(folder: Path | None, masks: Mapping[str, Tensor]) -> None:
    """For the report: how much of every module its final mask keeps.

    Args:
        folder: of the run; None where nothing was trained, and nothing is written.
        masks: module -> mask of any shape, 0 to 1.
    """
    if folder is not None:
        means = {name: round(float(mask.float().mean()), 6) for name, mask in masks.items()}
        shares = {name.removeprefix(PREFIX): mean for name, mean in means.items()}
        text = json.dumps(shares, indent=2) + "\n"
        write_atomically(folder / MASK_SHARES, lambda aside: aside.write_text(text, "utf-8"))
