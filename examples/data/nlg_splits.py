"""The splits of a text generation run: found, read, as token ids, cut to the model's length.

A split is read from what `examples.data.prepare_nlg` has written (token ids, and texts beside
them), from the raw files of its task, from the hub, or from a file of one's own of any of these
kinds. Where only ids are there the texts are decoded from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from examples.data import batches as batching
from examples.data import nlg
from examples.data.batches import Batch
from examples.data.encode import EncodedSplit
from examples.data.nlg import EncodedPairs, Pair
from examples.data.readers import hub_table
from examples.data.tasks.nlg import NLG_TASKS, NlgTask
from examples.errors import DataError

if TYPE_CHECKING:
    from transformers_patched import PreTrainedTokenizer


@dataclass(frozen=True)
class FoundRows:
    """A split as it was found: texts, a file of token ids, or both.

    Attributes:
        pairs: the texts, None where there are only ids.
        encoded: the file of ids, None where there are only texts.
        source: the file or hub id.
        most: only the first so many rows are used, or contexts; None: all.
        by_context: it counts distinct contexts.
    """

    pairs: list[Pair] | None
    encoded: Path | None
    source: str
    most: int | None = None
    by_context: bool = False


@dataclass(frozen=True)
class EncodedTexts(EncodedSplit):
    """n rows of context and completion, cut to a length; `first` counts the context's tokens.

    Attributes:
        whole: before they were cut.
        shortened: rows that were cut.
        pairs: the texts, where they are known.
    """

    whole: EncodedPairs | None = None
    shortened: int = 0
    pairs: Sequence[Pair] | None = None

    def counts(self, objective: str) -> np.ndarray:
        """(n,) scored tokens: the completion's (clm), or all but the very first (jlm)."""
        return self.lengths - (1 if objective == "jlm" else self.first)


# -- finding and reading ------------------------------------------------------------------------


def find_split(task: NlgTask, data_dir: str | None, split: str) -> FoundRows:
    """Finds and reads a split of a task.

    Args:
        task: which.
        data_dir: has a folder of the task, or is it; None: the hub.
        split: "train", "valid" or "test".

    Raises:
        DataError: it is not there, or something is wrong in it.
    """
    if data_dir is None:
        if task.hub is None:
            raise DataError(f"{task.name} is read from files: give --data_dir")
        if split not in task.hub_splits:
            raise DataError(f"{task.hub} has no {split} split: give --data_dir or --{split}_file")
        table = hub_table(task.hub, None, task.hub_splits[split])
        return FoundRows(nlg.pairs_of_table(task, table), None, task.hub)
    folder = nlg.task_folder(task, Path(data_dir).expanduser())
    prepared = folder / f"{split}.jsonl"
    if _texts_beside(prepared).is_file():
        return _prepared(prepared)
    path = nlg.split_file(task, folder, split)
    if prepared.is_file() and (path is None or _has_ids(prepared)):
        return FoundRows(None, prepared, str(prepared))
    if path is None:
        wanted = ", ".join([prepared.name, *nlg.file_names(task, split)[:3]])
        more = {"valid": "; --no_do_eval trains without", "test": "; leave --do_predict out"}
        raise DataError(
            f"{folder}: no {split} split of {task.name}; looked for {wanted}{more.get(split, '')}"
        )
    if nlg.answers_withheld(task, path):
        raise DataError(f"{path}: it has no answers, so that nothing in it can be scored")
    return FoundRows(nlg.read_pairs(task, path), None, str(path))


def read_own(path: Path) -> FoundRows:
    """A file of one's own: what `prepare_nlg` writes, or lines `context||text` (.txt).

    Raises:
        DataError: no such file, or something wrong in it.
    """
    if path.suffix == ".txt":
        return FoundRows(nlg.read_pairs(NLG_TASKS["e2e"], path), None, str(path))
    if not _has_ids(path):
        return FoundRows(nlg.read_formatted(path), None, str(path))
    return _prepared(path)


def _texts_beside(encoded: Path) -> Path:
    return encoded.with_name(f"{encoded.stem}_formatted.jsonl")


def _prepared(encoded: Path) -> FoundRows:
    """A file of ids and the texts beside it, each where it is there."""
    texts = _texts_beside(encoded)
    pairs = nlg.read_formatted(texts) if texts.is_file() else None
    return FoundRows(pairs, encoded if encoded.is_file() else None, str(encoded))


def _has_ids(path: Path) -> bool:
    """Whether the first row of JSON lines has token ids; whoever reads on finds what is wrong."""
    if not path.is_file() or path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        try:
            row = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(row, dict) and isinstance(row.get("context"), list)


# -- token ids ----------------------------------------------------------------------------------


def encode_rows(
    rows: FoundRows, tokenizer: PreTrainedTokenizer, *, vocab_size: int, max_length: int
) -> EncodedTexts:
    """Token ids of the rows, cut to `max_length`.

    A context loses its beginning, so that its completion is kept; a completion that is longer by
    itself loses its end.

    Args:
        rows: of a split.
        tokenizer: the model's.
        vocab_size: the model's.
        max_length: tokens per row, at least 2.

    Raises:
        DataError: a file of ids is damaged, of another vocabulary, or not of the texts beside it.
        ValueError: the tokenizer has tokens that the model has not, or no end-of-text token.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model's vocabulary has "
            f"{vocab_size:,}: give the model's own as --tokenizer_name"
        )
    end = tokenizer.eos_token_id
    if rows.encoded is not None:
        if end is None:
            raise ValueError("this tokenizer has no eos_token, which ends every text")
        whole = nlg.read_encoded(rows.encoded, vocab_size=vocab_size, eos_token_id=end)
        if rows.pairs is not None and len(rows.pairs) != len(whole):
            raise DataError(
                f"{rows.encoded} has {len(whole):,} rows, but {_texts_beside(rows.encoded)} has "
                f"{len(rows.pairs):,}: prepare the data again"
            )
    else:
        pairs = rows.pairs if rows.by_context else rows.pairs[: rows.most]
        whole = nlg.encoded_pairs(nlg.token_ids(pairs, tokenizer), rows.source)
    kept = rows_kept(whole, rows.most, rows.by_context)
    pairs = rows.pairs and [rows.pairs[i] for i in kept]
    if len(kept) < len(whole):
        texts = ((whole.context(i), whole.completion(i)) for i in kept)
        whole = nlg.encoded_pairs(texts, rows.source)
    return replace(cut(whole, max_length, end), pairs=pairs)


def rows_kept(whole: EncodedPairs, most: int | None, by_context: bool) -> Sequence[int]:
    """Numbers of the first `most` rows, or of all rows of the first `most` contexts; None: all."""
    if most is None or not by_context:
        return range(len(whole))[:most]
    contexts = [tuple(whole.context(i)) for i in range(len(whole))]
    first = {*list(dict.fromkeys(contexts))[:most]}
    return [i for i, context in enumerate(contexts) if context in first]


def cut(whole: EncodedPairs, max_length: int, end: int) -> EncodedTexts:
    """Cuts rows to `max_length`: contexts at their beginning, then completions at their end.

    Args:
        whole: n rows.
        max_length: tokens per row, at least 2.
        end: id that padding is filled with.
    """
    first = whole.first.astype(np.int64)  # (n,)
    completion = np.minimum(whole.lengths - first, max_length - 1)  # (n,) tokens that are kept
    context = np.minimum(first, max_length - completion)  # (n,)
    lengths = context + completion
    shortened = int((lengths < whole.lengths).sum())
    tokens, offsets = whole.tokens, whole.offsets
    if shortened:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        start = whole.offsets[:-1] + first - context  # (n,) of what is kept, in `whole.tokens`
        tokens = tokens[np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)]
    key = hashlib.sha256(tokens.tobytes() + offsets.tobytes() + context.tobytes())
    return EncodedTexts(
        tokens, offsets, context.astype(np.int32), None, end, False,
        {"texts": key.hexdigest()[:40]}, whole, shortened,
    )  # fmt: skip


def with_answers(split: EncodedTexts, answers: Sequence[Sequence[int]]) -> EncodedPairs:
    """Every context with each of k answers: row i·k + j is context i with answer j.

    Args:
        split: n rows.
        answers: ids of k completions.
    """
    whole = split.whole
    rows = ((whole.context(i), answer) for i in range(len(whole)) for answer in answers)
    return nlg.encoded_pairs(rows, whole.source)


def given_answers(split: EncodedTexts, answers: Sequence[Sequence[int]]) -> np.ndarray:
    """(n,) which of the answers each row's completion is.

    Raises:
        DataError: it is none of them.
    """
    known = {tuple(answer): number for number, answer in enumerate(answers)}
    found = [known.get(tuple(split.whole.completion(i))) for i in range(len(split))]
    if None in found:
        row = found.index(None)
        raise DataError(f"{split.whole.source}, row {row + 1}: its completion is no known answer")
    return np.array(found, np.int64)


# -- batches ------------------------------------------------------------------------------------


def collate_texts(
    split: EncodedTexts,
    batch: Batch,
    *,
    objective: str = "clm",
    packed: bool = False,
    width: int | None = None,
    multiple: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """The tensors of a batch, with `labels` (*tokens): -100 where a token is not scored.

    Args:
        objective: "clm" scores completions, "jlm" contexts too.
        packed: see `batches.collate`, as for `width` and `multiple`.
        more: arguments of the model.
    """
    data = batching.collate(split, batch, packed=packed, width=width, multiple=multiple)
    lengths = split.lengths[batch.rows]  # (b,)
    first = np.zeros_like(lengths) if objective == "jlm" else split.first[batch.rows]  # (b,)
    if packed:
        ends = np.cumsum(lengths)
        place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # (T,) 0, 1, … in each
        scored = place >= np.repeat(first, lengths)
    else:
        place = np.arange(data["input_ids"].shape[1])[None]  # (1, L)
        scored = (place >= first[:, None]) & (place < lengths[:, None])  # (b, L)
    labels = data["input_ids"].masked_fill(torch.from_numpy(~scored), -100)
    return {**data, "labels": labels, **more}


# -- texts --------------------------------------------------------------------------------------


def texts_of(split: EncodedTexts, tokenizer: PreTrainedTokenizer) -> Sequence[Pair]:
    """The texts of the rows; decoded where there are only ids."""
    if split.pairs is not None:
        return split.pairs
    whole = split.whole
    return [
        Pair(
            tokenizer.decode(whole.context(i)[:-1]),
            tokenizer.decode(whole.completion(i)[:-1]).removeprefix(" "),
        )
        for i in range(len(whole))
    ]
