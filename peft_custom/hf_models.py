"""`patch_transformers`: `model.add_adapter` of Transformers takes this project's configurations.

    from peft_custom.hf_models import patch_transformers
    patch_transformers()                                 # once in a program
    model.add_adapter(AdaLoraConfig(task_type="SEQ_CLS"))
    Trainer(model, args, train_dataset=data).train()     # drives the schedule, resumes exactly
    model.save_pretrained("adapter")                     # PEFT's files
    model = AutoModelForSequenceClassification.from_pretrained("adapter")

From then on adapters of the types known here are this project's, those of others PEFT's as before;
a model carries one or the other. PEFT itself is not needed, but for `from_pretrained` of an adapter
(Transformers asks for the package there; `load_adapter` does without).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import hf_trainer
from .config import CONFIG_CLASSES, CONFIG_NAME, PeftConfig
from .files import find_file, read_json
from .hf_adapted import adapters_of, keep_adapters
from .hotswap import hotswap_adapter
from .mapping import get_peft_model
from .peft_model import PeftModel
from .save_and_load import PREFIX, get_peft_model_state_dict, save_adapter

Method = Callable[..., Any]

__all__ = ["adapters_of", "patch_transformers"]


class Loaded(NamedTuple):
    """What `from_pretrained(…, output_loading_info=True)` reports: adapters load whole or not."""

    missing_keys: frozenset[str] = frozenset()
    unexpected_keys: frozenset[str] = frozenset()
    mismatched_keys: frozenset[str] = frozenset()
    error_msgs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As Transformers asks for it."""
        return self._asdict()


def patch_transformers() -> None:
    """Teaches Transformers' models and `Trainer` this project's adapters; again changes nothing.

    Raises:
        ImportError: Transformers is not installed, or has not the methods that are replaced.
    """
    try:
        from transformers import PreTrainedModel, Trainer
    except ImportError as error:
        raise ImportError("patch_transformers needs pip install 'transformers>=5'") from error
    replaced = [(PreTrainedModel, name, method) for name, method in MODEL_METHODS.items()]
    replaced += [(Trainer, name, method) for name, method in hf_trainer.TRAINER_METHODS.items()]
    absent = [f"{cls.__name__}.{name}" for cls, name, _ in replaced if not hasattr(cls, name)]
    if absent:
        raise ImportError(
            f"this release of Transformers has no {', '.join(absent)}: use get_peft_model, which "
            "needs none of them"
        )
    for cls, name, method in replaced:
        if not hasattr(getattr(cls, name), "_before"):
            setattr(cls, name, _in_front_of(getattr(cls, name), method))


def _in_front_of(original: Method, method: Method) -> Method:
    """A method that gives `method` the original, to call where the adapter is not ours."""

    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(original, self, *args, **kwargs)

    patched.__dict__["_before"] = original
    return patched


def _where_adapted(method: Method) -> Method:
    """`method(model, adapted, …)` for models with adapters of ours; others are called as before."""

    def chosen(original: Method, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapted = adapters_of(model)
        if adapted is None:
            return original(model, *args, **kwargs)
        return method(model, adapted, *args, **kwargs)

    return chosen


# --- the methods, each with Transformers' own in front -------------------------------------------
def _add_adapter(
    original: Method, model: nn.Module, adapter_config: Any, adapter_name: str | None = None
) -> None:
    name, adapted = adapter_name or "default", adapters_of(model)
    if not isinstance(adapter_config, PeftConfig):
        if adapted is not None:
            raise TypeError(
                f"{type(adapter_config).__module__}.{type(adapter_config).__name__}: the model "
                "carries adapters of peft_custom, and takes more of these alone"
            )
        return original(model, adapter_config, adapter_name)
    if adapted is None and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"this {type(model).__name__} carries adapters of PEFT's; delete them first, or load "
            "the model anew"
        )
    if adapted is None:
        keep_adapters(model, get_peft_model(model, adapter_config, name))
    else:
        adapted.add_adapter(name, adapter_config)
        adapted.set_adapter(name)


def _load_adapter(
    original: Method,
    model: nn.Module,
    peft_model_id: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    *args: Any,
    **options: Any,
) -> Any:
    name, adapted = adapter_name or "default", adapters_of(model)
    hub, trainable = _hub_options(options), bool(options.get("is_trainable"))
    foreign = adapted is None and getattr(model, "_hf_peft_config_loaded", False)
    in_words = args or options.get("peft_config") or options.get("adapter_state_dict")
    if peft_model_id is None or foreign or in_words or not _is_known(peft_model_id, hub):
        if adapted is not None:
            raise ValueError(
                f"{peft_model_id}: the model carries adapters of peft_custom; load_adapter takes "
                "the folder or hub id of another one"
            )
        return original(model, peft_model_id, adapter_name, *args, **options)
    if options.get("hotswap") is True:
        hotswap_adapter(model, peft_model_id, name, **hub)
    elif adapted is None:
        keep_adapters(
            model, PeftModel.from_pretrained(model, peft_model_id, name, trainable, **hub)
        )
    elif name in adapted.peft_config:
        raise ValueError(
            f"there is an adapter {name!r} already: give adapter_name, or hotswap=True to put the "
            "new weights in its place"
        )
    else:
        adapted.load_adapter(peft_model_id, name, trainable, **hub)
    return Loaded()


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of Transformers' many ways to say where in the hub: `adapter_kwargs`, the download's, words.

    Args:
        options: what `load_adapter` was given beside its first arguments.
    """
    download = getattr(options.get("load_config"), "download_kwargs", None) or {}
    words = {**download, **options, **(options.get("adapter_kwargs") or {})}
    known = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
    return {key: words[key] for key in known if words.get(key)}


def _is_known(folder_or_hub_id: str | os.PathLike[str], hub: Mapping[str, Any]) -> bool:
    """Whether an adapter's configuration names a type of this project's."""
    path = find_file(folder_or_hub_id, CONFIG_NAME, **hub)
    if path is None:
        raise FileNotFoundError(f"{folder_or_hub_id}: no {CONFIG_NAME}, so not an adapter folder")
    return read_json(Path(path)).get("peft_type") in CONFIG_CLASSES


@_where_adapted
def _set_adapter(model: nn.Module, adapted: PeftModel, adapter_name: str | list[str]) -> None:
    adapted.set_adapter(adapter_name)


@_where_adapted
def _enable_adapters(model: nn.Module, adapted: PeftModel) -> None:
    adapted.base_model.enable_adapters(True)


@_where_adapted
def _disable_adapters(model: nn.Module, adapted: PeftModel) -> None:
    adapted.base_model.enable_adapters(False)


@_where_adapted
def _active_adapters(model: nn.Module, adapted: PeftModel) -> list[str]:
    return adapted.active_adapters


@_where_adapted
def _delete_adapter(model: nn.Module, adapted: PeftModel, adapter_names: str | list[str]) -> None:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in names:
        adapted.base_model.adapter_config(name)  # all of them are there, or none is deleted
    for name in names:
        adapted.delete_adapter(name)
    if not adapted.peft_config:
        keep_adapters(model, None)


@_where_adapted
def _get_adapter_state_dict(
    model: nn.Module,
    adapted: PeftModel,
    adapter_name: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    name = adapter_name or adapted.active_adapters[0]
    state = get_peft_model_state_dict(model, state_dict, name)
    return {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}


@_where_adapted
def _save_pretrained(
    model: nn.Module,
    adapted: PeftModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    *sizes: Any,
    **options: Any,
) -> None:
    if push_to_hub:
        raise ValueError("push_to_hub=True: call model.push_to_hub(NAME), which saves as well")
    if options.get("variant") or not options.get("save_peft_format", True):
        raise ValueError("variant and save_peft_format=False: adapters are saved as PEFT's files")
    names = adapted.active_adapters
    if len(names) != 1:
        raise ValueError(
            f"the active adapters are {', '.join(names) or 'none'}: activate the one to save with "
            "set_adapter, one after another"
        )
    if is_main_process:
        save_adapter(model, Path(save_directory), names[0], state_dict)


MODEL_METHODS: dict[str, Method] = {
    "add_adapter": _add_adapter,
    "load_adapter": _load_adapter,
    "set_adapter": _set_adapter,
    "enable_adapters": _enable_adapters,
    "disable_adapters": _disable_adapters,
    "active_adapters": _active_adapters,
    "delete_adapter": _delete_adapter,
    "get_adapter_state_dict": _get_adapter_state_dict,
    "save_pretrained": _save_pretrained,
}
