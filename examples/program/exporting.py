"""What `examples.export` writes: an adapter at one of its ranks, or cut by its singular values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from examples.errors import OptionError, RunError, as_user_error
from examples.methods import dylora
from examples.program.finished_run import FinishedRun
from peft_custom import PeftModel, get_peft_model, set_peft_model_state_dict
from peft_custom.config import CONFIG_NAME
from peft_custom.files import read_json
from peft_custom.hooks import set_finished
from peft_custom.save_and_load import (
    LORALIB_CONFIG,
    adapter_folder,
    read_adapter,
    write_adapter,
)
from peft_custom.tuners.lora import rank_cut
from transformers_patched import AutoTokenizer


def is_nested(path: Path) -> bool:
    """Whether the adapter in `path` was trained to work at every rank.

    Raises:
        RunError: there is no adapter.
    """
    folder = adapter_folder(path)
    found = [file for name in (CONFIG_NAME, LORALIB_CONFIG) if (file := folder / name).is_file()]
    if not found:
        raise RunError(f"{path} is no finished run, nor the folder of an adapter")
    return "dylora_mode" in read_json(found[0])


def export_nested(run: FinishedRun, rank: int, out: Path, merged: bool) -> None:
    """Writes a nested adapter at `rank`.

    Args:
        run: of `--method dylora`, of either wiring.
        rank: from 1 to the run's `lora_r`.
        out: a folder that does not exist yet.
        merged: the whole model, with the increments added to its weights in fp32.
    """
    own = run.options.method_options
    if not 1 <= rank <= own.lora_r:
        raise OptionError(f"--rank {rank}: {run.folder} has the ranks 1 to {own.lora_r}")
    own = dataclasses.replace(own, wiring="peft_custom", lora_path=str(run.folder))
    model = as_user_error(dylora.build, run.source(run.data()), own).model
    set_finished(model.base_model, finished=True)  # the run has driven it
    if not merged:
        model.save_pretrained(out, rank=rank)
        return
    model.base_model.set_rank(rank)
    _save_merged(model, run, out)


def export_cut(path: Path, rule: rank_cut.Rule, out: Path, run: FinishedRun | None) -> str:
    """Writes the adapter in `path` cut by `rule`; what is left of it, in words.

    Args:
        path: a run, or PEFT's folder.
        rule: singular values -> ranks.
        out: a folder that does not exist yet.
        run: for the whole model, with the increments added to its weights; else None.
    """
    file = read_adapter(path)
    matrices = rank_cut.decomposed(file.config, file.tensors)
    ranks = rule(matrices)
    config, tensors = rank_cut.cut(file.config, file.tensors, matrices, ranks)
    if run is None:
        config.inference_mode = True
        write_adapter(out, config, tensors)
    else:
        model = get_peft_model(run.source(run.data()).load(frozen=True), config)
        set_peft_model_state_dict(model, tensors, source=str(path))
        _save_merged(model, run, out)
    squares = sum(float(m.S.square().sum()) for m in matrices.values())
    left = sum(float(m.S[: ranks[n]].square().sum()) for n, m in matrices.items())
    kept, all_of_them = sum(ranks.values()), sum(len(m.S) for m in matrices.values())
    return (
        f"{kept} of {all_of_them} singular values in {len(matrices)} matrices, ranks "
        f"{min(ranks.values())} to {max(ranks.values())}, {left / squares:.4f} of all squares"
    )


def _save_merged(model: PeftModel, run: FinishedRun, out: Path) -> None:
    model.merge_and_unload().save_pretrained(out)
    tokenizer = run.where.tokenizer_name or run.where.model_name_or_path
    AutoTokenizer.from_pretrained(tokenizer, revision=run.where.revision).save_pretrained(out)
