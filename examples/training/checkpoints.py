"""Checkpoints: folders `checkpoint-N`, written whole or not at all, without a pickle in them.

`state.safetensors` holds all that a resumed run needs (see `peft_custom.state_files`);
`progress.json` shows its counters to people, and is not read back.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from examples.errors import RunError
from examples.training.replacing import REPLACED
from peft_custom.state_files import read_tree, write_tree

STATE = "state.safetensors"
PROGRESS = "progress.json"
ASIDE = ".tmp"
SAVED_AS = {"evals_without_gain": "worse"}  # names in checkpoints, which stay


class Diverged(RunError):
    """The loss or the weights are not finite: there is nothing to go on from."""


@dataclass
class Progress:
    """Where a run is; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0  # since the best one
    stopped: bool = False
    loss_sum: float = 0.0  # since the last evaluation
    loss_steps: int = 0
    log_sum: float = 0.0  # since the last line of the log
    log_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields under their names in a checkpoint."""
        return {SAVED_AS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Progress:
        """The opposite of `to_dict`."""
        names = {old: name for name, old in SAVED_AS.items()}
        return cls(**{names.get(key, key): value for key, value in saved.items()})

    def count(self, losses: list[float]) -> None:
        """Adds the losses of some steps to both means."""
        for name in ("loss", "log"):
            setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + sum(losses))
            setattr(self, f"{name}_steps", getattr(self, f"{name}_steps") + len(losses))

    def take(self, name: str) -> tuple[float, int]:
        """Sum and number of the losses of `name` ("loss" or "log"); both start at 0 again."""
        found = getattr(self, f"{name}_sum"), getattr(self, f"{name}_steps")
        setattr(self, f"{name}_sum", 0.0)
        setattr(self, f"{name}_steps", 0)
        return found


def read_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's state.

    Raises:
        RunError: the file is missing, damaged, or something else.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file, so {path.parent} is no checkpoint of a run")
    try:
        return read_tree(path)
    except ValueError as error:
        raise RunError(f"{error}; resume from an earlier checkpoint") from error


def refuse_other_inputs(checkpoint: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compares the keys of what a run has read; what only one of them has counts for nothing.

    Raises:
        RunError: it names what has changed.
    """
    changed = [name for name in now if saved.get(name, now[name]) != now[name]]
    if changed:
        raise RunError(
            f"{checkpoint} is of a run that has read something else: changed since: "
            f"{', '.join(changed)}. Give it what it had, or choose another --output_dir"
        )


# -- folders ------------------------------------------------------------------------------------


def is_disk_full(error: BaseException) -> bool:
    """Whether saving failed because the disk, a quota or the largest permitted file is full."""
    # safetensors reports errors of the system in words, without a number.
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left", "quota exceeded", "File too large", "StorageFull", "os error 28")
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return isinstance(error, (OSError, SafetensorError)) and any(w in str(error) for w in words)


def save(folder: Path, step: int, state: dict[str, Any], progress: dict[str, Any]) -> Path:
    """Writes `folder/checkpoint-<step>`: aside first, then renamed.

    Raises:
        RunError: the disk is full, or the folder cannot be written; what was there is untouched.
    """
    final = folder / f"checkpoint-{step}"
    aside = folder / f"checkpoint-{step}{ASIDE}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write_tree(aside / STATE, state)
        (aside / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", "utf-8")
        for name in (STATE, PROGRESS):  # on the disk before the folder has its name
            with open(aside / name, "rb+") as file:
                os.fsync(file.fileno())
        if final.exists():  # written by a run that was resumed from before it
            shutil.rmtree(final)
        os.replace(aside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise saving_failed(final, error) from error
    return final


def saving_failed(path: Path, error: BaseException) -> RunError:
    """The error to raise when `path` could not be written."""
    reason = "the disk is full" if is_disk_full(error) else f"it cannot be written ({error})"
    earlier = list_checkpoints(path.parent)
    kept = f"{earlier[-1]} is untouched" if earlier else "nothing was overwritten"
    return RunError(
        f"saving {path}: {reason}; {kept}. Make room (--save_total_limit keeps fewer), then go on "
        "with --resume_from_checkpoint auto"
    )


def diverged(folder: Path, step: int, total: int, rate: float) -> Diverged:
    """The error to raise when the loss of a step (or the weights after it) is not finite."""
    kept = list_checkpoints(folder)
    where = f"{kept[-1]} is from before" if kept else "nothing was saved"
    if (folder / REPLACED).is_dir():
        where = "the run that was to be replaced is as it was"
    return Diverged(
        f"the loss is not finite in step {step} of {total}: training has diverged; {where}, and "
        f"nothing was overwritten. Lower --learning_rate (now {rate:g}), raise --num_warmup_steps, "
        "keep --max_grad_norm at 1.0, or use --mixed_precision bf16 or no instead of fp16"
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Removes all but the `keep` newest checkpoints and the best one; 0 keeps all."""
    if keep < 1:
        return
    for path in list_checkpoints(folder)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)
