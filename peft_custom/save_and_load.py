"""Adapter files: PEFT's key names, strict loading, atomic writing.

A file key is `base_model.model.<module>.<tensor>` without the adapter's name. A file holds the
adapter's tensors (`….lora_A.weight`), the modules saved in full (`….classifier.weight`) and, where
`bias` is not "none", the trained biases of the base (`….base_layer.bias`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import BIN_NAME, SAFETENSORS_NAME
from .files import find_file, written_aside
from .hooks import warn_if_unfinished
from .tuners.base import BaseTuner, iter_tuners
from .tuners.modules_to_save import ModulesToSaveWrapper

PREFIX = "base_model.model."


class LoadReport(NamedTuple):
    """What a non-strict load left out."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def tuner_of(model: nn.Module) -> BaseTuner:
    """The one tuner that injected adapters into `model`."""
    tuners = list(iter_tuners(model))
    if len(tuners) != 1:
        raise ValueError(f"{type(model).__name__} has {len(tuners)} tuners; expected exactly one")
    return tuners[0]


def _shared_tensors(tuner: BaseTuner, adapter: str) -> dict[str, Tensor]:
    """Saved modules and trained biases that travel with the adapter, live."""
    tensors: dict[str, Tensor] = dict(tuner.bias_parameters(adapter))
    for name, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            copy = module.modules_to_save[adapter].state_dict(keep_vars=True)
            tensors.update({f"{name}.{key}": value for key, value in copy.items()})
    return tensors


def _embedding_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the input and output embeddings by name, seen without a tuner's wrapper."""
    found = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        weight = getattr(module, "weight", None)
        for name, other in model.named_modules():
            if weight is not None and other is module:
                found[f"{name}.weight"] = weight
    return found


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors under their file keys.

    Args:
        model: a `PeftModel`, or a model after `inject_adapter_in_model`.
        state_dict: values gathered elsewhere (FSDP), under the model's own names.
        adapter_name: which adapter.
        save_embedding_layers: True adds the input and output embeddings; "auto" adds those that
            are being trained.
    """
    tuner = tuner_of(model)
    _, tensors = tuner.export(adapter_name)
    return _complete(model, tuner, adapter_name, tensors, state_dict, save_embedding_layers)


def _complete(
    model: nn.Module,
    tuner: BaseTuner,
    adapter: str,
    tensors: dict[str, Tensor],
    state_dict: Mapping[str, Tensor] | None,
    save_embedding_layers: bool | str,
) -> dict[str, Tensor]:
    tensors = {**tensors, **_shared_tensors(tuner, adapter)}
    for name, weight in _embedding_tensors(tuner.model).items():
        if save_embedding_layers is True or (
            save_embedding_layers == "auto" and weight.requires_grad and name not in tensors
        ):
            tensors[name] = weight
    if state_dict is not None:
        names = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
        tensors = {
            key: state_dict.get(names.get(id(value), ""), value) for key, value in tensors.items()
        }
    return {f"{PREFIX}{key}": value.detach() for key, value in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    strict: bool = True,
    source: str = "adapter weights",
) -> LoadReport:
    """Copies tensors under file keys into the adapter.

    Raises:
        ValueError: keys missing, unknown or of another shape (all named at once). With
            `strict=False` missing and unknown keys are reported instead; shapes still raise.
    """
    tuner = tuner_of(model)
    foreign = [key for key in peft_model_state_dict if not key.startswith(PREFIX)]
    given = {k[len(PREFIX) :]: v for k, v in peft_model_state_dict.items() if k.startswith(PREFIX)}
    given = _without_copies(tuner, dict(tuner.import_state(adapter_name, given)))
    shared = _shared_tensors(tuner, adapter_name)
    biases = tuner.bias_parameters(adapter_name)
    expected = {**tuner.live_tensors(adapter_name), **shared}
    embeddings = _embedding_tensors(tuner.model)
    for key in list(given):
        bare = key.replace(".base_layer.weight", ".weight")
        if key not in expected and bare in embeddings:
            expected[key] = embeddings[bare]
    missing = [key for key in expected if key not in given]
    unknown = [f"{PREFIX}{key}" for key in given if key not in expected] + foreign
    lost_biases = [key for key in missing if key in biases]
    if lost_biases and len(lost_biases) == len(biases):
        warnings.warn(
            f"{source}: the {len(lost_biases)} biases that this adapter trained are not in the "
            "file (PEFT 0.11 does not save them for bias='lora_only'); the base model's are used",
            stacklevel=2,
        )
        missing = [key for key in missing if key not in biases]
    missing = [f"{PREFIX}{key}" for key in missing]
    shapes = [
        f"{PREFIX}{key}: file {tuple(given[key].shape)}, model {tuple(expected[key].shape)}"
        for key in given
        if key in expected and given[key].shape != expected[key].shape
    ]
    problems = [("wrong shape", shapes)]
    if strict:
        problems += [("missing", missing), ("unknown", unknown)]
    _raise_for(source, problems)
    with torch.no_grad():
        for key, value in given.items():
            if key in expected:
                expected[key].copy_(value)
    return LoadReport(missing, unknown)


def _without_copies(tuner: BaseTuner, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops what PEFT writes twice: a saved module's tensors again, under its wrapper's own names.

    (`bias="all"` makes it write `classifier.modules_to_save.bias` beside `classifier.bias`.)
    """
    inside = tuple(
        f"{name}.{part}."
        for name, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for part in ("modules_to_save", "original_module")
    )
    return {key: value for key, value in given.items() if not (inside and key.startswith(inside))}


def _raise_for(source: str, problems: list[tuple[str, list[str]]]) -> None:
    lines = []
    for kind, keys in problems:
        if keys:
            shown = "\n    ".join(keys[:8])
            more = f"\n    … and {len(keys) - 8} more" if len(keys) > 8 else ""
            lines.append(f"  {kind} ({len(keys)}):\n    {shown}{more}")
    if lines:
        raise ValueError(
            f"{source} does not fit the model with this configuration:\n" + "\n".join(lines)
        )


def load_peft_weights(
    folder_or_hub_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Reads `adapter_model.safetensors`, or an old `adapter_model.bin` (tensors only)."""
    device = "cpu" if device is None else str(device)
    path = find_file(folder_or_hub_id, SAFETENSORS_NAME, subfolder, **hub)
    if path is not None:
        return load_file(path, device=device)
    path = find_file(folder_or_hub_id, BIN_NAME, subfolder, **hub)
    if path is None:
        raise FileNotFoundError(
            f"{folder_or_hub_id}: neither {SAFETENSORS_NAME} nor {BIN_NAME} is there"
        )
    return torch.load(path, map_location=device, weights_only=True)


def save_adapter(
    model: nn.Module,
    folder: Path,
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    safe_serialization: bool = True,
    save_embedding_layers: bool | str = "auto",
    **export_options: Any,
) -> None:
    """Writes one adapter's files; each appears whole or not at all, the configuration last."""
    tuner = tuner_of(model)
    config, tensors = tuner.export(adapter, **export_options)
    config.inference_mode = True
    warn_if_unfinished(tuner, config)
    state = _complete(model, tuner, adapter, tensors, state_dict, save_embedding_layers)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous().clone() for key, value in state.items()}
    name, other = (
        (SAFETENSORS_NAME, BIN_NAME) if safe_serialization else (BIN_NAME, SAFETENSORS_NAME)
    )
    with written_aside(folder / name) as aside:
        if safe_serialization:
            aside.touch()
            mode = aside.stat().st_mode  # what the umask asks for; safetensors makes files private
            save_file(state, aside, metadata={"format": "pt"})
            aside.chmod(mode)
        else:
            torch.save(state, aside)
    (folder / other).unlink(missing_ok=True)  # it would hold an older adapter
    config.save_pretrained(folder)
    _write_card(folder, config)


def _write_card(folder: Path, config: Any) -> None:
    card = folder / "README.md"
    if card.exists():
        return
    base = config.base_model_name_or_path
    head = f"base_model: {base}\n" if base and not os.path.isabs(str(base)) else ""
    card.write_text(
        f"---\n{head}library_name: peft\ntags:\n- {str(config.peft_type).lower()}\n---\n\n"
        f"A {config.peft_type} adapter"
        + (f" for `{base}`" if head else "")
        + (f", task type {config.task_type}" if config.task_type else "")
        + ". Load it with `PeftModel.from_pretrained(base_model, folder)`.\n",
        "utf-8",
    )
