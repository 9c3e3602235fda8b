"""LoRA, in its two wirings: injected into the model, or built in the modelling file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.cli.fields import option
from examples.errors import OptionError
from examples.methods.options import IncrementOptions
from examples.methods.registry import AdaptedModel, register_method

if TYPE_CHECKING:
    from examples.methods.source import ModelSource


@dataclass(frozen=True)
class LoraOptions(IncrementOptions):
    init_lora_weights: str = option(
        "true", "peft_custom: true, gaussian, pissa, pissa_niter_K: where A and B start"
    )
    use_rslora: bool = option(False, "peft_custom: scale by alpha / √r")

    def __post_init__(self) -> None:
        if self.wiring == "loralib" and (self.init_lora_weights != "true" or self.use_rslora):
            raise OptionError(
                "--init_lora_weights and --use_rslora are options of --wiring peft_custom"
            )


def build(source: ModelSource, options: LoraOptions) -> AdaptedModel:
    """LoRA by `options.wiring`, started from `options.lora_path` where given."""
    from examples.methods.common import initialisation, with_loralib, with_peft
    from examples.methods.start import start_from
    from peft_custom import LoraConfig

    if options.wiring == "loralib":
        adapted = with_loralib(source, options)
    else:
        adapted = with_peft(
            source,
            options,
            LoraConfig,
            r=options.lora_r,
            init_lora_weights=initialisation(options.init_lora_weights),
            use_rslora=options.use_rslora,
        )
    start_from(adapted.model, options, source.print_once)
    return adapted


register_method("lora", LoraOptions, build, "low-rank increments of frozen weights")
