"""Embedding tables in adapter files: PEFT puts them there where the adapter alone would lose rows.

Their keys are those of the model: `….word_embeddings.weight`, of an adapted table
`….word_embeddings.base_layer.weight`; an output embedding's bias goes along.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .files import find_file
from .tuners.modules_to_save import ModulesToSaveWrapper
from .tuners.tuner_layer import BaseTunerLayer

CONFIG = "config.json"
GETTERS = ("get_input_embeddings", "get_output_embeddings")
ADAPTED_SAVED = ("embed_tokens", "lm_head")  # names at which PEFT saves an adapted table as well
RESIZE = "; resize the model first: model.resize_token_embeddings(rows of the file)"


def tables(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the input and output embeddings by name, live and unmerged.

    One that is trained in full (`modules_to_save`) is left out: it travels in any case.
    """
    found: dict[str, Tensor] = {}
    wanted = [getattr(model, getter)() for getter in GETTERS if hasattr(model, getter)]
    for name, module in model.named_modules():
        if not any(module is table for table in wanted) or isinstance(module, ModulesToSaveWrapper):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        prefix, base = (f"{name}.base_layer", module.base_layer) if adapted else (name, module)
        found |= {f"{prefix}.{key}": t for key, t in base.state_dict(keep_vars=True).items()}
        if adapted and module._kept is not None:
            found[f"{prefix}.weight"] = module._kept
    return found


def to_save(model: nn.Module, config: PeftConfig, choice: bool | str = "auto") -> dict[str, Tensor]:
    """What of the embeddings goes into an adapter's file.

    Args:
        model: the injected model.
        config: the adapter's.
        choice: True for all, False for none; "auto" for what is being trained, and with a warning
            for all where the vocabulary is not the base model's any more, else for an adapted table
            that is called `embed_tokens` or `lm_head`.
    """
    found = tables(model) if choice else {}
    if choice is True and not found:
        warnings.warn(f"{type(model).__name__} names no embeddings to save", stacklevel=5)
    if choice != "auto" or not found:
        return found
    size, before = vocabulary(model), base_vocabulary(model, config)
    if before not in (None, size):
        why, chosen = f"the vocabulary is {size}, and {before} in the base model", found
    else:
        adapted = [f"{name}.base_layer." for name in ADAPTED_SAVED]
        why = "an adapted one is saved as PEFT does"
        chosen = {key: t for key, t in found.items() if any(part in key for part in adapted)}
    if chosen:
        warnings.warn(
            f"the embeddings are saved with the adapter ({why}); save_embedding_layers=False "
            "leaves them out",
            stacklevel=5,
        )
    trained = {name: tensor for name, tensor in found.items() if tensor.requires_grad}
    return {**chosen, **trained}


def in_file(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The live tensors that a file's embeddings go into, by the file's own names."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tables(model).items()}
    bare = {name: name.replace(".base_layer.", ".") for name in given}
    return {name: plain[bare[name]] for name in given if bare[name] in plain}


def vocabulary(model: nn.Module) -> int | None:
    """Entries of the model's vocabulary, as its configuration has it."""
    return getattr(getattr(model, "config", None), "vocab_size", None)


def base_vocabulary(model: nn.Module, config: PeftConfig) -> int | None:
    """Entries of the vocabulary in the checkpoint the model came from; None where that is gone."""
    source = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    if not source or vocabulary(model) is None:
        return None
    values = _read_config(str(source), config.revision)
    if values is None:
        warnings.warn(
            f"{source}: no {CONFIG} to be read there, so the vocabulary is taken to be the base "
            "model's; give save_embedding_layers=True where it was resized",
            stacklevel=6,
        )
        return None
    default = getattr(type(model.config), "vocab_size", None)  # a file may leave it out
    return values.get("vocab_size", default)


def _read_config(source: str, revision: str | None) -> dict[str, Any] | None:
    """The base model's configuration; the hub is not asked for what has been downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path: Any = None
        if not Path(source).is_dir():
            path = try_to_load_from_cache(source, CONFIG, revision=revision)
        if not isinstance(path, str):
            path = find_file(source, CONFIG, revision=revision)
        return None if path is None else json.loads(Path(path).read_text("utf-8"))
    except (HFValidationError, OSError, ValueError):
        return None
