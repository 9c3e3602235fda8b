"""What the trainer does in and between steps, each against a plain statement of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.runner_cases import lines, pair_task, results, tiny_bert
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from examples import program
from examples.cli.groups import TrainingOptions
from examples.data.batches import Batch, GlobalBatch
from examples.data.tables import write_table
from examples.errors import RunError
from examples.evaluation.prediction import EvaluationSet
from examples.run_glue import main, smoothed_loss
from examples.training import checkpoints
from examples.training.checkpoints import Diverged
from examples.training.progress import ProgressBar
from examples.training.run_folder import RunFolder
from examples.training.sampling import over_samples
from examples.training.trainer import Trainer

STEPS = 4  # of an epoch


class Parts(nn.Module):
    """A loss whose gradient for every part is a constant vector; a buffer counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.zeros(3) for _ in range(4)])
        self.slopes = [torch.tensor([1.0, 2.0, -2.0]) * (k + 1) for k in range(4)]  # norms 3(k + 1)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def forward(self, rows: Tensor) -> Any:
        if self.training:
            self.seen += 1
            self.scratch += 1
        loss = sum(p @ s for p, s in zip(self.parts, self.slopes, strict=True))
        return SimpleNamespace(loss=loss, logits=torch.zeros(len(rows), 1))


class Batches:
    """Two micro-batches a step, of a quarter and three quarters of its rows."""

    def __len__(self) -> int:
        return STEPS

    def global_batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        for index in range(start, STEPS):
            micro = (Batch(np.arange(1), 1, 0.25), Batch(np.arange(3), 3, 0.75))
            yield GlobalBatch(index, micro, 4)


def trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    groups: list[dict[str, Any]] | None = None,
    scores: list[float] | None = None,
    epochs: int = 3,
    schedule: Callable[[int], float] = lambda step: 1.0,
    metric: str = "eval_x",
    **options: Any,
) -> Trainer:
    """Plain gradient descent on `Parts`; `scores` are what one evaluation after another gives."""
    model = model or Parts()
    given = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 0, **options}
    if "save_steps" in options:
        given["save_strategy"] = "steps"
    left = iter(scores or [])
    found = EvaluationSet(
        "",
        1,
        lambda copies: [Batch(np.arange(1), 1)],
        lambda batch: {"rows": torch.zeros(len(batch.rows))},
        score=lambda logits: {"x": next(left)},
    )
    run = RunFolder(folder, {})
    run.open(0, "cpu", None)
    made = Trainer(
        model,
        torch.optim.SGD(groups(model) if groups else model.parameters(), lr=1.0),
        TrainingOptions(output_dir=str(folder), disable_tqdm=True, **given),
        Accelerator(cpu=True),
        run,
        train=Batches(),
        collate=lambda batch: {"rows": torch.zeros(len(batch.rows))},
        schedule=schedule,
        total_steps=epochs * STEPS,
        evaluations=[] if scores is None else [found],
        main_metric=metric,
    )
    made.bar, made.started = ProgressBar(99, show=False), 0.0  # as within `train`
    return made


def one_step(made: Trainer) -> list[Tensor]:
    """How far a step moves every part, against the gradient."""
    made.step(next(made.train_batches.global_batches(0)))
    return [-p.detach() for p in made.unwrapped.parts]


# --- a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.0, 1.0, 1e6])
def test_gradients_are_clipped_to_their_norm(tmp_path: Path, norm: float) -> None:
    """All parts together: their norm is 3·√(1 + 4 + 9 + 16)."""
    moved = one_step(trainer(tmp_path, max_grad_norm=norm))
    full = 3 * math.sqrt(30)
    share = min(1.0, norm / full) if norm else 1.0
    for found, slope in zip(moved, Parts().slopes, strict=True):
        torch.testing.assert_close(found, share * slope)


def test_a_groups_own_norm_clips_it_by_itself(tmp_path: Path) -> None:
    """Parts 0 and 1 share the option's norm 1; part 2 has its own 0.5, part 3 its own: never."""

    def groups(model: Parts) -> list[dict[str, Any]]:
        a, b, c, d = model.parts
        own = {"params": [c], "max_grad_norm": 0.5}
        return [{"params": [a]}, own, {"params": [d], "max_grad_norm": 0}, {"params": [b]}]

    moved = one_step(trainer(tmp_path, groups=groups, max_grad_norm=1.0))
    shares = [1 / math.sqrt(9 + 36), 1 / math.sqrt(9 + 36), 0.5 / 9, 1.0]
    for found, share, slope in zip(moved, shares, Parts().slopes, strict=True):
        torch.testing.assert_close(found, share * slope)


def test_hooks_may_add_gradients_that_are_clipped_with_the_others(tmp_path: Path) -> None:
    """Four times a part's gradient, before clipping: norms 12, 6, 9, 12 instead of 3, 6, 9, 12."""
    made = trainer(tmp_path, max_grad_norm=1.0)
    first = made.unwrapped.parts[0]
    made.hooks.before_clipping = lambda: first.grad.mul_(4.0)
    moved = one_step(made)
    norm = math.sqrt(144 + 36 + 81 + 144)
    for k, slope in enumerate(Parts().slopes):
        torch.testing.assert_close(moved[k], (4.0 if k == 0 else 1.0) * slope / norm)


def test_every_group_has_its_rate_times_the_schedule(tmp_path: Path) -> None:
    def groups(model: Parts) -> list[dict[str, Any]]:
        return [{"params": [p], "lr": 0.1 * (k + 1)} for k, p in enumerate(model.parts)]

    made = trainer(tmp_path, groups=groups, max_grad_norm=0.0, schedule=lambda k: [0.5, 0.25][k])
    one_step(made)
    moved = one_step(made)  # from the start, after two steps
    for k, slope in enumerate(Parts().slopes):
        torch.testing.assert_close(moved[k], 0.75 * 0.1 * (k + 1) * slope)


def test_a_step_counts_its_tokens_and_the_mean_loss_of_its_rows(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.collate = lambda batch: {"rows": torch.full((len(batch.rows),), float(len(batch.rows)))}
    made.loss = lambda output, arguments: output.loss + arguments["rows"].mean()
    one_step(made)
    assert float(made.pending_losses[0]) == 0.25 * 1 + 0.75 * 3
    assert (made.progress.step, made.progress.tokens) == (1, 4)
    one_step(made)
    assert (made.progress.step, made.progress.tokens) == (2, 8)


def test_dropout_is_drawn_anew_for_every_step_and_process() -> None:
    def drawn(*where: int) -> float:
        torch.rand(sum(where))  # the history of the generator does not matter
        return float(over_samples(lambda: torch.rand(()), None, *where))

    places = [(seed, step, process) for seed in (7, 8) for step in (0, 1) for process in (0, 1)]
    first = [drawn(*where) for where in places]
    assert len(set(first)) == len(places) and first == [drawn(*where) for where in places]


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_label_smoothing(share: float) -> None:
    """(1 - ε)·(-log p_y) + ε·mean of -log p over all classes."""
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    logs = -log_softmax(logits, 1)
    expected = (1 - share) * logs[range(5), labels] + share * logs.mean(1)
    found = smoothed_loss(share)(SimpleNamespace(logits=logits), {"labels": labels})
    torch.testing.assert_close(found, expected.mean())


def test_label_smoothing_of_a_run(tmp_path: Path) -> None:
    """Spread evenly in full, labels say nothing; at less, the others' labels are worse or better.

    With two classes and share ε the loss is (1 - ε/2)·L + ε/2·L', of labels and the others.
    """
    bert = tiny_bert(tmp_path / "b", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pair_task(tmp_path / "data" / "mrpc", {"train": 15, "validation": 4})
    words = f"--task_name mrpc --model_name_or_path {bert} --learning_rate 0 --max_length 40 "
    words += "--num_train_epochs 1 --base_dtype float32 --no_cache --disable_tqdm"

    def loss(share: float, flipped: bool = False) -> float:
        out = tmp_path / f"run-{share}-{flipped}"
        data = tmp_path / ("flipped" if flipped else "data")
        more = ["--data_dir", str(data), "--output_dir", str(out)]
        more += ["--label_smoothing_factor", str(share)]
        assert program.run_main(main, [*words.split(), *more]) == 0
        return lines(out / "metrics.jsonl")[-1]["train_loss"]

    for split in ("train", "validation"):
        rows = lines(tmp_path / "data" / "mrpc" / f"{split}.jsonl")
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["label"] = [1 - label for label in columns["label"]]
        write_table(tmp_path / "flipped" / "mrpc" / f"{split}.jsonl", columns)
    plain, other = loss(0.0), loss(0.0, flipped=True)
    assert plain != pytest.approx(other, abs=1e-4)
    for share in (0.4, 1.0):
        expected = (1 - share / 2) * plain + share / 2 * other
        assert loss(share) == pytest.approx(expected, abs=1e-6)


def test_scores_are_not_smoothed(tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    for split in ("train", "validation"):
        columns = {"sentence1": ["bado"] * 4, "sentence2": ["eno"] * 4, "label": [0.0, 1.25, 2, 5]}
        write_table(tmp_path / "data" / "STS-B" / f"{split}.csv", columns)
    words = f"--task_name stsb --model_name_or_path {bert} --data_dir {tmp_path / 'data'} "
    words += "--max_length 40 --base_dtype float32 --no_cache --max_train_steps 1"
    losses = []
    for share in ("0", "0.3"):
        more = ["--label_smoothing_factor", share, "--output_dir", str(tmp_path / share)]
        assert program.run_main(main, [*words.split(), *more]) == 0
        losses.append(lines(tmp_path / share / "metrics.jsonl")[-1]["train_loss"])
    assert losses[0] == losses[1]


# --- between steps -------------------------------------------------------------------------------


def evaluated(folder: Path, **options: Any) -> list[int]:
    made = trainer(folder, scores=[0.5] * 99, **options)
    made.train()
    return [row["step"] for row in made.folder.read_lines("metrics.jsonl")]


def test_when_a_run_is_evaluated(tmp_path: Path) -> None:
    """Three epochs of four steps."""
    assert evaluated(tmp_path / "a", eval_strategy="epoch") == [4, 8, 12]
    assert evaluated(tmp_path / "b", eval_strategy="no") == []
    steps = {"eval_strategy": "steps", "eval_steps": 3}
    assert evaluated(tmp_path / "c", **steps) == [3, 6, 9, 12]
    assert evaluated(tmp_path / "d", eval_steps=3, eval_strategy="epoch") == [3, 4, 6, 8, 9, 12]
    assert evaluated(tmp_path / "e", do_eval=False, eval_strategy="epoch") == []
    every = {"eval_strategy": "steps", "eval_steps": 1}
    assert evaluated(tmp_path / "f", **every, eval_after_epochs=0) == list(range(1, 13))
    assert evaluated(tmp_path / "g", **every, eval_after_epochs=1) == list(range(5, 13))
    assert evaluated(tmp_path / "h", **every, eval_after_epochs=2) == list(range(9, 13))
    assert evaluated(tmp_path / "i", **every, eval_after_epochs=9) == [12]  # the end in any case


def saved(folder: Path, **options: Any) -> list[int]:
    made = trainer(folder, save_total_limit=0, **options)
    made.train()
    return [int(path.name.split("-")[1]) for path in checkpoints.list_checkpoints(folder)]


def test_when_a_run_is_saved(tmp_path: Path) -> None:
    assert saved(tmp_path / "a", save_strategy="epoch") == [4, 8, 12]
    assert saved(tmp_path / "b", save_steps=5) == [5, 10, 12]
    assert saved(tmp_path / "c", save_strategy="no") == []
    best = {"eval_strategy": "steps", "eval_steps": 3, "scores": [0.1, 0.3, 0.2, 0.3]}
    assert saved(tmp_path / "d", save_steps=5, **best) == [3, 5, 6, 10, 12]


def test_a_run_that_stops_early_is_saved_there(tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    assert saved(tmp_path, save_strategy="epoch", scores=[0.9, 0.1, 0.1], **every) == [1, 3]


def test_patience_and_the_better_of_two(tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    for metric, scores, best, last in (
        ("eval_x", [0.2, 0.1, 0.4, 0.4, 0.3, 0.9], 3, 5),  # equal is no better
        ("eval_x", [0.4, 0.3, 0.4], 1, 3),
    ):
        made = trainer(tmp_path / f"{best}{last}", scores=scores, metric=metric, **every)
        made.train()
        assert (made.progress.best_step, made.progress.step) == (best, last)
        assert made.progress.stopped
    made = trainer(tmp_path / "loss", scores=[])
    made.main_metric, made.progress.best = "eval_loss", 0.4
    assert made._is_better(0.3) and not made._is_better(0.4) and not made._is_better(0.5)
    made.main_metric = "eval_x"
    assert made._is_better(0.5) and not made._is_better(0.4) and not made._is_better(0.3)


def test_before_its_final_form_an_adapter_is_neither_best_nor_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    made = trainer(tmp_path, scores=[0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1], **every)
    final = property(lambda hooks: made.progress.step > 4)
    monkeypatch.setattr(type(made.hooks), "finished", final)
    made.train()
    assert (made.progress.best_step, made.progress.best, made.progress.step) == (5, 0.3, 7)


def test_the_log_has_means_of_the_steps_since_its_last_line(tmp_path: Path) -> None:
    made = trainer(tmp_path, logging_steps=3, max_grad_norm=0.0, epochs=2, schedule=lambda k: k / 8)
    made.train()
    rows = made.folder.read_lines("log.jsonl")
    square, losses, weight = 9.0 * 30, [], 0.0  # loss = -(how far) · Σ‖slope‖²
    for k in range(8):
        losses.append(-weight * square)
        weight += k / 8
    assert [row["step"] for row in rows] == [3, 6]
    assert [row["loss"] for row in rows] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:6]) / 3]
    )
    assert [row["learning_rate"] for row in rows] == [2 / 8, 5 / 8]  # of the step just taken
    assert [row["epoch"] for row in rows] == [0.75, 1.5]


# --- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_have_the_buffers_that_a_state_dict_has(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="epoch")
    made.train()
    content = checkpoints.read_state(tmp_path / "checkpoint-8" / checkpoints.STATE)
    assert content["weights"].keys() == {*(f"parts.{k}" for k in range(4)), "seen"}
    assert content["weights"]["seen"] == 16  # two passes a step
    other = trainer(tmp_path / "other")
    other.resume(tmp_path / "checkpoint-8")
    assert other.unwrapped.seen == 16 and other.progress.step == 8
    torch.testing.assert_close(list(other.unwrapped.parts), content_of(content))
    other.train()
    assert other.unwrapped.seen == made.unwrapped.seen == 24
    torch.testing.assert_close(list(other.unwrapped.parts), list(made.unwrapped.parts))


def test_sums_of_all_processes_go_on_in_one(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="epoch", save_total_limit=0)
    made.train()
    sums = ("tokens", "loss_sum", "log_sum")
    for main_process in (True, False):
        other = trainer(tmp_path / "other")
        other.accelerator = SimpleNamespace(
            num_processes=1, is_main_process=main_process, scaler=None
        )
        other.resume(tmp_path / "checkpoint-8")
        found = [getattr(other.progress, name) for name in sums]
        assert all(found) if main_process else not any(found)
        assert other.progress.step == other.progress.loss_steps == 8


def content_of(content: dict[str, Any]) -> list[Tensor]:
    return [content["weights"][f"parts.{k}"] for k in range(4)]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_the_best_weights_come_back_with_their_buffers(tmp_path: Path, strategy: str) -> None:
    made = trainer(
        tmp_path, scores=[0.1, 0.9, 0.5], eval_strategy="epoch",
        **({"save_steps": 1, "save_total_limit": 1} if strategy == "steps" else {}),
    )  # fmt: skip
    made.train()
    assert made.unwrapped.seen == 24
    made.load_best()
    assert made.unwrapped.seen == 16 and made.progress.best_step == 8
    kept = trainer(tmp_path / "kept", scores=[0.1, 0.9, 0.5], load_best_model_at_end=False)
    kept.progress.best_step = 8
    kept.load_best()
    assert kept.unwrapped.seen == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="epoch", save_total_limit=0)
    made.train()
    with pytest.raises(RunError, match="total_steps 12, now 8"):
        trainer(tmp_path / "a", epochs=2).resume(tmp_path / "checkpoint-4")
    other = Parts()
    other.register_buffer("more", torch.zeros(()))
    with pytest.raises(RunError, match="another model: more"):
        trainer(tmp_path / "b", model=other).resume(tmp_path / "checkpoint-4")
    reading = trainer(tmp_path / "c")
    reading.read = {"texts": "x", "labels": "y"}
    reading.resume(tmp_path / "checkpoint-4")  # which has no keys
    reading.save()
    reading.read = {"texts": "z", "labels": "y", "more": "w"}
    with pytest.raises(RunError, match=r"changed since: texts\."):
        reading.resume(tmp_path / "c" / "checkpoint-4")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.unwrapped.seen.fill_(math.inf)
    with pytest.raises(Diverged, match="not finite"):
        made.save()
    assert checkpoints.list_checkpoints(tmp_path) == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-11.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-9", "checkpoint-10"]
    checkpoints.prune(tmp_path, 0, None)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 4
    checkpoints.prune(tmp_path, 2, "checkpoint-1")
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-1", "checkpoint-9", "checkpoint-10"]
    checkpoints.prune(tmp_path, 1, "checkpoint-1")
    assert (tmp_path / "checkpoint-best").is_dir() and (tmp_path / "checkpoint-11.tmp").is_dir()


def test_lines_after_the_step_a_run_goes_on_from_are_dropped(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="epoch", logging_steps=1, epochs=2)
    made.train()
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "cut sho')
    made.folder.open(0, "cpu", 4)
    assert [row["step"] for row in made.folder.read_lines("log.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4


def test_figures_of_a_run(tmp_path: Path) -> None:
    """Steps, epochs and the best of them, of a run of 2.5 epochs of 3 steps."""
    bert = tiny_bert(tmp_path / "bert")
    pair_task(tmp_path / "mrpc", {"train": 24, "validation": 8})
    words = f"--task_name mrpc --model_name_or_path {bert} --data_dir {tmp_path} --max_length 40 "
    words += f"--num_train_epochs 2.5 --base_dtype float32 --no_cache --output_dir {tmp_path / 'r'}"
    assert program.run_main(main, [*words.split(), "--learning_rate", "0"]) == 0
    found = results(tmp_path / "r")
    assert (found["steps"], found["epochs"], found["best_step"]) == (8, 2.6667, 3)
    assert [row["step"] for row in lines(tmp_path / "r" / "metrics.jsonl")] == [3, 6, 8]


def test_only_the_first_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = tiny_bert(tmp_path / "bert")
    pair_task(tmp_path / "mrpc", {"train": 24, "validation": 8, "test": 6})
    words = f"--task_name mrpc --model_name_or_path {bert} --data_dir {tmp_path} --max_length 40 "
    words += f"--base_dtype float32 --no_cache --output_dir {tmp_path / 'r'} --do_predict "
    words += "--max_train_samples 17 --max_eval_samples 5 --max_predict_samples 3"
    encoded = []
    real = program.TaskData.encode

    def encode(self: program.TaskData, rows: Any, tokenizer: Any) -> Any:
        encoded.append((rows.split, len(rows)))
        return real(self, rows, tokenizer)

    monkeypatch.setattr(program.TaskData, "encode", encode)
    assert program.run_main(main, words.split()) == 0
    assert sorted(encoded) == [("test", 3), ("train", 17), ("validation", 5)]


@pytest.mark.parametrize(("ratio", "warm"), [(0.0, 0), (0.25, 2), (0.26, 3)])
def test_warm_up_of_a_run(tmp_path: Path, ratio: float, warm: int) -> None:
    """The share of all steps is rounded up; 8 steps of rate 1."""
    bert = tiny_bert(tmp_path / "bert")
    pair_task(tmp_path / "mrpc", {"train": 16, "validation": 4})
    words = f"--task_name mrpc --model_name_or_path {bert} --data_dir {tmp_path} --max_length 40 "
    words += f"--base_dtype float32 --no_cache --output_dir {tmp_path / 'r'} --logging_steps 1 "
    words += f"--learning_rate 1e-6 --max_train_steps 8 --warmup_ratio {ratio}"
    assert program.run_main(main, words.split()) == 0
    found = [row["learning_rate"] * 1e6 for row in lines(tmp_path / "r" / "log.jsonl")]
    expected = [k / warm if k < warm else (8 - k) / (8 - warm) for k in range(8)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limit", "total", "processes", "rows"),
    [(8, 32, 1, 8), (8, 12, 1, 6), (5, 12, 2, 3), (64, 32, 1, 32), (4, 7, 1, 1)],
)
def test_rows_at_once_are_as_many_as_divide_the_global_batch(
    limit: int, total: int, processes: int, rows: int
) -> None:
    options = TrainingOptions(
        output_dir="x", per_device_train_batch_size=limit, global_batch_size=total
    )
    assert program.rows_at_once(options, processes) == rows
    assert program.accumulation(options, processes) == total // (rows * processes)
