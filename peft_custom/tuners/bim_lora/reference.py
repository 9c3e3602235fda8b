"""The original: the functions people know, and what `reference_compat` does to the letter.

The functions convert a model in place, and save and load its adapter in one file. To the letter of
the first publication, temperatures fall by epoch, layers are compared by their gradients as they
are, after a pass over data of its own, and the logits meet the mask at τ = 1 only. (Its features
and network differ as well: see `FeatureCollector` and `ImplicitMLP`.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...files import written_aside
from ...mapping import inject_adapter_in_model
from ...save_and_load import get_peft_model_state_dict, set_peft_model_state_dict, tuner_of
from ...state_files import read_tree, write_tree
from ...task_models import HEAD_NAMES
from ..targets import name_matches
from .config import BimLoraConfig
from .layer import BIMLoRALinear

EPOCHS = ((0, 1.4), (6, 1.0), (12, 0.8), (20, 0.6), (26, 0.45))  # (first epoch, τ)
ANALYSIS_STEPS = 50  # of the second pass over data, for the layers' importance
FIRST_TEMPERATURE = 1.0  # at which the logits give the mask's first probabilities
OTHER_CODE = 0.5  # F6 of a matrix of no known kind
OLD_SUFFIXES = (".pt", ".pth", ".bin")  # of pickles, which are neither written nor read
SHAPING = ("r", "lora_alpha", "block_size", "target_modules", "modules_to_save", "enable_masking")


def get_bim_lora_model(
    model: nn.Module,
    config: object = None,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    target_modules: list[str] | str | None = None,
    block_size: int | None = None,
    mask_temperature: float | None = None,
) -> nn.Module:
    """Puts `BIMLoRALinear` layers into `model`, in place, and returns it.

    Everything but the adapters and the task head is frozen; the head is trained in full and not
    adapted. For a model wrapped as PEFT does it, use `get_peft_model(model, BimLoraConfig(…))`.

    Args:
        model: ours, Hugging Face's, or any module.
        config: a `BimLoraConfig`, or an object with the original's fields, such as
            `examples.config.get_default_config(task)` returns; None takes the defaults.
        r, lora_alpha, lora_dropout, target_modules, block_size, mask_temperature: instead of the
            configuration's.
    """
    given = BimLoraConfig() if config is None else config
    if isinstance(target_modules, tuple):
        target_modules = list(target_modules)
    own = BimLoraConfig.from_reference(
        given, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
        target_modules=target_modules, block_size=block_size, mask_temperature=mask_temperature,
    )  # fmt: skip
    names = [name for name, _ in model.named_modules()]
    if own.modules_to_save is None:
        heads = [h for h in HEAD_NAMES if any(name_matches(name, h) for name in names)]
        own.modules_to_save = heads or None
    if not isinstance(own.target_modules, str) and own.target_modules is not None:
        present = [t for t in own.target_modules if any(name_matches(n, t) for n in names)]
        own.target_modules = present or own.target_modules
    return inject_adapter_in_model(own, model)


def mark_only_bim_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes everything but the active adapters and saved modules, and biases as `bias` says.

    `get_bim_lora_model` has done so already; this undoes later changes.
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias={bias!r}: use 'none', 'all' or 'lora_only'")
    tuner = tuner_of(model)
    model.requires_grad_(False)
    for name in tuner.active_adapters:
        tuner.peft_config[name].bias = bias
    tuner.set_adapter(tuner.active_adapters)


def save_bim_lora_model(
    model: nn.Module,
    mlp: nn.Module | None,
    save_path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes adapter, head, temperatures and the network into one file, the metadata beside it.

    Args:
        model: converted by `get_bim_lora_model`, or a `PeftModel` with a BIM-LoRA adapter.
        mlp: the network, or None.
        save_path: a file; `.pt` becomes `.safetensors`, as no pickle is written.
        metadata: JSON values.

    Returns:
        The file's path; the metadata are in `<its stem>_metadata.json`.
    """
    tuner = tuner_of(model)
    [adapter] = tuner.active_adapters
    path = _file(save_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {
        "adapter": get_peft_model_state_dict(model, adapter_name=adapter),
        "config": tuner.peft_config[adapter].to_dict(),
        "initialised": adapter in tuner.initialised,
        "mlp": None if mlp is None else dict(mlp.state_dict()),
        "metadata": dict(metadata or {}),
    }
    write_tree(path, tree, format="bim_lora 1")
    layers = sum(isinstance(m, BIMLoRALinear) for m in model.modules())
    figures = {
        **tree["metadata"],
        "n_lora_modules": layers,
        "n_parameters": sum(t.numel() for t in tree["adapter"].values()),
    }
    beside = path.with_name(f"{path.stem}_metadata.json")
    with written_aside(beside) as aside:
        aside.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", "utf-8")
    return path


def load_bim_lora_model(
    model: nn.Module,
    mlp: nn.Module | None,
    load_path: str | os.PathLike[str],
    strict: bool = True,
) -> dict[str, Any]:
    """Restores what `save_bim_lora_model` wrote into a converted model; the same logits.

    Args:
        model: converted with the same configuration.
        mlp: gets the network's state where the file has one; or None.
        load_path: the file, by the name given when it was saved.
        strict: missing and unknown tensors raise.

    Returns:
        The metadata.

    Raises:
        ValueError: the file is of another configuration; what differs is named.
    """
    path = _file(load_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file (pickles are not read)")
    tree = read_tree(path)
    tuner = tuner_of(model)
    [adapter] = tuner.active_adapters
    own, saved = tuner.peft_config[adapter].to_dict(), tree["config"]
    differing = [n for n in SHAPING if own[n] != saved[n] and n not in ("target_modules",)]
    if differing:
        told = ", ".join(f"{n}={saved[n]!r} (here {own[n]!r})" for n in differing)
        raise ValueError(f"{path} was saved with {told}: convert the model with the same values")
    set_peft_model_state_dict(model, tree["adapter"], adapter, strict, source=str(path))
    if tree["initialised"]:
        tuner.initialised.add(adapter)
    if mlp is not None and tree["mlp"] is not None:
        mlp.load_state_dict(tree["mlp"])
    return tree["metadata"]


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix(".safetensors") if path.suffix in OLD_SUFFIXES else path


# --- the method to the letter ---------------------------------------------------------------------
def temperature_of_epoch(epoch: int) -> float:
    """τ in epoch 0, 1, …; the original's interface, by which `temperature_table` is tested."""
    return next(tau for start, tau in reversed(EPOCHS) if epoch >= start)


def temperature_table(epochs: float | None, total_steps: int) -> list[tuple[int, float]]:
    """The rows (first step, τ) of a run of so many epochs.

    Raises:
        ValueError: the number of epochs is not known.
    """
    if epochs is None:
        raise ValueError(
            "reference_compat lowers the temperature by epoch: give num_train_epochs, so that "
            f"{total_steps} steps can be cut into epochs"
        )
    length = total_steps / epochs
    return [(math.floor(start * length + 0.5), tau) for start, tau in EPOCHS]


def relative_importance(gradients: Mapping[str, float]) -> dict[str, float]:
    """I of every layer in [0, 1]: mean |∇W| between the smallest and the largest one's."""
    low, high = min(gradients.values()), max(gradients.values())
    return {name: (value - low) / (high - low + 1e-8) for name, value in gradients.items()}
