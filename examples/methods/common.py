"""What the methods' builders share: loading the model, injecting adapters, LoRA's two wirings."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

import transformers_patched
from examples.methods.options import IncrementOptions
from examples.methods.registry import AdaptedModel
from loralib import lora_state_dict
from peft_custom import PeftConfig, get_peft_model
from peft_custom.save_and_load import LORALIB_CONFIG, LORALIB_WEIGHTS, adapter_tensors
from transformers_patched import PreTrainedModel
from transformers_patched.checkpoint import write_safetensors

__all__ = ["AdaptedModel", "ModelSource", "initialisation", "with_loralib", "with_peft"]

HEADS = ("classifier", "score", "qa_outputs")  # they train with any method, as PEFT has it


@dataclass
class ModelSource:
    """Where a method gets its model from, and the model's task.

    Attributes:
        name_or_path: folder or hub id.
        auto_class: a class of `transformers_patched`, which says the head.
        task_type: the same in PEFT's words.
        base_dtype: "auto", "float32" or "bfloat16", for frozen weights.
        arguments: of `from_pretrained`: revision, labels and the like.
        verbose: print what was not in the checkpoint (one process of several does).
    """

    name_or_path: str
    auto_class: str
    task_type: str
    base_dtype: str = "auto"
    arguments: dict[str, Any] = field(default_factory=dict)
    verbose: bool = True

    def load(self, *, frozen: bool, **overrides: Any) -> PreTrainedModel:
        """Loads the model; `frozen` freezes its base and keeps it in the base dtype."""
        dtype = resolved_dtype(self.base_dtype) if frozen else None
        loader = getattr(transformers_patched, self.auto_class)
        with warnings.catch_warnings():  # printed below, in one line and without the LoRA factors
            warnings.simplefilter("ignore", UserWarning)
            model, report = loader.from_pretrained(
                self.name_or_path,
                base_dtype=dtype,
                output_loading_info=True,
                **{**self.arguments, **overrides},
            )
        increments = adapter_tensors(model)  # where the modelling file builds them
        fresh = [name for name in report.missing if name not in increments]
        for what, names in (
            ("newly initialised", fresh + report.mismatched),
            ("in the checkpoint but not in the model", report.unexpected),
        ):
            if names:
                self.print_once(f"{self.name_or_path}: {what}: {', '.join(names)}")
        if "id2label" in self.arguments and not fresh:
            self._order_labels(model)
        return model

    def print_once(self, message: str) -> None:
        """Prints on one process of several."""
        if self.verbose:
            print(message)

    def _order_labels(self, model: PreTrainedModel) -> None:
        """Reorders a trained classification head to this task's label order."""
        where = {k: v for k, v in self.arguments.items() if k in ("revision", "local_files_only")}
        theirs = transformers_patched.AutoConfig.from_pretrained(
            self.name_or_path, **where
        ).id2label
        theirs = [theirs[i].casefold() for i in sorted(theirs)]
        ours = [name.casefold() for name in self.arguments["id2label"].values()]
        if theirs == ours or sorted(theirs) != sorted(ours):
            return
        order = [theirs.index(name) for name in ours]
        base = {id(p) for p in model.base_model.parameters()}
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if id(weight) not in base and weight.shape[0] == len(ours):
                    weight.copy_(weight[order])
                    self.print_once(
                        f"{self.name_or_path}: {name} put in the order {', '.join(ours)}"
                    )


def resolved_dtype(name: str) -> torch.dtype:
    """ "auto" asks the hardware: bfloat16 where it multiplies that, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)
    return torch.bfloat16 if fast else torch.float32


# -- the two wirings ----------------------------------------------------------------------------


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
    modules, alpha = list(options.lora_modules), options.lora_alpha
    shared = {
        "task_type": source.task_type,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # as PEFT writes it
        "lora_dropout": options.lora_dropout,
        "target_modules": "all-linear" if modules == ["all-linear"] else modules,
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
        lora_modules=options.lora_modules,
    )
    values = {
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "target_modules": list(options.lora_modules),
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
    names = [name for name in model.newly_initialised if name.partition(".")[0] not in HEADS]
    return sorted({name.rpartition(".")[0] for name in names})
