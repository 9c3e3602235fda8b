"""The splits of a run on questions about paragraphs: read, cut into windows, answered, scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.cli.groups import ModelOptions, TrainingOptions
from examples.cli.squad import SquadOptions
from examples.data.batches import Batch
from examples.data.squad import SquadSplit, find_squad, has_squad, read_squad, read_squad_hub
from examples.data.squad_features import SquadFeatures, featurise
from examples.data.tasks import Task
from examples.data.tasks.squad import squad_task
from examples.errors import OptionError, as_user_error
from examples.evaluation.prediction import Collate, EvaluationSet, Prediction
from examples.evaluation.squad import METRICS, Scorer
from examples.evaluation.squad_answers import Answers, Decoding, decode, write_answers
from examples.methods.source import ModelSource
from examples.program.task_data import TaskData
from examples.training.distillation import Spans
from examples.training.run_folder import SUBMISSION


class SquadData(TaskData):
    """Reads, encodes and batches questions; a row of a batch is a window of a paragraph.

    At the end of a run the answers to the validation split are written too, not only those to a
    test file, into the folder `submission/validation`.
    """

    options: SquadOptions
    distilled = Spans()  # type: ignore[assignment]

    def _find_task(self) -> Task:
        """SQuAD 1.1 or 2.0, or a task of the same kind."""
        o = self.options
        self.squad = None if o.task_name is None else as_user_error(squad_task, o.task_name)
        self.unanswerable = o.version_2_with_negative
        if self.squad is not None:
            self.unanswerable = self.unanswerable or self.squad.unanswerable
        self.how = Decoding(
            o.n_best_size, o.max_answer_length, self.unanswerable, o.null_score_diff_threshold
        )
        self.answering: dict[str, Answering] = {}  # name of an evaluation set -> its answers
        if o.do_lower_case is not None:
            self.tokenizer_options = {"do_lower_case": o.do_lower_case}
        name = "squad_v2" if self.unanswerable else "squad"
        return Task(name, ("question", "context"), (), METRICS, "f1", submission={})

    def read(self, split: str, most: int | None) -> SquadSplit:  # type: ignore[override]
        """Reads a split and keeps its first `most` questions."""
        rows = self._read(split)
        return rows.take(range(most)) if most is not None and most < len(rows) else rows

    def _read(self, split: str) -> SquadSplit:
        o = self.options
        labelled = split != "test"
        if o.dataset_name is not None:
            return read_squad_hub(
                o.dataset_name, o.dataset_config_name, split,
                unanswerable=self.unanswerable, labelled=labelled,
            )  # fmt: skip
        own = {"train": o.train_file, "validation": o.validation_file, "test": o.test_file}[split]
        if self.squad is None and own is None:
            raise OptionError(f"--{split}_file is needed")
        if self.squad is not None and o.data_dir is None:
            return read_squad_hub(
                self.squad.hub, None, split, unanswerable=self.unanswerable, labelled=labelled
            )
        path = Path(own).expanduser() if own is not None else None
        if path is None:
            path = find_squad(self.squad, Path(o.data_dir).expanduser(), split)  # type: ignore
        elif not path.exists() and o.data_dir is not None:
            path = Path(o.data_dir).expanduser() / path
        return read_squad(path, unanswerable=self.unanswerable, labelled=labelled)

    @property
    def tests(self) -> tuple[str, ...]:
        """The questions to answer, where there is such a file: SQuAD's own are not published."""
        o = self.options
        there = o.test_file is not None
        if self.squad is not None and o.data_dir is not None:
            there = has_squad(self.squad, Path(o.data_dir).expanduser(), "test")
        return ("test",) if self.training.do_predict and there else ()

    def encode(self, rows: SquadSplit, tokenizer: Any) -> SquadFeatures:  # type: ignore[override]
        """The windows of the rows, from the cache where they are there."""
        o = self.options
        return as_user_error(
            featurise,
            rows,
            tokenizer,
            max_length=o.max_length,
            doc_stride=o.doc_stride,
            max_query_length=o.max_query_length,
            cache_dir=o.cache_dir,
            cache=o.cache,
        )

    def collate(self, split: SquadFeatures) -> Collate:  # type: ignore[override]
        """batch -> arguments of the model, with the answers' positions where they are known."""
        inputs = super().collate(split)
        if split.raw.answers is None:
            return inputs

        def with_positions(batch: Batch) -> dict[str, Any]:
            start, end = torch.from_numpy(split.spans[batch.rows]).unbind(1)
            return {**inputs(batch), "start_positions": start, "end_positions": end}

        return with_positions

    def evaluation_set(self, name: str, split: SquadFeatures) -> EvaluationSet:  # type: ignore
        """A split to answer; scored where its answers are known."""
        answering = self.answering[name] = Answering(split, self.how)
        training = self.training
        writes = training.do_train or training.do_predict  # else no folder is the run's
        return EvaluationSet(
            name,
            len(split),
            self.evaluation_batches(split),
            self.collate(split),
            score=answering.score,
            shape=(2, int(split.lengths.max())),
            report=self._report if writes and name not in self.tests else None,
        )

    def _report(self, variant: str, prediction: Prediction) -> None:
        """Writes the answers to the validation split."""
        folder = Path(self.training.output_dir).expanduser() / SUBMISSION / variant
        path = self.answering[""].write(folder / "validation", prediction.logits)
        print(f"answers to validation{f' at {variant}' if variant else ''}: {path}")

    def write(self, folder: Path, split: str, rows: SquadSplit, prediction: Prediction) -> Path:
        """Writes the answers to a test file; see `examples.program.run.WritePredictions`."""
        return self.answering[split].write(folder / split, prediction.logits)


class Answering:
    """Logits to answers, their metrics and files.

    Args:
        features: m, of all questions of a split.
        how: the options.
    """

    def __init__(self, features: SquadFeatures, how: Decoding) -> None:
        self.features, self.how = features, how
        self.scorer = None if features.raw.answers is None else Scorer(features.raw)
        self._last: tuple[np.ndarray, Answers] | None = None

    def answers(self, logits: np.ndarray) -> Answers:
        """Of (m, 2, L) logits; those that are scored are often written right after."""
        if self._last is None or self._last[0] is not logits:
            self._last = logits, decode(self.features, logits, self.how)
        return self._last[1]

    def score(self, logits: np.ndarray) -> dict[str, float]:
        """The metrics; with "no answer" allowed, what the best threshold would give too."""
        assert self.scorer is not None
        answers = self.answers(logits)
        metrics = self.scorer.score(answers.texts)
        if answers.null_odds is not None:
            best = self.scorer.score(answers.best, answers.null_odds)
            metrics |= {name: value for name, value in best.items() if name.startswith("best_")}
        return {name: value for name, value in metrics.items() if not name.endswith("total")}

    def write(self, folder: Path, logits: np.ndarray) -> Path:
        """Writes the official files; the path of the predictions."""
        return write_answers(folder, self.features.raw, self.answers(logits))


def span_model(options: ModelOptions) -> ModelSource:
    """Where a run gets its model from, which marks the answer's first and last token."""
    arguments = {
        "revision": options.revision,
        "local_files_only": options.local_files_only,
        "ignore_mismatched_sizes": options.ignore_mismatched_sizes,
    }
    return ModelSource(
        options.model_name_or_path,
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
        options.base_dtype,
        arguments,
    )


def check_loss(training: TrainingOptions) -> None:
    """Refuses options of a loss that spans do not have."""
    if training.label_smoothing_factor:
        raise OptionError("--label_smoothing_factor: spans have no smoothed labels; leave it out")
    if training.calibration:
        raise OptionError("--calibration: spans have no classes; leave it out")
