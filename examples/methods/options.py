"""Options that several methods share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from examples.cli.fields import option


@dataclass(frozen=True)
class IncrementOptions:
    """What the low-rank methods with a fixed rank share."""

    lora_r: int = option(8, "rank of the increments (dylora: the largest)", low=1)
    lora_alpha: float = option(16.0, "increments are scaled by alpha / r", low=0)
    lora_dropout: float = option(0.0, "dropout before the increments", low=0, high=0.999)
    lora_modules: tuple[str, ...] = option(
        (), "layers to adapt, or all-linear; none: the model's query and value, GPT-2's c_attn"
    )
    lora_path: str | None = option(
        None,
        "start from this adapter: a run's or PEFT's folder, or Microsoft's .bin; a head of "
        "another number of labels is left out",
    )
    wiring: str = option(
        "peft_custom",
        "peft_custom: injected into the model; loralib: built in the modelling file",
        choices=("peft_custom", "loralib"),
    )
