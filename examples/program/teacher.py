"""The teacher of a run: loaded, checked, asked once about every training row.

Its logits are made in batches that depend neither on the epoch nor on the number of processes, and
kept under a hash of all that they depend on: its weights, the tokens, the settings. So they are the
same bits whether they come from the disk or not, and an epoch costs no pass of the teacher. Where
they would be too large for that (states of many tokens), it is asked again for every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from examples.cli.groups import TeacherOptions
from examples.data import batches as batching
from examples.data.batches import Batch, TrainingBatches, on_device
from examples.data.cache import cache_file, load, store
from examples.errors import OptionError
from examples.evaluation.prediction import Collate
from examples.methods.source import ModelSource
from examples.program.task_data import TaskData
from examples.training.distillation import TARGETS, Loss, distilled_loss
from peft_custom import PeftModel
from peft_custom.digest import digest
from peft_custom.save_and_load import AdapterFile, adapter_folder, read_adapter
from transformers_patched import AutoConfig, AutoTokenizer, CheckpointError

VERSION = "2"  # raise it when the same teacher gives other logits
KEPT_BYTES = 1 << 31  # logits of more than this are made anew for every batch
PROBE = "The naïve cat's 3,000 Señoritas re-read “it” – twice; ¿why?"  # encoded by both tokenizers


class Teacher:
    """A trained model, and what it says about the training rows.

    Args:
        options: which, and how much it counts.
        source: where the run gets its own model from, which says head and dtype.
        data: of the run.
        tokenizer: of the run.
        accelerator: of the run.

    Attributes:
        key: of its weights.
        message: one line for people; there once it has taught.

    Raises:
        OptionError: it has other labels or tokens than the run, or none at all.
    """

    def __init__(
        self,
        options: TeacherOptions,
        source: ModelSource,
        data: TaskData,
        tokenizer: Any,
        accelerator: Accelerator,
    ) -> None:
        self.options, self.data, self.accelerator = options, data, accelerator
        self.name = str(options.teacher)
        if data.distilled is None:
            raise OptionError(
                f"--teacher: {data.task.name} is a regression, which has no distribution to learn"
            )
        path, adapter = _find(self.name)
        base = path if adapter is None else str(adapter.config.get("base_model_name_or_path"))
        self._check_labels(base, source, trained=adapter is None)
        self._check_tokens(base, tokenizer)
        self.distilled = data.distilled
        self.model = self._load(base, adapter, source).to(accelerator.device)
        self.key = digest(self.model.state_dict())
        self.message = ""

    def _wrong(self, reason: str) -> OptionError:
        return OptionError(f"--teacher {self.name}: {reason}")

    def _asked(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `do` returns; what it finds wrong is the teacher's fault."""
        try:
            return do(*args, **kwargs)
        except (ValueError, NotImplementedError, OSError, CheckpointError) as error:
            raise self._wrong(str(error)) from error

    def _check_labels(self, base: str, source: ModelSource, trained: bool) -> None:
        """Of a model with a head of its own; names in another order are put in the run's order."""
        labels = source.arguments.get("id2label")
        if labels is None or not trained:
            return
        theirs = self._asked(AutoConfig.from_pretrained, base).id2label
        names = [str(theirs[i]) for i in sorted(theirs)]
        ours = list(labels.values())
        unnamed = names == [f"LABEL_{i}" for i in range(len(ours))]
        if not unnamed and sorted(map(str.casefold, names)) != sorted(map(str.casefold, ours)):
            raise self._wrong(
                f"its labels are {', '.join(names)}, but {self.data.task.name} has "
                f"{', '.join(ours)}: it was trained on another task"
            )

    def _check_tokens(self, base: str, tokenizer: Any) -> None:
        """The teacher gets the run's token ids, so both must have the same tokens."""
        own = self._asked(AutoTokenizer.from_pretrained, base)
        length = self.data.options.max_length
        if own.model_max_length < length:
            raise self._wrong(
                f"it takes {own.model_max_length} tokens: give --max_length "
                f"{own.model_max_length} or less instead of {length}"
            )
        pair = [PROBE], [PROBE[::-1]]
        both = [t(*pair, truncation=True, max_length=length) for t in (own, tokenizer)]
        if own.get_vocab() != tokenizer.get_vocab() or both[0].input_ids != both[1].input_ids:
            raise self._wrong(
                "its tokenizer is another one than this run's model has, so it would read other "
                "words: choose a teacher of the same family"
            )

    def _load(self, base: str, adapter: AdapterFile | None, source: ModelSource) -> nn.Module:
        arguments = {k: v for k, v in source.arguments.items() if k != "revision"}
        arguments["ignore_mismatched_sizes"] = False
        where = replace(
            source, name_or_path=base, arguments=arguments, verbose=False, note_weights=False
        )
        model = self._asked(where.load, frozen=True)
        lacking = list(model.newly_initialised)
        if adapter is not None:
            lacking = [n for n in lacking if not any(t.endswith(n) for t in adapter.tensors)]
            model = self._asked(PeftModel.from_pretrained, model, adapter.path)
        if lacking:
            raise self._wrong(
                f"it lacks {', '.join(lacking)}: it has not been trained on this kind of task"
            )
        return model.requires_grad_(False).eval()

    # -- teaching -------------------------------------------------------------------------------

    def teach(
        self, train: TrainingBatches, collate: Collate, own: Loss | None
    ) -> tuple[Collate, Loss]:
        """The run's collate and loss, with the teacher in them.

        Args:
            train: the run's batches.
            collate: batch -> arguments of the model.
            own: the task's loss; None: the model's.
        """
        o = self.options
        loss = distilled_loss(own, self.distilled, o.alpha_ce, o.alpha_distil, o.temperature)
        asked, counts = self.distilled.asked, self.distilled.entries(train.split)  # counts (n,)
        starts = np.concatenate(([0], np.cumsum(counts)))  # (n + 1,)
        table = self._table(train, collate, starts)
        if table is None:

            def ask(batch: Batch) -> dict[str, Any]:
                arguments = collate(batch)
                return {**arguments, **asked, TARGETS: self._logits(arguments)}

            return ask, loss
        self.model = None  # nobody asks it any more

        def look_up(batch: Batch) -> dict[str, Any]:
            targets = torch.from_numpy(table[_entries(batch, starts)])
            return {**collate(batch), **asked, TARGETS: targets}

        return look_up, loss

    @torch.no_grad()
    def _logits(self, arguments: dict[str, Any]) -> Tensor:
        """(N, K) fp32 of a batch."""
        kind = self.distilled
        given = {name: value for name, value in arguments.items() if name not in kind.unread}
        given |= {**kind.asked, **kind.asked_of_teacher}
        given = on_device(given, self.accelerator.device)
        with self.accelerator.autocast():
            return kind.logits(self.model(**given), given).float()

    def _table(
        self, train: TrainingBatches, collate: Collate, starts: np.ndarray
    ) -> np.ndarray | None:
        """(N, K) fp32 logits of all rows, on every process; None where they are too large."""
        every = _fixed_batches(train, 1, 0)
        width = self._logits(collate(every[-1])).shape[1]  # the shortest rows
        rows = len(train.split)
        if int(starts[-1]) * width * 4 > KEPT_BYTES:
            self.message = f"teacher {self.name}: asked for every batch"
            return None
        options = self.data.options
        path = cache_file("teacher", self._depends_on(train), options.cache_dir)
        kept = load(path, ["logits"]) if options.cache else None
        found = torch.tensor([int(kept is not None)], device=self.accelerator.device)
        if bool(self.accelerator.gather(found).all()):  # all processes go the same way
            self.message = f"teacher {self.name}: logits of {rows:,} rows, kept by an earlier run"
            return kept["logits"]
        table = torch.zeros(int(starts[-1]), width)
        process = self.accelerator.process_index
        for batch in _fixed_batches(train, self.accelerator.num_processes, process):
            table[torch.from_numpy(_entries(batch, starts))] = self._logits(collate(batch)).cpu()
        if self.accelerator.num_processes > 1:  # every process has filled in its own ones
            table = self.accelerator.reduce(table.to(self.accelerator.device), "sum").cpu()
        if options.cache and self.accelerator.is_main_process:
            store(path, {"logits": table.numpy()}, "the teacher's logits")
        self.message = f"teacher {self.name}: logits of {rows:,} rows"
        return table.numpy()

    def _depends_on(self, train: TrainingBatches) -> str:
        """All that decides the bits of the logits."""
        o, training = self.data.options, self.data.training
        parts = {
            "teacher": self.key,
            "what": self.distilled.name,
            "dtype": str(next(self.model.parameters()).dtype),
            "rows": dict(train.split.keys),
            "batches": [train.batch_size, train.max_tokens],
            "tokens": [o.max_length, o.packing, o.pad_to_max_length],
            "computed": [training.mixed_precision, self.accelerator.device.type, torch.__version__],
        }
        return f"{VERSION} {parts}"


def _find(name: str) -> tuple[str, AdapterFile | None]:
    """The model's folder or hub id; or the adapter.

    Raises:
        OptionError: there is no model and no adapter.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return name, None  # on the hub, or an error that says where it was looked for
    if (path / "model").is_dir():  # a run of full fine-tuning
        return str(path / "model"), None
    if not (adapter_folder(path) / "adapter_config.json").is_file():
        if (path / "config.json").is_file() and not (path / "adapter").is_dir():
            return str(path), None
        raise OptionError(
            f"--teacher {name}: neither a model's folder nor one of an adapter in PEFT's format; "
            "a run of --wiring loralib has to be merged into a model first"
        )
    try:
        return str(path), read_adapter(path)
    except ValueError as error:
        raise OptionError(f"--teacher {error}") from error


def _fixed_batches(train: TrainingBatches, processes: int, process: int) -> list[Batch]:
    """All training rows in the same batches in every epoch and run."""
    return batching.evaluation_batches(
        train.split,
        train.batch_size,
        processes=processes,
        process=process,
        max_tokens=train.max_tokens,
    )


def _entries(batch: Batch, starts: np.ndarray) -> np.ndarray:
    """(N,) places of the batch's entries in the table, one row's after another's."""
    first, ends = starts[batch.rows], starts[batch.rows + 1]
    counts = ends - first  # (b,)
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(first - before, counts)
