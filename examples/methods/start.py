"""`--lora_path`: a run that starts from an adapter trained before, by whatever program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from peft_custom.save_and_load import LoadReport, load_adapter, read_adapter
from transformers_patched import CheckpointError

WEIGHED = "matryoshka"  # the mode whose components have fixed weights
FIXED_RANK = {"r": "lora_r", "lora_alpha": "lora_alpha"}


def start_from(
    model: nn.Module,
    options: Any,
    print_once: Callable[[str], None],
    agree: Mapping[str, str] = FIXED_RANK,
    optional: tuple[str, ...] = (),
) -> LoadReport | None:
    """Loads the adapter of `options.lora_path` into fresh ones; a head of other labels stays fresh.

    Args:
        model: with adapters, injected or in its layers.
        options: of the method.
        print_once: where to say what was left out.
        agree: fields of the saved configuration that must be as here -> the options that set them.
        optional: tensors of an adapted layer that the file may lack.

    Returns:
        What was missing and left out; None without a `lora_path`.

    Raises:
        CheckpointError: there is no adapter, or it is not this model's with these options.
    """
    if options.lora_path is None:
        return None
    try:
        file = read_adapter(options.lora_path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"--lora_path: {error}") from error
    # factors of the one kind mean another increment in the other (see loralib.dylora)
    if (file.config.get("dylora_mode") == WEIGHED) != (
        getattr(options, "dylora_mode", None) == WEIGHED
    ):
        raise CheckpointError(
            f"{file.path}: an adapter trained with --dylora_mode {WEIGHED} goes on with that mode, "
            "and no other does; write it as a plain one first: python -m examples.export RUN --rank"
        )
    for field, option in agree.items():
        saved = file.config.get(field, getattr(options, option))
        if saved != getattr(options, option):
            raise CheckpointError(f"{file.path} has {field} {saved}: give --{option} {saved}")
    try:
        report = load_adapter(model, file, optional=optional)
    except ValueError as error:
        options_to_check = "--model_name_or_path, --lora_r, --lora_modules"
        if hasattr(options, "wiring"):  # of a fused layer, such as c_attn, the factors differ
            options_to_check += ", --wiring"
        raise CheckpointError(f"{error}\n(check {options_to_check})") from error
    if report.left_out:
        parts = ", ".join(sorted({name.partition(".")[0] for name in report.left_out}))
        print_once(
            f"{file.path}: its {parts} is for another number of labels ({report.left_out[0]}) and "
            "is left out; only the LoRA factors are taken over"
        )
    if report.unexpected_keys:
        print_once(
            f"{file.path}: left out, for nothing here trains it: "
            f"{', '.join(report.unexpected_keys)}"
        )
    return report
