"""The metric of a trained adapter over what is left of it after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.evaluation.prediction import evaluate, variant_metric
from examples.methods.dylora_ranks import areas
from examples.plots.curves import budget_curve as draw
from examples.program.finished_run import FinishedRun
from examples.program.run import make_accelerator
from peft_custom import get_peft_model, set_peft_model_state_dict
from peft_custom.save_and_load import read_adapter
from peft_custom.tuners.lora import rank_cut
from transformers_patched import AutoTokenizer

CURVE, PICTURE = "budget_curve.json", "budget_curve.png"
RULES = ("global", "uniform")  # one threshold for all matrices; the same rank everywhere


class CutPredictor:
    """A variant for every cut: components past a matrix's rank are switched off for a pass.

    Args:
        factors: module -> B (out, k), its columns by falling singular value.
        cuts: variant -> module -> rank.
    """

    probabilistic = False
    stacked = False

    def __init__(self, factors: dict[str, nn.Parameter], cuts: dict[str, rank_cut.Ranks]) -> None:
        self.factors, self.cuts = factors, cuts
        self.whole = {name: B.detach().clone() for name, B in factors.items()}

    def variants(self, final: bool) -> list[str]:
        return list(self.cuts)

    def outputs(
        self, model: nn.Module, arguments: dict[str, Any], variants: list[str]
    ) -> list[Any]:
        found = []
        for variant in variants:
            for name, B in self.factors.items():
                B.data.copy_(self.whole[name])
                B.data[:, self.cuts[variant][name] :] = 0
            model.train(False)  # what was kept of the former weights is dropped
            found.append(model(**arguments))
        return found


def print_curve(run: FinishedRun, out: Path) -> None:
    """Makes the curve (see `budget_curve`) and prints it as a table."""
    found = budget_curve(run, out)
    print(f"{'budget':>8}  {'one threshold':>14}  {'one rank':>9}   {found['metric']}")
    figures = found["budgets"], found["global"]["values"], found["uniform"]["values"]
    for budget, one, other in zip(*figures, strict=True):
        print(f"{budget:>8}  {one:>14.4f}  {other:>9.4f}")
    print(f"picture: {out / PICTURE}")


def budget_curve(run: FinishedRun, out: Path) -> dict[str, Any]:
    """Evaluates the run's adapter at every budget, by one threshold and at one rank for all.

    Args:
        run: of `examples.run_glue`.
        out: a new folder, for the figures and their picture.

    Returns:
        What is in the file of figures.
    """
    file = read_adapter(run.folder)
    matrices = rank_cut.decomposed(file.config, file.tensors)
    most = max(len(matrix.S) for matrix in matrices.values())
    uniform = {b: rank_cut.by_rank(matrices, b) for b in range(1, most + 1)}
    budgets = {b: sum(ranks.values()) for b, ranks in uniform.items()}
    cuts = {f"uniform{n}": uniform[b] for b, n in budgets.items()}
    cuts |= {f"global{n}": rank_cut.by_budget(matrices, n) for n in budgets.values()}
    data = run.data()
    whole = {name: len(matrix.S) for name, matrix in matrices.items()}
    config, tensors = rank_cut.cut(file.config, file.tensors, matrices, whole)
    model = get_peft_model(run.source(data).load(frozen=True), config)
    set_peft_model_state_dict(model, tensors, source=str(file.path))
    live = model.base_model.live_tensors("default")
    factors = {n: live[m.keys[1].removeprefix(rank_cut.PREFIX)] for n, m in matrices.items()}
    tokenizer = AutoTokenizer.from_pretrained(
        run.where.tokenizer_name or run.where.model_name_or_path, revision=run.where.revision
    )
    limit = data.options.max_eval_samples
    sets = [
        data.evaluation_set(name, data.encode(data.read(split, limit), tokenizer))
        for split, name in data.evaluated.items()
    ]
    accelerator = make_accelerator(run.training)
    model.to(accelerator.device)
    with torch.no_grad():
        values = evaluate(model, sets, accelerator, CutPredictor(factors, cuts), final=True)
    content = _content(data.main_metric, list(budgets.values()), cuts, matrices, values)
    out.mkdir(parents=True)
    (out / CURVE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    title = f"{data.task.name}, {run.options.method.name} of rank {most}, cut after training"
    if why_not := draw(out / PICTURE, content, title):
        print(why_not)
    return content


def _content(
    metric: str,
    budgets: list[int],
    cuts: dict[str, rank_cut.Ranks],
    matrices: rank_cut.Matrices,
    values: dict[str, float],
) -> dict[str, Any]:
    sides = {name: m.U.shape[0] + m.V.shape[0] for name, m in matrices.items()}
    content: dict[str, Any] = {
        "metric": metric,
        "budgets": budgets,
        "mean_ranks": [budget / len(matrices) for budget in budgets],
    }
    for rule in RULES:
        variants = [f"{rule}{budget}" for budget in budgets]
        figures = [values[variant_metric(metric, variant)] for variant in variants]
        parameters = [sum(r * sides[n] for n, r in cuts[variant].items()) for variant in variants]
        content[rule] = {"values": figures, "parameters": parameters, **areas(budgets, figures)}
    return content
