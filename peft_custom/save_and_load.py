"""Adapter files: PEFT's key names, strict loading, atomic writing.

    load_adapter(model, read_adapter("runs/mrpc"))     # whoever wrote it, into either wiring

A file key is `base_model.model.<module>.<tensor>` without the adapter's name. A file holds the
adapter's tensors (`….lora_A.weight`), the modules saved in full (`….classifier.weight`) and, where
`bias` is not "none", the trained biases of the base (`….base_layer.bias`).
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralib import LoRALayer

from . import embeddings
from .config import BIN_NAME, SAFETENSORS_NAME, PeftConfig
from .files import find_file, read_json, written_aside
from .hooks import warn_if_unfinished
from .tuners.base import BaseTuner, iter_adapters, iter_tuners
from .tuners.modules_to_save import ModulesToSaveWrapper

PREFIX = "base_model.model."
# What the readers of tensors raise at a file that is cut short or something else.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError)
# An adapter in loralib's layers: its tensors, under the model's own names, and r, lora_alpha, …
LORALIB_WEIGHTS, LORALIB_CONFIG = "lora.safetensors", "lora.json"


class LoadReport(NamedTuple):
    """What a load left out.

    Attributes:
        missing_keys: of the model, not in the file.
        unexpected_keys: of the file, not in the adapter.
        left_out: of the file, with both shapes: a task head made for other labels.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    left_out: list[str] = []  # noqa: RUF012  of a NamedTuple, and never changed


class AdapterFile(NamedTuple):
    """An adapter as it lies on a disk.

    Attributes:
        path: its folder or file.
        tensors: under the file's names.
        config: what `adapter_config.json` or `lora.json` says; empty for a bare file.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]


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
        save_embedding_layers: True adds the input and output embeddings; "auto" as
            `embeddings.to_save` says.
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
    config = tuner.peft_config[adapter]
    tables = embeddings.to_save(tuner.model, config, save_embedding_layers)
    tensors |= {name: tensor for name, tensor in tables.items() if name not in tensors}
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
    given = _without_copies(tuner.model, dict(tuner.import_state(adapter_name, given)))
    shared = _shared_tensors(tuner, adapter_name)
    biases = tuner.bias_parameters(adapter_name)
    expected = {**tuner.live_tensors(adapter_name), **shared}
    tables = embeddings.in_file(tuner.model, given)
    expected = {**tables, **expected}
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
        f"{PREFIX}{line}" + (embeddings.RESIZE if key in tables else "")
        for key, line in _other_shapes(given, expected).items()
    ]
    problems = [("wrong shape", shapes)]
    if strict:
        problems += [("missing", missing), ("unknown", unknown)]
    _raise_for(source, problems)
    _copy(given, expected)
    layers = [layer for _, layer in iter_adapters(tuner.model) if layer.merged]
    if any(tables or adapter_name in layer.merged_adapters for layer in layers):
        warnings.warn("what was loaded was merged; everything is unmerged", stacklevel=2)
        tuner.unmerge_adapter()  # a merged weight would hold the former values
    return LoadReport(missing, unknown)


def _other_shapes(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors of another shape than the model's -> a line that gives both."""
    return {
        key: f"{key}: file {tuple(value.shape)}, model {tuple(expected[key].shape)}"
        for key, value in given.items()
        if key in expected and value.shape != expected[key].shape
    }


@torch.no_grad()
def _copy(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for key, value in given.items():
        if key in expected:
            expected[key].copy_(value)


# --- an adapter of any origin ----------------------------------------------------------------


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Where an adapter is: the path itself, or its folder `adapter` in a run's folder."""
    path = Path(path).expanduser()
    return path / "adapter" if (path / "adapter").is_dir() else path


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter, whoever wrote it.

    Args:
        path: a run's folder or its `adapter` folder; PEFT's folder (`.safetensors` or `.bin`); a
            folder with `lora.safetensors` and `lora.json`; or a file of tensors, such as
            Microsoft's `.bin`.

    Raises:
        ValueError: nothing of this is there, or a file cannot be read.
    """
    path = adapter_folder(path)
    if path.is_file():
        return AdapterFile(path, _read_tensors(path), {})
    if (path / LORALIB_WEIGHTS).is_file():
        config = read_json(path / LORALIB_CONFIG)
        return AdapterFile(path, _read_tensors(path / LORALIB_WEIGHTS), config)
    for name in (SAFETENSORS_NAME, BIN_NAME):
        if (path / name).is_file():
            config = PeftConfig.from_pretrained(path).to_dict()
            return AdapterFile(path, _read_tensors(path / name), config)
    raise ValueError(
        f"{path}: no adapter; give a run's folder, a folder with {SAFETENSORS_NAME} or "
        f"{LORALIB_WEIGHTS}, or a file of tensors"
    )


def _read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors by name; a `.bin` is read without running what it may contain."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=device)
        state = torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: damaged, or no file of tensors alone ({reason}); copy it again, or save its "
            "state dict as safetensors where it is trusted"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("model_state_dict"), Mapping):
        state = state["model_state_dict"]  # as Microsoft's GPT-2 saves
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: a state dict is needed, tensors by name and nothing else")
    return dict(state)


def _factors(model: nn.Module, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
    """(name of a layer, name in it, live tensor) of an adapter, whichever wiring it has.

    Injected layers come from the tuner, else loralib's own layers are taken.
    """
    if any(iter_tuners(model)):
        for name, layer in iter_adapters(tuner_of(model).model):
            yield from (
                (name, key, tensor) for key, tensor in layer.adapter_tensors(adapter).items()
            )
        return
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALayer) and layer.adapted:
            yield from ((name, key, getattr(layer, key)) for key in ("lora_A", "lora_B"))


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapter's live tensors by name: of injected layers, or of loralib's own."""
    return {f"{layer}.{key}": tensor for layer, key, tensor in _factors(model, adapter_name)}


def load_adapter(
    model: nn.Module,
    file: AdapterFile,
    adapter_name: str = "default",
    optional: Collection[str] = (),
) -> LoadReport:
    """Copies a saved adapter into one that the model has, injected or in loralib's layers.

    A task head of another shape is left out as a whole, and so is what the model does not train;
    the report names both.

    Args:
        model: with an adapter.
        file: from `read_adapter`.
        adapter_name: which adapter.
        optional: tensors of an adapted layer that the file may lack, such as `block_scores`.

    Raises:
        ValueError: the adapter is not this model's; everything that differs is named.
    """
    factors = adapter_tensors(model, adapter_name)
    body, shared = _body_and_shared(model, adapter_name, factors)
    known = {
        spelling: f"{layer}.{key}"
        for layer, key, _ in _factors(model, adapter_name)
        for spelling in _spellings(layer, key)
    }
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in file.tensors.items()}
    if rename := getattr(body, "checkpoint_name", None):  # a model's names in others' files
        plain = {rename(name) or "": tensor for name, tensor in plain.items()}
        plain.pop("", None)
    given = {known.get(name, name): t for name, t in _without_copies(body, plain).items()}
    # a part (`classifier`) with one tensor of another shape is left out with all its tensors
    heads = {name: tensor for name, tensor in given.items() if name in shared}
    wrong = _other_shapes(heads, shared)
    parts = {name.partition(".")[0] for name in wrong}
    heads = {n: t for n, t in heads.items() if n.partition(".")[0] not in parts}
    missing = [name for name in factors if name not in given]
    absent = {name for name in missing if name.rpartition(".")[2] in optional}
    tables = embeddings.in_file(body, {n: t for n, t in given.items() if n not in shared})
    # what is frozen here, or of a part that the model has not (`qa_outputs`), is left out as well
    rest = [n for n in given if n not in factors and n not in shared and n not in tables]
    frozen = set(body.state_dict())
    own_parts = {name for name, _ in body.named_children()}
    unknown = [n for n in rest if n not in frozen and n.partition(".")[0] in own_parts]
    problems = [
        ("wrong shape", list(_other_shapes(given, {**factors, **tables}).values())),
        ("missing", [name for name in missing if name not in absent]),
        ("unknown", unknown),
    ]
    _raise_for(str(file.path), problems)
    _copy({name: given[name] for name in factors if name in given}, factors)
    _copy(heads, shared)
    _copy({name: given[name] for name in tables}, tables)
    return LoadReport(missing, rest, list(wrong.values()))


def _body_and_shared(
    model: nn.Module, adapter: str, factors: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model without a tuner around it, and what trains in full beside the factors."""
    if any(iter_tuners(model)):
        tuner = tuner_of(model)
        return tuner.model, _shared_tensors(tuner, adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, {name: p for name, p in trained.items() if name not in factors}


def _spellings(layer: str, key: str) -> set[str]:
    """How files name a factor: `….lora_A.weight` as PEFT does, `….lora_A` as Microsoft does.

    One in a container of its own (`bim.lora_A`) is found under the plain name as well, so that a
    LoRA adapter can be taken over.
    """
    plain = key.removesuffix(".weight")
    names = {plain, plain.rpartition(".")[2]}
    return {f"{layer}.{name}{end}" for name in names for end in ("", ".weight")}


def _without_copies(body: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops what PEFT writes twice: a saved module's tensors again, under its wrapper's own names.

    (`bias="all"` makes it write `classifier.modules_to_save.bias` beside `classifier.bias`.)
    """
    inside = tuple(
        f"{name}.{part}."
        for name, module in body.named_modules()
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
    path = weights_file(folder_or_hub_id, subfolder, **hub)
    return _read_tensors(path, "cpu" if device is None else str(device))


def weights_file(
    folder_or_hub_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> Path:
    """Path of an adapter's tensors, downloaded where needed."""
    for name in (SAFETENSORS_NAME, BIN_NAME):
        path = find_file(folder_or_hub_id, name, subfolder, **hub)
        if path is not None:
            return Path(path)
    raise FileNotFoundError(
        f"{folder_or_hub_id}: neither {SAFETENSORS_NAME} nor {BIN_NAME} is there"
    )


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
    warn_if_unfinished(tuner, config, adapter)
    state = _complete(model, tuner, adapter, tensors, state_dict, save_embedding_layers)
    write_adapter(folder, config, state, safe_serialization)


def write_adapter(
    folder: Path,
    config: PeftConfig,
    state: Mapping[str, Tensor],
    safe_serialization: bool = True,
) -> None:
    """Writes an adapter's files, tensors under the names that files have."""
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


def _write_card(folder: Path, config: PeftConfig) -> None:
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
