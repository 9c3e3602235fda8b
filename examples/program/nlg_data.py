"""The splits of a text generation run: read, encoded, scored by likelihood, decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from examples.cli.groups import ModelOptions, TrainingOptions
from examples.cli.nlg import DecodingOptions, NlgOptions
from examples.data import batches as batching
from examples.data.batches import Batch
from examples.data.nlg import Pair, instances, token_ids
from examples.data.nlg_splits import (
    EncodedTexts,
    FoundRows,
    collate_texts,
    cut,
    encode_rows,
    find_split,
    given_answers,
    read_own,
    texts_of,
    with_answers,
)
from examples.data.tasks.nlg import NLG_TASKS, NlgTask, nlg_task
from examples.errors import OptionError, as_user_error
from examples.evaluation.decoding import Contexts
from examples.evaluation.nlg import score
from examples.evaluation.prediction import Collate, EvaluationSet, by_variant, predict
from examples.methods.source import ModelSource
from examples.program.task_data import TaskData
from examples.training.distillation import Tokens
from examples.training.run_folder import SUBMISSION
from transformers_patched import AutoConfig

if TYPE_CHECKING:
    from examples.program.run import Run

LIKELIHOOD = "likelihood_accuracy"  # of the known answers, the likeliest is the right one
SMALLER = ("TER",)  # metrics that are the better the smaller, so they choose no weights


class NlgData(TaskData):
    """Reads, encodes and batches pairs of a context and its completion.

    The loss of an optimiser step is the mean over its scored tokens. Evaluations score completions
    by their likelihood, and decode as many contexts as `--eval_generate` says; `predict` decodes
    all of a test split.

    Args:
        options: the data options.
        decoding: how texts are generated.
        model: whose vocabulary and positions the data must fit.
        training: the training options.
        processes: how many share the work.
        process: this one's number.

    Raises:
        OptionError: options that do not go together.
    """

    options: NlgOptions
    task: NlgTask

    def __init__(
        self,
        options: NlgOptions,
        decoding: DecodingOptions,
        model: ModelOptions,
        training: TrainingOptions,
        *,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.decoding = decoding
        where = {"revision": model.revision, "local_files_only": model.local_files_only}
        self.config = as_user_error(AutoConfig.from_pretrained, model.model_name_or_path, **where)
        super().__init__(options, training, processes, process)
        self._check()
        self.tokenizer: Any = None  # the run's, once something is encoded

    def _find_task(self) -> NlgTask:  # type: ignore[override]
        o = self.options
        if o.task_name is not None:
            task = as_user_error(nlg_task, o.task_name)
        else:
            task = NlgTask("text", ".jsonl", (), o.metrics or "e2e")
        metrics = o.metrics or task.metrics
        same = next(known for known in NLG_TASKS.values() if known.metrics == metrics)
        return replace(task, metrics=metrics, answers=same.answers)

    def _check(self) -> None:
        o, d, training = self.options, self.decoding, self.training
        positions = getattr(self.config, "n_positions", None)
        if positions is None:
            raise OptionError(
                f"--model_name_or_path: a {self.config.model_type} is no GPT-2, which continues "
                "texts"
            )
        if o.max_length > positions:
            raise OptionError(
                f"--max_length {o.max_length} is more than the {positions} positions of this model"
            )
        decodes = training.do_predict or d.eval_generate
        if decodes and d.max_new_tokens >= o.max_length:
            raise OptionError(
                f"--max_new_tokens {d.max_new_tokens} leaves no token of --max_length "
                f"{o.max_length} to the context"
            )
        if training.calibration:
            raise OptionError("--calibration: texts have no classes; leave it out")
        if training.lr_scheduler_type == "constant" and training.num_warmup_steps:
            raise OptionError(
                "--lr_scheduler_type constant has no warm-up: constant_with_warmup is the original "
                "recipe's constant"
            )
        if decodes:  # better now than after the training
            as_user_error(score, self.task.metrics, ["a b"], [["a b"]], java=False)

    @cached_property
    def distilled(self) -> Tokens:  # type: ignore[override]
        """The next tokens at scored places."""
        return Tokens(self.options.obj, self.config.vocab_size)

    # -- reading and batching -------------------------------------------------------------------

    @property
    def evaluated(self) -> dict[str, str]:
        return {"valid": ""} if self.training.do_eval else {}

    @property
    def tests(self) -> tuple[str, ...]:
        return ("test",) if self.training.do_predict else ()

    def read(self, split: str, most: int | None) -> FoundRows:  # type: ignore[override]
        """Reads a split and keeps its first `most` rows; of a test split, contexts."""
        o = self.options
        if o.task_name is not None:
            rows = find_split(self.task, o.data_dir, split)
        else:
            files = {"train": o.train_file, "valid": o.validation_file, "test": o.test_file}
            if files[split] is None:
                name = "validation" if split == "valid" else split
                more = "; --no_do_eval trains without" if split == "valid" else ""
                raise OptionError(f"--{name}_file is needed{more}")
            rows = read_own(Path(files[split]).expanduser())
        return replace(rows, most=most, by_context=split in self.tests)

    def encode(self, rows: FoundRows, tokenizer: Any) -> EncodedTexts:  # type: ignore[override]
        """Token ids of the rows, cut to `max_length`."""
        self.tokenizer = tokenizer
        limits = {"vocab_size": self.config.vocab_size, "max_length": self.options.max_length}
        split = as_user_error(encode_rows, rows, tokenizer, **limits)
        if split.shortened and self.share["process"] == 0:
            print(
                f"{rows.source}: {split.shortened:,} of {len(split):,} rows are longer than "
                f"{self.options.max_length} tokens and lose the beginning of their context"
            )
        return split

    def collate(self, split: EncodedTexts) -> Collate:  # type: ignore[override]
        """batch -> arguments of the model, to train on."""
        smoothing = self.training.label_smoothing_factor
        more = {"label_smoothing": smoothing} if smoothing else {}
        return self._collate(split, objective=self.options.obj, **more)

    def _collate(self, split: EncodedTexts, **more: Any) -> Collate:
        o = self.options
        width = o.max_length if o.pad_to_max_length else None
        return partial(collate_texts, split, packed=o.packing, width=width, multiple=8, **more)

    def counts(self, split: EncodedTexts) -> np.ndarray:  # type: ignore[override]
        return split.counts(self.options.obj)

    # -- evaluation -----------------------------------------------------------------------------

    @property
    def main_metric(self) -> str:
        """What chooses the best weights: the loss unless another is asked for.

        Raises:
            OptionError: there is no such metric.
        """
        chosen = self.training.metric_for_best_model
        metric = (chosen or (LIKELIHOOD if self.task.answers else "loss")).removeprefix("eval_")
        known = ["loss", *([LIKELIHOOD] if self.task.answers else [])]
        if self.decoding.eval_generate:
            found, _ = score(self.task.metrics, ["a b"], [["a b"]], java=False)
            known += [name for name in found if name not in SMALLER]
        if metric not in known and self.training.do_eval:
            more = "" if self.decoding.eval_generate else "; --eval_generate N adds those of texts"
            raise OptionError(
                f"--metric_for_best_model {metric}: {self.task.name} has {', '.join(known)}{more}"
            )
        return f"eval_{metric}"

    def evaluation_set(self, name: str, split: EncodedTexts) -> EvaluationSet:  # type: ignore
        """A split whose completions, or known answers, are scored by their likelihood."""
        answers = [ids for _, ids in token_ids(self._answer_pairs, self.tokenizer)]
        right = given_answers(split, answers) if answers else None
        scored = split
        if answers:
            scored = cut(with_answers(split, answers), self.options.max_length, split.pad_id)

        def batches(copies: int) -> list[Batch]:
            most = self.training.per_device_eval_batch_size
            return batching.evaluation_batches(scored, max(1, most // copies), **self.share)

        return EvaluationSet(
            name,
            len(scored),
            batches,
            self._collate(scored, score_sequences=True),
            score=partial(likelihoods, tokens=scored.counts("clm"), right=right),
            generate=self._generate(split),
        )

    @property
    def _answer_pairs(self) -> list[Pair]:
        return [Pair("", answer) for answer in self.task.answers]

    def contexts(self, split: EncodedTexts, most: int | None = None) -> Contexts:
        """The first `most` distinct contexts of a split, to be continued; None: all."""
        d = self.decoding
        found = instances(texts_of(split, self.tokenizer))[:most]
        room = self.options.max_length - d.max_new_tokens
        search = {
            "max_new_tokens": d.max_new_tokens,
            "num_beams": d.num_beams,
            "length_penalty": d.length_penalty,
            "no_repeat_ngram_size": d.no_repeat_ngram_size,
            "repetition_penalty": d.repetition_penalty,
            "min_new_tokens": d.min_new_tokens,
            "eos_token_id": [self.tokenizer.eos_token_id, *map(int, d.eos_token_id)],
            "rules": d.decoding_rules,
            "batch_size": d.decode_batch_size,
        }
        ids = [split.whole.context(instance.rows[0])[-room:] for instance in found]
        return Contexts(found, ids, self.task.metrics, self.tokenizer, search)

    def _generate(self, split: EncodedTexts) -> Callable[..., dict[str, float]] | None:
        """What `--eval_generate` adds to an evaluation."""
        if not self.decoding.eval_generate:
            return None
        contexts = self.contexts(split, self.decoding.eval_generate)

        def generate(model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
            return contexts.score(contexts.decode(model, accelerator), java=False)[0]

        return generate

    # -- prediction -----------------------------------------------------------------------------

    def predict(self, run: Run, split: str, encoded: EncodedTexts) -> dict[str, float]:
        """Decodes all contexts of a test split at every variant, writes and scores the texts."""
        where = run.accelerator, run.trainer.predictor, True
        contexts, model = self.contexts(encoded), run.trainer.unwrapped
        decoded = by_variant(model, as_told(contexts.decode), *where)
        found: dict[str, dict[str, float]] = {variant: {} for variant in decoded}
        if self.task.answers:
            data = self.evaluation_set(split, encoded)
            for variant, prediction in predict(model, data, *where).items():
                value = data.score(prediction.logits)[LIKELIHOOD]
                found.setdefault(variant, {})[LIKELIHOOD] = value
        if not run.accelerator.is_main_process:
            return {}
        scored: dict[int, dict[str, float]] = {}  # the plain texts come twice
        notes: list[str] = []
        for variant, texts in decoded.items():
            folder = run.folder.path / SUBMISSION / variant
            path = contexts.write(folder, split, texts)
            print(f"predictions of {split}{f' at {variant}' if variant else ''}: {path}")
            if id(texts) not in scored:
                scored[id(texts)], notes = contexts.score(texts)
            found[variant] |= scored[id(texts)]
            content = json.dumps(found[variant], indent=2) + "\n"
            (folder / f"{split}_metrics.json").write_text(content, encoding="utf-8")
        for note in notes:
            print(note)
        return {
            "_".join(filter(None, (split, variant, name))): value
            for variant, values in found.items()
            for name, value in values.items()
        }


def likelihoods(
    logits: np.ndarray, *, tokens: np.ndarray, right: np.ndarray | None
) -> dict[str, float]:
    """Loss per token and perplexity of completions; how often the right answer is the likeliest.

    Args:
        logits: (n, 1) log p of every completion; with k answers (n·k, 1), those of a row together.
        tokens: as many scored tokens.
        right: (n,) which answer is the right one, None where completions are no known answers.

    Raises:
        ValueError: a log p is not finite.
    """
    found = logits[:, 0].astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError("the log-probabilities of completions are not finite")
    metrics = {}
    if right is not None:
        rows = np.arange(len(right))
        found, tokens = found.reshape(len(right), -1), tokens.reshape(len(right), -1)
        metrics[LIKELIHOOD] = float((found.argmax(1) == right).mean())
        found, tokens = found[rows, right], tokens[rows, right]
    loss = -float(found.sum()) / float(tokens.sum())
    return {"loss": loss, "perplexity": float(np.exp(loss)), **metrics}


def as_told(decode: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """What a model cannot decode is an error that the user can mend."""
    return partial(as_user_error, decode)


def language_model(options: ModelOptions, dropout: float) -> ModelSource:
    """Where a run gets its language model from, with that dropout in its own layers."""
    return ModelSource(
        options.model_name_or_path,
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        options.base_dtype,
        {
            "revision": options.revision,
            "local_files_only": options.local_files_only,
            "ignore_mismatched_sizes": options.ignore_mismatched_sizes,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout),
        },
    )
