"""`PeftModel`: a model with adapters, as PEFT's users know it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base_weights import refuse_other_base
from .config import PeftConfig, TaskType
from .forward_signature import counts_items, like_base
from .hooks import set_finished
from .save_and_load import (
    load_peft_weights,
    save_adapter,
    set_peft_model_state_dict,
    weights_file,
)
from .status import count_parameters
from .tuners.base import BaseTuner, iter_adapters, tuner_class
from .tuners.targets import as_list, name_matches, under

Batch = Mapping[str, Any] | list[Any] | tuple[Any, ...] | Tensor


class PeftModel(nn.Module):
    """`base_model` is the tuner, `base_model.model` the model it put adapters into.

    Whatever is not found here is looked up in the tuner and then in the model, so a wrapped model
    can be used like the model itself.
    """

    head_names: ClassVar[tuple[str, ...]] = ()  # modules that always train and travel along

    def __new__(cls, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> PeftModel:
        """An object of a subclass whose `forward` has the base model's signature."""
        return super().__new__(cls if model is None else like_base(cls, type(model)))

    def __reduce__(self) -> tuple[Any, ...]:
        # the subclass of `__new__` has no name that unpickling could find: it is made again
        cls = type(self)
        public = cls.__base__ if "_like" in cls.__dict__ else cls
        return _remade, (public, type(self.base_model.model)), self.__dict__

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        file: Path | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            raise TypeError("this is a PeftModel already; use add_adapter or load_adapter on it")
        config = self._completed(peft_config, model)
        self.base_model: BaseTuner = tuner_class(config)(model, config, adapter_name, file)
        self.training = model.training
        self._warn_of_random_weights(model, self.peft_config[adapter_name])

    def _warn_of_random_weights(self, model: nn.Module, config: PeftConfig) -> None:
        """Random weights that are frozen and not saved would make a saved adapter worthless."""
        fresh = getattr(model, "newly_initialised", ())
        saved = as_list(getattr(config, "modules_to_save", None))
        modules = sorted({name.rpartition(".")[0] for name in fresh if not under(name, saved)})
        if modules:
            warnings.warn(
                f"{', '.join(modules)}: newly initialised, not in the checkpoint, and not saved "
                "with the adapter, so that a reloaded model would differ; add them: "
                f"modules_to_save={[*saved, *modules]}",
                stacklevel=4,
            )

    def _completed(self, peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
        """A copy of the configuration that names the base model and the task's head."""
        config = copy.deepcopy(peft_config)
        if config.base_model_name_or_path is None:
            source = getattr(model, "name_or_path", None)
            config.base_model_name_or_path = str(source) if source else None
        if config.task_type is None and config.auto_mapping is None:
            config.auto_mapping = {
                "base_model_class": type(model).__name__,
                "parent_library": type(model).__module__,
            }
        if self.head_names and hasattr(config, "modules_to_save"):
            modules = [name for name, _ in model.named_modules()]

            def there(entry: str) -> bool:
                return any(name_matches(name, entry) for name in modules)

            # the task's head is always trained: added where it is not named, and of the usual names
            # ("classifier", "score") those that this model does not have are dropped
            asked = as_list(config.modules_to_save)
            entries = [e for e in asked if e not in self.head_names or there(e)]
            entries += [e for e in self.head_names if e not in entries and there(e)]
            if not entries:
                raise ValueError(
                    f"task_type={config.task_type}: {type(model).__name__} has no head called "
                    f"{' or '.join(self.head_names)}; name yours in modules_to_save, or leave "
                    "task_type None"
                )
            config.modules_to_save = entries
        return config

    # --- the model seen through the wrapper -------------------------------------------------------
    def __getattr__(self, name: str) -> Any:
        """Takes attributes that the wrapper does not have from the tuner, and so from the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet (copying, unpickling): no endless recursion
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The model with its adapters in place, unwrapped."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.base_model.active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name (a list when several are active)."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        """The first active adapter's configuration."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss is the sum over a step's items by `num_items_in_batch`.

        The Hugging Face Trainer divides the loss by the number of accumulated batches unless this
        says yes. Many heads of Transformers take any keyword and drop this one: then nobody would
        divide. No is right for every head; yes needs a proof.
        """
        base = self.base_model.model
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        return counts_items(base)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Runs the model; with `adapter_names` sample i goes through adapter `adapter_names[i]`.

        Mixed batches need eval mode and unmerged adapters; `"__base__"` means no adapter.
        """
        if adapter_names is None:
            return self.base_model.model(*args, **kwargs)
        bounds = kwargs.get("cu_seqlens")  # (n + 1,) where the n samples are packed
        tokens = None if bounds is None else bounds.diff()  # (n,)
        samples = _batch_size(args, kwargs) if tokens is None else len(tokens)
        if samples is not None and samples != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for {samples} samples")
        with self.base_model.routed(adapter_names, tokens):
            return self.base_model.model(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Turns recomputation on, in the variant that works when the embeddings are frozen."""
        model = self.get_base_model()
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        # Transformers calls it activation checkpointing since 5.24, and warns of the older name
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{kind}_checkpointing_enable")
        if f"{kind}_checkpointing_kwargs" in inspect.signature(enable).parameters:
            enable(**{f"{kind}_checkpointing_kwargs": options})
            if options["use_reentrant"]:  # reentrant recomputation needs an input with a gradient
                model.enable_input_require_grads()
        else:
            enable()

    # --- adapters -------------------------------------------------------------------------------
    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, file: Path | None = None
    ) -> None:
        """Adds a fresh adapter of the same type; it is not activated. `file`: what will fill it."""
        config = self._completed(peft_config, self.get_base_model())
        self.base_model.add_adapter(adapter_name, config, file)

    def set_adapter(
        self, adapter_name: str | list[str], inference_mode: bool | None = None
    ) -> None:
        """Activates one adapter or several, and makes exactly these trainable."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter."""
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the base model computes: no adapter, the original head."""
        # disabling unmerges, since the base weight has to be the original one in the context
        merged = {layer: list(layer.merged_adapters) for _, layer in iter_adapters(self)}
        self.base_model.enable_adapters(False)
        try:
            yield
        finally:
            self.base_model.enable_adapters(True)
            for layer, names in merged.items():
                if names:
                    layer.merge(names)

    # --- merging --------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: list[str] | None = None, untie: bool = False) -> None:
        """Folds adapters into the base weights; `unmerge_adapter` undoes it bit for bit."""
        self.base_model.merge_adapter(adapter_names, untie=untie)

    def unmerge_adapter(self) -> None:
        """Puts the original base weights back."""
        self.base_model.unmerge_adapter()

    def unload(self) -> nn.Module:
        """The plain model, adapters dropped."""
        self.base_model.unmerge_adapter()
        return self.base_model.unload()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        verify: Batch | None = None,
        tolerance: float = 1e-4,
        untie: bool = False,
    ) -> nn.Module:
        """The plain model with the adapters folded into its weights.

        Args:
            progressbar: accepted for PEFT's sake.
            safe_merge: accepted for PEFT's sake; finiteness is always checked.
            adapter_names: adapters to fold in (default: the active ones).
            verify: a batch (keyword arguments, positional arguments, or one tensor): its logits are
                computed before, and by the plain model after; the largest difference is printed.
            tolerance: largest difference allowed, times max(1, largest logit).
            untie: give adapted weights shared with other modules a copy of their own.

        Raises:
            ValueError: the difference is above the tolerance; the model is then left unmerged.
        """
        del progressbar, safe_merge
        tuner = self.base_model
        before = list(tuner.active_adapters), list(tuner.trained_adapters)
        # the head that stays has to be one of theirs
        theirs = adapter_names is None or set(before[0]) <= set(adapter_names)
        if adapter_names is not None and (verify is not None or not theirs):
            tuner.set_adapter(adapter_names)
        try:
            if verify is None:
                tuner.merge_adapter(adapter_names, keep=False, untie=untie)
            else:
                self._merge_verified(adapter_names, verify, tolerance, untie)
        except Exception:
            if (tuner.active_adapters, tuner.trained_adapters) != before:
                tuner.switch(*before)
            raise
        for _, layer in iter_adapters(self):
            layer._kept = None  # frees the original weights; there is no way back from here
        return tuner.unload()

    def _merge_verified(
        self, names: list[str] | None, batch: Batch, tolerance: float, untie: bool
    ) -> None:
        """Merges; unmerges again, with an error, where the logits change too much."""
        tuner = self.base_model
        before = self._logits(batch)
        tuner.merge_adapter(names, untie=untie)
        try:
            with tuner.unwrapped():  # what is returned has to run by itself
                difference = float((self._logits(batch) - before).abs().max())
        except Exception:
            tuner.unmerge_adapter()
            raise
        allowed = tolerance * max(1.0, float(before.abs().max()))
        if not difference <= allowed:  # NaN fails as well
            tuner.unmerge_adapter()
            raise ValueError(
                f"merging changes the logits by {difference:.3g}, more than {allowed:.3g} "
                "(tolerance × max(1, largest logit)); the model is unmerged again. A base in low "
                "precision cannot hold the increment: load it in float32 and merge there"
            )
        print(f"merged; largest logit difference {difference:.3g} (allowed {allowed:.3g})")

    @torch.no_grad()
    def _logits(self, batch: Batch) -> Tensor:
        """The model's main output on a batch, in eval mode and fp32; each module's mode is kept."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            if isinstance(batch, Mapping):
                out = self(**batch)
            else:
                out = self(*batch) if isinstance(batch, (list, tuple)) else self(batch)
        finally:
            for module, mode in modes.items():
                module.training = mode
        for name in ("logits", "start_logits", "last_hidden_state"):
            if isinstance(getattr(out, name, None), Tensor):
                return getattr(out, name).float()
        if isinstance(out, Tensor):
            return out.float()
        values = out.values() if isinstance(out, Mapping) else out
        return next(v for v in values if isinstance(v, Tensor) and v.dim() > 0).float()

    # --- parameters -----------------------------------------------------------------------------
    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Named optimiser groups of the trainable parameters."""
        return self.base_model.parameter_groups(lr, weight_decay)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints both numbers and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    # --- files ----------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **export_options: Any,
    ) -> None:
        """Writes PEFT's files: adapter `default` into the folder, any other into a folder in it.

        Args:
            save_directory: the folder.
            safe_serialization: safetensors; False writes `adapter_model.bin`.
            selected_adapters: which adapters (default: all).
            save_embedding_layers: save the embeddings as well; "auto": those being trained.
            is_main_process: False writes nothing (other processes of a distributed run).
            state_dict: full values gathered elsewhere (FSDP).
            export_options: the method's own, such as LoRA's `convert_pissa_to_lora=True`.
        """
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self.base_model.adapter_config(name)
        if not is_main_process:
            return
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; a folder is needed")
        for name in names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            save_adapter(
                self,
                folder,
                name,
                state_dict,
                safe_serialization,
                save_embedding_layers,
                **export_options,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        subfolder: str | None = None,
        **hub: Any,
    ) -> PeftModel:
        """Wraps `model` with the adapter of a folder or hub id; the class follows its task type.

        Args:
            model: the base model.
            model_id: folder with `adapter_config.json`, or a hub id.
            adapter_name: name to give the adapter.
            is_trainable: continue training it; otherwise its parameters are frozen.
            config: use this configuration instead of the file's.
            subfolder: folder below `model_id`.
            hub: `revision=`, `token=` and the like for hub ids.

        Raises:
            ValueError: there is no such adapter, it is damaged, or of another model; the base stays
                as it was.
        """
        if config is None:
            config = PeftConfig.from_pretrained(model_id, subfolder, **hub)
        refuse_other_base(Path(model_id, subfolder or ""), model)
        config = copy.deepcopy(config)
        config.inference_mode = not is_trainable
        file = weights_file(model_id, subfolder, **hub)
        state = load_peft_weights(model_id, None, subfolder, **hub)  # damage shows before wrapping
        trained = {p: p.requires_grad for p in model.parameters()}
        try:
            peft_model = peft_model_class(config)(model, config, adapter_name, file)
        except ValueError as error:
            raise ValueError(f"{model_id}: {error}") from error
        try:
            peft_model._take_weights(state, str(model_id), adapter_name, config)
        except Exception:  # the base stays what it was
            peft_model.delete_adapter(adapter_name)
            for parameter, needs_gradient in trained.items():
                parameter.requires_grad_(needs_gradient)
            raise
        return peft_model.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        subfolder: str | None = None,
        **hub: Any,
    ) -> None:
        """Loads one more adapter from a folder or hub id; it is not activated.

        When there is an adapter of this name already, its tensors are replaced.
        """
        fresh = adapter_name not in self.peft_config
        try:
            config = PeftConfig.from_pretrained(model_id, subfolder, **hub)
        except FileNotFoundError:
            if fresh:
                raise
            config = self.peft_config[adapter_name]  # tensors alone, for an adapter there is
        state = load_peft_weights(model_id, None, subfolder, **hub)
        if fresh:
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, weights_file(model_id, subfolder, **hub))
        try:
            self._take_weights(state, str(model_id), adapter_name, config)
        except Exception:
            if fresh:
                self.delete_adapter(adapter_name)
            raise

    def _take_weights(
        self, state: Mapping[str, Tensor], source: str, adapter: str, config: PeftConfig
    ) -> None:
        """Copies a file's tensors into the adapter; `config` is the file's."""
        set_peft_model_state_dict(self, state, adapter, source=source)
        set_finished(self.base_model, getattr(config, "finished", True), [adapter])


def _remade(cls: type[PeftModel], base: type[nn.Module]) -> PeftModel:
    """For unpickling and copying: an empty object of the class that `PeftModel.__new__` chose."""
    return nn.Module.__new__(like_base(cls, base))


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """First dimension of the first tensor among the arguments; None without one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


_CLASSES: dict[str, type[PeftModel]] = {}


def for_task(task: TaskType) -> Callable[[type[PeftModel]], type[PeftModel]]:
    """Class decorator: the wrapper for models of this task type."""

    def register(cls: type[PeftModel]) -> type[PeftModel]:
        _CLASSES[task.value] = cls
        return cls

    return register


def peft_model_class(config: PeftConfig) -> type[PeftModel]:
    """The class for a configuration's task type; plain `PeftModel` for none."""
    return _CLASSES.get(config.task_type or "", PeftModel)
