"""Writes a run's nested adapter at one rank: as a plain LoRA adapter, or merged into the model.

    python -m examples.export_adapter RUN --rank 4 --out DIR             # PEFT loads it
    python -m examples.export_adapter RUN --rank 4 --out DIR --merged    # Transformers loads it

RUN is the folder of a finished run of `examples.run_glue --method dylora`, of either wiring.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from examples import program
from examples.cli.groups import OPTION_CLASSES, DataOptions, ModelOptions, TrainingOptions
from examples.errors import OptionError, RunError, as_user_error
from examples.methods import dylora


def export(run: Path, rank: int, out: Path, merged: bool, base: str | None = None) -> None:
    """Writes the adapter of `run` at `rank` into the folder `out`.

    Args:
        run: a run's folder.
        rank: from 1 to the run's `lora_r`.
        out: a folder that does not exist yet.
        merged: the whole model, with the increments added to its weights in fp32.
        base: where the pretrained model is now; default: where the run had it.

    Raises:
        RunError: `run` is no finished DyLoRA run, or `out` exists.
        OptionError: there is no such rank.
    """
    options = _options(run, base)
    own = options.method_options
    if not 1 <= rank <= own.lora_r:
        raise OptionError(f"--rank {rank}: {run} has the ranks 1 to {own.lora_r}")
    if out.exists():
        raise RunError(f"--out {out} exists: choose another folder")
    from peft_custom.hooks import set_finished
    from transformers_patched import AutoTokenizer

    data = program.TaskData(options[DataOptions], options[TrainingOptions])
    where = dataclasses.replace(options[ModelOptions], base_dtype="float32")
    own = dataclasses.replace(own, wiring="peft_custom", lora_path=str(run))
    model = as_user_error(dylora.build, program.sequence_classifier(where, data.task), own).model
    set_finished(model.base_model, finished=True)  # the run has driven it
    if not merged:
        model.save_pretrained(out, rank=rank)
        return
    model.base_model.set_rank(rank)
    model.merge_and_unload().save_pretrained(out)
    tokenizer = where.tokenizer_name or where.model_name_or_path
    AutoTokenizer.from_pretrained(tokenizer, revision=where.revision).save_pretrained(out)


def _options(run: Path, base: str | None) -> program.Options:
    from examples.training.run_folder import CONFIG

    if not (run / CONFIG).is_file() or not (run / "adapter").is_dir():
        raise RunError(f"{run} is no finished run: it needs {CONFIG} and adapter/")
    words = ["--config", str(run / CONFIG)]
    if base is not None:
        words += ["--model_name_or_path", base]
    options = program.parse(words, "examples.export_adapter", "", OPTION_CLASSES, "task_name")
    if not isinstance(options.method_options, dylora.DyLoraOptions):
        raise RunError(
            f"{run} is a run of --method {options.method.name}, whose adapter has one rank: use "
            f"{run / 'adapter'} as it is"
        )
    return options


def main(argv: Sequence[str]) -> int:
    """The program; the words after its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a DyLoRA run")
    parser.add_argument("--rank", type=int, required=True, help="1 to the run's lora_r")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--merged", action="store_true", help="a whole model, not an adapter")
    parser.add_argument("--model_name_or_path", help="where the pretrained model is now")
    o = parser.parse_args(argv)
    export(o.run, o.rank, o.out, o.merged, o.model_name_or_path)
    print(f"rank {o.rank} of {o.run}: {o.out}")
    return 0


if __name__ == "__main__":
    sys.exit(program.run_main(main))
