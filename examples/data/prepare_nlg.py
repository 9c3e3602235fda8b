"""Prepares text generation data: raw files to pairs of context and completion, and to token ids.

    python -m examples.data.prepare_nlg TASK --data_dir D --tokenizer DIR --output_dir O

TASK is e2e, webnlg, dart, boolq or xsum; its files are in `D/<task>/` or in D itself (boolq and
xsum are read from the hub without --data_dir). Writes `{train,valid,test}_formatted.jsonl` and,
as token ids, `{train,valid,test}.jsonl`; a split that is not there is said and skipped. All raw
files are read before anything is written, and no file is ever half written.

From the original recipe's raw files these are its published files, byte for byte. A train.txt of
E2E converted from the official CSV is not quite the recipe's: its formatted file is 17 bytes longer
than the published one; valid and test are the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from examples.data import nlg
from examples.data.readers import hub_table
from examples.data.tasks.nlg import BOOLQ_DEV_ROWS, SPLITS, NlgTask, nlg_task
from examples.errors import DataError, OptionError, UserError, as_user_error
from transformers_patched.files import write_atomically

if TYPE_CHECKING:
    from transformers_patched import PreTrainedTokenizer

CHUNK = 4096  # rows tokenised at once: bounds the memory of Python lists


def prepare(
    task: NlgTask, data_dir: Path | None, tokenizer: PreTrainedTokenizer, output_dir: Path
) -> None:
    """Writes every split of a task that is to be had, and says which.

    Raises:
        UserError: nothing there, something wrong in it, or an output would replace a raw file.
    """
    splits = _from_hub(task) if data_dir is None else _from_files(task, data_dir, output_dir)
    write_splits(task.name, splits, tokenizer, output_dir)


def prepare_boolq_dev(data_dir: Path, tokenizer: PreTrainedTokenizer, output_dir: Path) -> None:
    """Cuts BoolQ's dev.jsonl into train, valid and test (see `BOOLQ_DEV_ROWS`)."""
    task = nlg_task("boolq")
    folder = nlg.task_folder(task, data_dir)
    path = nlg.split_file(task, folder, "valid")
    if path is None:
        raise DataError(f"{folder}: no {_looked_for(task, 'valid')}, which --split_dev cuts")
    _refuse_inputs([path], output_dir)
    pairs = nlg.read_pairs(task, path)
    needed = sum(BOOLQ_DEV_ROWS.values())
    if len(pairs) != needed:
        raise DataError(
            f"{path}: {len(pairs):,} rows, but the official dev.jsonl, which --split_dev cuts, "
            f"has {needed:,}"
        )
    print("boolq: dev.jsonl cut by line into train, valid and test: not the official split")
    rows = iter(pairs)
    splits = {split: list(islice(rows, count)) for split, count in BOOLQ_DEV_ROWS.items()}
    write_splits(task.name, splits, tokenizer, output_dir)


# -- reading ------------------------------------------------------------------------------------


def _from_files(task: NlgTask, data_dir: Path, output_dir: Path) -> dict[str, list[nlg.Pair]]:
    folder = nlg.task_folder(task, data_dir)
    paths = {split: nlg.split_file(task, folder, split) for split in SPLITS}
    found = {split: path for split, path in paths.items() if path is not None}
    if not found:
        holds = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        looked_for = ", ".join(_looked_for(task, split) for split in SPLITS)
        raise DataError(
            f"{folder}: no file of {task.name}; looked for {looked_for}; the folder holds {holds}"
        )
    _refuse_inputs(found.values(), output_dir)
    splits = {}
    for split, path in paths.items():
        if path is None:
            missing = f"no {_looked_for(task, split)} in {folder}"
            print(f"{task.name}: the {split} split is skipped: {missing}")
        elif split == "test" and nlg.answers_withheld(task, path):
            print(f"{task.name}: the {split} split is skipped: {path} has no answers")
        else:
            splits[split] = nlg.read_pairs(task, path)
    return splits


def _from_hub(task: NlgTask) -> dict[str, list[nlg.Pair]]:
    if task.hub is None:
        raise OptionError(f"{task.name} is read from files: give --data_dir")
    return {
        split: nlg.pairs_of_table(task, hub_table(task.hub, None, name))
        for split, name in task.hub_splits.items()
    }


def _looked_for(task: NlgTask, split: str) -> str:
    """`valid.txt or validation.txt or …`"""
    return " or ".join(nlg.file_names(task, split)[:4])


def _refuse_inputs(inputs: Iterable[Path], output_dir: Path) -> None:
    """No raw file may be where an output is to be written.

    Raises:
        OptionError: one is.
    """
    outputs = [output_dir / name for split in SPLITS for name in _output_names(split)]
    for path in inputs:
        for output in outputs:
            if output.exists() and output.samefile(path):
                raise OptionError(
                    f"--output_dir {output_dir}: {path} is a raw file and would be written over; "
                    "give another folder"
                )


# -- writing ------------------------------------------------------------------------------------


def write_splits(
    name: str,
    splits: dict[str, list[nlg.Pair]],
    tokenizer: PreTrainedTokenizer,
    output_dir: Path,
) -> None:
    """Writes two files for each split of the task `name`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        formatted, encoded = (output_dir / name for name in _output_names(split))
        _write(formatted, nlg.formatted_lines(pairs))
        _write(encoded, _encoded(pairs, tokenizer))
        contexts = len({pair.context for pair in pairs})
        print(f"{name}: {split} {len(pairs):,} rows of {contexts:,} contexts: {encoded}")


def _output_names(split: str) -> tuple[str, str]:
    return f"{split}_formatted.jsonl", f"{split}.jsonl"


def _encoded(pairs: Sequence[nlg.Pair], tokenizer: PreTrainedTokenizer) -> Iterator[str]:
    for start in range(0, len(pairs), CHUNK):
        yield from nlg.encoded_lines(pairs[start : start + CHUNK], tokenizer)


def _write(path: Path, lines: Iterable[str]) -> None:
    def fill(aside: Path) -> None:
        with aside.open("w", encoding="ascii", newline="") as file:
            file.writelines(lines)

    write_atomically(path, fill)


# -- the program --------------------------------------------------------------------------------


def _task(name: str) -> NlgTask:
    try:
        return nlg_task(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The program; what a user can mend is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="prepare_nlg", description=__doc__.split("\n\n")[0])
    parser.add_argument("task", metavar="TASK", type=_task, help="e2e, webnlg, dart, boolq or xsum")
    parser.add_argument(
        "--data_dir", type=Path,
        help="folder with a folder of the task, or that folder; boolq, xsum: the hub without it",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="folder or hub id, such as gpt2"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="made if it is not there")
    parser.add_argument(
        "--split_dev", action="store_true",
        help="boolq: cut dev.jsonl into train, valid and test, where there is no train.jsonl",
    )  # fmt: skip
    o = parser.parse_args(argv)
    try:
        if o.split_dev and (o.task.name != "boolq" or o.data_dir is None):
            raise OptionError("--split_dev is for boolq with --data_dir")
        from transformers_patched import AutoTokenizer  # after the options: it takes a while

        tokenizer = as_user_error(AutoTokenizer.from_pretrained, o.tokenizer)
        if o.split_dev:
            prepare_boolq_dev(o.data_dir, tokenizer, o.output_dir)
        else:
            prepare(o.task, o.data_dir, tokenizer, o.output_dir)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the files that are there are whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
