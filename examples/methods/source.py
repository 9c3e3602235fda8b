"""Where a run's model comes from: its checkpoint, its head, the type of its frozen weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import transformers_patched
from peft_custom.base_weights import BaseWeights, describe, refuse_other_base
from peft_custom.digest import digest
from peft_custom.save_and_load import adapter_folder, adapter_tensors
from transformers_patched import PreTrainedModel


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
        note_weights: add a key of the frozen weights to `read`.
        read: what the run has read -> a key of its content.
        adapter: what the run starts from; it must have been trained over these weights.
        base: the frozen weights, where `note_weights` asks for them.
    """

    name_or_path: str
    auto_class: str
    task_type: str
    base_dtype: str = "auto"
    arguments: dict[str, Any] = field(default_factory=dict)
    verbose: bool = True
    note_weights: bool = False
    read: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None
    base: BaseWeights | None = None

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
        new = {*report.missing, *report.mismatched}
        if frozen and self.adapter is not None:
            refuse_other_base(adapter_folder(self.adapter), model, without=new)
        if frozen and self.note_weights:
            base = describe(model, self.name_or_path, without=new)
            ours = {name.removeprefix(f"{model.base_model_prefix}.") for name in increments}
            self.base = replace(base, without=tuple(sorted({*base.without} - ours)))
            found = {name: t for name, t in model.state_dict().items() if name not in new}
            self.read |= {"base weights": digest(found), "base dtype": str(model.dtype)}
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
