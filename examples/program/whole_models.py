"""Whole models of finished runs, of any program and method: merged, or smaller where masks allow.

What `examples.export --to merged|hf|compact` writes where nothing is cut off the adapter.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from examples.data.tasks.choice import CHOICE_TASKS
from examples.errors import OptionError, RunError, as_user_error
from examples.methods.source import ModelSource
from examples.program.finished_run import FinishedRun
from examples.training.file_names import CONFIG, ENVIRONMENT
from peft_custom import PeftModel
from peft_custom.config import CONFIG_NAME
from peft_custom.files import read_json
from transformers_patched import AutoTokenizer

CHOICE_PROGRAM = "run_multiple_choice"  # PEFT has no word for its task
HEADS = {  # PEFT's word for the task -> the class with its head
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
}


def adapted(folder: Path, base: str | None) -> PeftModel:
    """The run's model with its adapter, in fp32 and in evaluation mode.

    Args:
        folder: of the run.
        base: where the pretrained model is now; None: where the run had it.

    Raises:
        RunError: it is no finished run with an adapter in PEFT's files.
    """
    if not (folder / CONFIG).is_file() or not (folder / "adapter" / CONFIG_NAME).is_file():
        raise RunError(f"{folder} is no finished run with an adapter in PEFT's files")
    source = _source(folder, base)
    source.adapter = str(folder)
    model = source.load(frozen=True)
    return as_user_error(PeftModel.from_pretrained, model, folder / "adapter").eval()


def _source(folder: Path, base: str | None) -> ModelSource:
    """Its base with the head of its task."""
    options = as_user_error(read_json, folder / CONFIG)
    task_type = as_user_error(read_json, folder / "adapter" / CONFIG_NAME)["task_type"]
    chooses = _program(folder, options) == CHOICE_PROGRAM
    name = "AutoModelForMultipleChoice" if chooses else HEADS.get(task_type)
    if name is None:  # a classifier: its labels are the task's
        run = FinishedRun(folder, base)
        return run.source(run.data())
    where = {n: options[n] for n in ("revision", "local_files_only") if n in options}
    return ModelSource(
        base or options["model_name_or_path"], name, task_type, "float32", where, verbose=False
    )


def _program(folder: Path, options: dict[str, Any]) -> str:
    """What made the run; of older runs, which do not say it, what their task tells."""
    path = folder / ENVIRONMENT
    found = as_user_error(read_json, path).get("program") if path.is_file() else None
    return found or (CHOICE_PROGRAM if options.get("task_name") in CHOICE_TASKS else "")


def export_whole(folder: Path, base: str | None, out: Path, compact: bool) -> str:
    """Writes the run's model with its adapter folded in; what it is, in words.

    Args:
        folder: of the run.
        base: where the pretrained model is now; None: where the run had it.
        out: a folder that does not exist yet.
        compact: without the heads and units that the run's masks took out.

    Raises:
        OptionError: there are no masks that could make it smaller.
    """
    model = adapted(folder, base)
    before = sum(p.numel() for p in model.get_base_model().parameters())
    if compact:
        if not hasattr(model, "pruning_summary"):
            kind = read_json(folder / CONFIG)["method"]
            raise OptionError(f"--to compact: {kind} takes no heads or units out of a model")
        whole: Any = as_user_error(model.compact)
    else:
        whole = as_user_error(model.merge_and_unload)
    whole.save_pretrained(out)
    _save_tokenizer(folder, base, out)
    after = sum(p.numel() for p in whole.parameters())
    return f"{after:,} parameters" + (f" of {before:,}" if compact else "")


def export_full(folder: Path, out: Path) -> str:
    """Copies what a run without an adapter has trained, which is a whole model already."""
    shutil.copytree(folder / "model", out)
    return "the run's model"


def _save_tokenizer(folder: Path, base: str | None, out: Path) -> None:
    options = read_json(folder / CONFIG)
    name = options.get("tokenizer_name") or base or options["model_name_or_path"]
    tokenizer = as_user_error(AutoTokenizer.from_pretrained, name, revision=options.get("revision"))
    tokenizer.save_pretrained(out)
