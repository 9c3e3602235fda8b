"""How a global batch is split: over processes, and into forward passes."""

from __future__ import annotations

from examples.cli.groups import TrainingOptions
from examples.errors import OptionError


def rows_at_once(options: TrainingOptions, processes: int) -> int:
    """Rows per forward pass and process: of a stated global batch, as many as divide it evenly."""
    limit = options.per_device_train_batch_size
    if options.global_batch_size is None:
        return limit
    own, rest = divmod(options.global_batch_size, processes)
    if rest or not own:
        raise OptionError(
            f"--global_batch_size {options.global_batch_size} is no multiple of the {processes} "
            f"processes; {max(1, own) * processes} is"
        )
    return max(size for size in range(1, min(limit, own) + 1) if own % size == 0)


def accumulation(options: TrainingOptions, processes: int) -> int:
    """Forward passes per optimiser step and process."""
    if options.global_batch_size is None:
        return options.gradient_accumulation_steps
    return options.global_batch_size // (rows_at_once(options, processes) * processes)
