"""Fine-tunes a model on a GLUE task, the embedded task, or files of one's own.

    python -m examples.run_glue --task_name mrpc --model_name_or_path DIR --data_dir DIR \\
        --output_dir DIR --method lora
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli.fields import OptionError
from examples.cli.groups import DataOptions, ModelOptions, TrainingOptions
from examples.program import main as program

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from examples.data.batches import Batch
    from examples.data.encode import EncodedSplit
    from examples.data.readers import RawSplit
    from examples.data.tasks import Task
    from examples.evaluation.prediction import EvaluationSet

SUMMARY = "Fine-tunes a pretrained model on a GLUE task, or on sentence files of your own."
OWNERS = {"model": ModelOptions, "data": DataOptions, "training": TrainingOptions}


class Data:
    """Reads, encodes and batches the splits of one run.

    Args:
        options: the data options.
        training: the training options.
        processes: how many share the work.
        process: this one's number.
    """

    def __init__(
        self, options: DataOptions, training: TrainingOptions, processes: int, process: int
    ) -> None:
        self.options, self.training = options, training
        self.share = {"processes": processes, "process": process}
        self.task = self._task()

    def _task(self) -> Task:
        """The task; columns and labels of one's own data come from its training split."""
        from examples.data.tasks import CUSTOM, get_task

        if self.options.task_name is not None:
            return program.put_together(get_task, self.options.task_name)
        self.task = CUSTOM
        if self.options.dataset_name is None and self.options.train_file is None:
            raise OptionError("--train_file is needed: it says the columns and the labels")
        return self.rows("train").task

    def rows(self, split: str) -> RawSplit:
        """Reads a split from wherever the options say."""
        from examples.data.readers import read_file, read_hub, read_split

        o = self.options
        if o.task_name is not None:
            return read_split(self.task, o.data_dir, split)
        if o.dataset_name is not None:
            return read_hub(self.task, o.dataset_name, o.dataset_config_name, split)
        path = {"train": o.train_file, "validation": o.validation_file, "test": o.test_file}[split]
        if path is None:
            raise OptionError(f"--{split}_file is needed")
        return read_file(self.task, path, split)

    def read(self, split: str, most: int | None) -> RawSplit:
        """Reads a split and keeps its first rows."""
        rows = self.rows(split)
        return rows.take(range(most)) if most is not None and most < len(rows) else rows

    def encode(self, rows: RawSplit, tokenizer: Any) -> EncodedSplit:
        """Token ids of the rows, from the cache where they are there."""
        from examples.data.encode import encode

        o = self.options
        return program.put_together(
            encode, rows, tokenizer, o.max_length, cache_dir=o.cache_dir, cache=o.cache
        )

    def collate(self, split: EncodedSplit) -> Any:
        """batch -> arguments of the model, padded or packed as the options say."""
        from examples.data.batches import collate

        o = self.options
        return partial(
            collate,
            split,
            packed=o.packing,
            width=o.max_length if o.pad_to_max_length else None,
            multiple=8,
        )

    def training_batches(self, split: EncodedSplit) -> Any:
        """The global batches of every epoch."""
        from examples.data.batches import TrainingBatches

        processes = self.share["processes"]
        return program.put_together(
            TrainingBatches,
            split,
            program.rows_at_once(self.training, processes),
            accumulation=program.accumulation(self.training, processes),
            seed=self.training.seed,
            order=self.options.order,
            max_tokens=self.options.max_tokens,
            **self.share,
        )

    def evaluation_set(self, name: str, split: EncodedSplit) -> EvaluationSet:
        """A split to predict; scored where it has labels."""
        from examples.data.batches import evaluation_batches
        from examples.evaluation.calibration import calibration
        from examples.evaluation.glue import compute
        from examples.evaluation.prediction import EvaluationSet

        def batches(copies: int) -> list[Batch]:
            most = self.training.per_device_eval_batch_size
            return evaluation_batches(split, max(1, most // copies), **self.share)

        task, labels = self.task, split.labels
        return EvaluationSet(
            name,
            len(split),
            batches,
            self.collate(split),
            score=lambda logits: compute(task, logits, labels),
            calibration=None if task.regression else lambda logits: calibration(logits, labels),
        )


def metric_prefix(name: str) -> str:
    """`validation` -> "", `validation_matched` -> "matched"."""
    return name.removeprefix("validation").strip("_")


def smoothed_loss(share: float) -> Any:
    """Cross-entropy with `share` of every label spread evenly over all classes."""
    from torch.nn.functional import cross_entropy

    def loss(output: Any, arguments: dict[str, Any]) -> Any:
        return cross_entropy(output.logits.float(), arguments["labels"], label_smoothing=share)

    return loss


def write_submission(path: Path, task: Task, ids: Sequence[Any], logits: np.ndarray) -> None:
    """A file of the GLUE server: `index<tab>prediction`."""
    from examples.evaluation.glue import predict

    lines = ["index\tprediction"]
    for index, value in zip(ids, predict(task, logits).tolist(), strict=True):
        if task.regression:
            low, high = task.label_range or (-float("inf"), float("inf"))
            shown = f"{min(max(value, low), high):.3f}"
        else:
            shown = task.labels[value] if task.submit_names else str(value)
        lines.append(f"{index}\t{shown}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def work(argv: Sequence[str]) -> int:
    """The program."""
    options = program.parse(argv, "examples.run_glue", SUMMARY, OWNERS, "task_name")
    if options is None:
        return 0
    training: TrainingOptions = options[TrainingOptions]
    accelerator = program.make_accelerator(training)
    data = Data(
        options[DataOptions], training, accelerator.num_processes, accelerator.process_index
    )
    evaluated = data.task.evaluation if training.do_eval else {}
    names = [metric_prefix(name) for name in evaluated] or [""]
    metric = training.metric_for_best_model or data.task.main_metric
    metric = metric.removeprefix("eval_")
    known = (*data.task.metrics, "combined_score", "loss")
    if metric not in known and training.do_eval:
        raise OptionError(
            f"--metric_for_best_model {metric}: {data.task.name} has {', '.join(known)}"
        )
    model: ModelOptions = options[ModelOptions]
    run = program.Run(
        options,
        accelerator,
        model_source(model, data.task),
        f"{data.task.name} with {'/'.join(Path(model.model_name_or_path).parts[-2:])}",
        f"eval_{names[0]}_{metric}" if names[0] else f"eval_{metric}",
    )
    _do(run, data, dict(zip(evaluated.values(), names, strict=False)), accelerator)
    return 0


def model_source(options: ModelOptions, task: Task) -> Any:
    """Where a run of `task` gets its model from."""
    from examples.methods.common import ModelSource

    arguments: dict[str, Any] = {
        "revision": options.revision,
        "local_files_only": options.local_files_only,
        "ignore_mismatched_sizes": options.ignore_mismatched_sizes,
    }
    if task.regression:
        arguments |= {"num_labels": 1, "problem_type": "regression"}
    else:
        arguments |= {"id2label": task.id2label, "problem_type": "single_label_classification"}
    return ModelSource(
        options.model_name_or_path,
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        options.base_dtype,
        arguments,
    )


def _do(run: program.Run, data: Data, evaluated: dict[str, str], accelerator: Accelerator) -> None:
    """Reads, trains, evaluates, predicts."""
    from transformers_patched import AutoTokenizer

    o, training = data.options, run.training
    model: ModelOptions = run.options[ModelOptions]
    tokenizer = program.put_together(
        AutoTokenizer.from_pretrained,
        model.tokenizer_name or model.model_name_or_path,
        revision=model.revision,
        local_files_only=model.local_files_only,
    )
    run.tokenizer = tokenizer
    with accelerator.main_process_first():  # one process fills the cache of encoded data
        rows = {s: data.read(s, o.max_eval_samples) for s in evaluated}
        tests = data.task.test_splits if training.do_predict else ()
        rows |= {s: data.read(s, o.max_predict_samples) for s in tests}
        if training.do_train:
            rows["train"] = data.read("train", o.max_train_samples)
        splits = {split: data.encode(r, tokenizer) for split, r in rows.items()}
    sets = [data.evaluation_set(name, splits[split]) for split, name in evaluated.items()]
    smoothing = training.label_smoothing_factor
    loss = smoothed_loss(smoothing) if smoothing and not data.task.regression else None
    train = data.training_batches(splits["train"]) if training.do_train else None
    trainer = run.build(train, data.collate(splits["train"]) if train else None, sets, loss)
    if train is not None:
        run.say(
            f"{data.task.name}: {len(splits['train']):,} training rows, {trainer.total_steps:,} "
            f"steps of {train.global_batch_size} rows"
        )
    figures = run.train() if train is not None else {}
    metrics = trainer.evaluate(final=True) if sets else {}
    for split in tests:
        _predict(run, data, split, rows[split], splits[split])
    run.finish(metrics, figures)


def _predict(
    run: program.Run, data: Data, split: str, rows: RawSplit, encoded: EncodedSplit
) -> None:
    """Writes the predictions of a test split, each variant's into a folder of its own."""
    from examples.evaluation.prediction import predict

    found = data.evaluation_set(split, encoded)
    trainer = run.trainer
    variants = predict(trainer.unwrapped, found, run.accelerator, trainer.predictor, final=True)
    if not run.accelerator.is_main_process:
        return
    name = data.task.submission.get(split, f"{split}.tsv")
    for variant, prediction in variants.items():
        path = run.folder.path / "submission" / variant / name
        write_submission(path, data.task, rows.ids, prediction.logits)
        print(f"predictions of {split}{f' at {variant}' if variant else ''}: {path}")


if __name__ == "__main__":
    sys.exit(program.run_main(work))
