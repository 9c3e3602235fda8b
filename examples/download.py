"""Fetches models, adapters and the data of tasks into plain folders.

    python -m examples.download [--to DIR] [--from DIR] [--revision REV] NAME ...

A NAME that is a task of GLUE (`mrpc`, `STS-B`, or `glue` for all nine) becomes JSON lines in
`data/<task>/`; one of text generation (`e2e`, or `nlg` for all five) becomes its raw files there,
for `examples.data.prepare_nlg`; `squad` and `squad_v2` their official files. An adapter that was
published with LoRA (`gpt2_md_lora_e2e`) becomes one file in `checkpoints/`, for `--lora_path`. Any
other NAME is a model on the hub and becomes `checkpoints/<name>/`: configuration, tokenizer,
weights. Whatever has the final name is complete: everything is written aside first. After a
download that broke off, the next call fetches only the files of the model that are not there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from examples.data.fetch_nlg import fetch_nlg, fetch_url
from examples.data.fetch_squad import fetch_squad
from examples.data.readers import RawSplit, find_split, read_hub, read_split
from examples.data.tables import DataError, write_table
from examples.data.tasks import GLUE_TASKS, TASKS, Task, plain_name
from examples.data.tasks.nlg import NLG_TASKS, NlgTask, nlg_task
from examples.data.tasks.squad import SQUAD_TASKS, SquadTask, squad_task
from examples.errors import DownloadError, UserError

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "spm.model", "LICENSE", "README.md",
)  # fmt: skip
# First what can be had without unpickling. Each: whole file, or its index and pieces.
WEIGHTS = (
    r"model\.safetensors|model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin|pytorch_model\.bin\.index\.json|pytorch_model-\d+-of-\d+\.bin",
)
# Adapters published with LoRA: factors of rank 4 (GPT-2, alpha 32, --wiring loralib) and 8
# (RoBERTa, alpha 16).
RELEASES = "https://github.com/microsoft/LoRA/releases/download"
ADAPTERS = {
    "roberta_base_lora_mnli": f"{RELEASES}/RoBERTa-base/roberta_base_lora_mnli.bin",
    **{
        name: f"{RELEASES}/GPT-2/{name}.pt"
        for size in ("md", "lg")
        for name in (f"gpt2_{size}_lora_{task}" for task in ("e2e", "dart", "webnlg"))
    },
}
# the original recipe's names of the models
MODEL_CARDS = {"gpt2.sm": "gpt2", "gpt2.md": "gpt2-medium", "gpt2.lg": "gpt2-large"}
# who has the models that people know by a name alone
OWNERS = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community"),
    "bert-base-uncased": "google-bert",
}
NLG_NAMES = {plain_name(n) for task in NLG_TASKS.values() for n in (task.name, *task.folders)}
KNOWN = ", ".join([*GLUE_TASKS, *NLG_TASKS, *SQUAD_TASKS])


def endpoint() -> str:
    """The hub's address, once it has answered.

    Raises:
        DownloadError: it is switched off or silent.
    """
    from huggingface_hub import constants

    from transformers_patched.checkpoint import hub_answers

    if constants.HF_HUB_OFFLINE:
        raise DownloadError("HF_HUB_OFFLINE is set, so nothing is downloaded: unset it")
    if not hub_answers(constants.ENDPOINT):
        raise DownloadError(
            f"the hub at {constants.ENDPOINT} does not answer; try again later, or set HF_ENDPOINT "
            "to a mirror; tasks can be read from files with --from DIR"
        )
    return constants.ENDPOINT


# -- tasks --------------------------------------------------------------------------------------


def fetch_task(task: Task, parent: Path, source: Path | None) -> Path:
    """Writes the splits of a task to `parent/<task>/<split>.jsonl`.

    Args:
        task: from `examples.data.tasks`.
        parent: gets the folder.
        source: a folder with the task's files in any format `examples.data` reads, the parquet
            files of the hub for instance; None: the hub itself.

    Raises:
        DataError: a file is missing or wrong; nothing is left behind.
    """
    done = _present(task, parent)
    if done is not None:
        print(f"{task.name}: {done} is there already, left alone (delete it to fetch it again)")
        return done
    splits, missing = _splits(task, source)
    read = _hub_reader(task) if source is None else partial(read_split, task, source)
    folder, aside = parent / task.name, parent / f".{task.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        counts = [f"{_export(task, read, aside, split):,} {split}" for split in splits]
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    without = f"; {source} has no {', '.join(missing)}" if missing else ""
    print(f"{task.name}: {folder} ({', '.join(counts)}{without})")
    return folder


def _splits(task: Task, source: Path | None) -> tuple[list[str], list[str]]:
    """The splits to fetch, and the test splits that a source folder lacks: not all have them."""
    splits, missing = ["train", *task.evaluation.values()], []
    for split in task.test_splits:
        try:
            if source is not None:
                find_split(task, source, split)
            splits.append(split)
        except DataError:
            missing.append(split)
    return splits, missing


def _present(task: Task, parent: Path) -> Path | None:
    if not parent.is_dir():
        return None
    found = (p for p in sorted(parent.iterdir()) if plain_name(p.name) == task.name)
    return next((path for path in found if not path.name.startswith(".")), None)


def _need_datasets(task: str) -> None:
    if find_spec("datasets") is None:
        raise DownloadError(
            f"fetching {task} needs the datasets package: pip install 'rankwise[data]' "
            "(the extra named data), or give files with --from DIR"
        )


def _hub_reader(task: Task) -> Callable[[str], RawSplit]:
    _need_datasets(task.name)
    endpoint()
    assert task.hub is not None  # `names` lets no other task through
    name, config = task.hub

    def read(split: str) -> RawSplit:
        try:
            return read_hub(task, name, config, split)
        except DataError as error:
            if error.__cause__ is None or isinstance(error.__cause__, DataError):
                raise
            reason = f"{type(error.__cause__).__name__}: {error.__cause__}"
            raise DownloadError(
                f"{task.name}: the hub's {name}, split {split}, did not come through ({reason}); "
                "try again, or give files with --from DIR"
            ) from error

    return read


def _export(task: Task, read: Callable[[str], RawSplit], folder: Path, split: str) -> int:
    """Writes one split, and reads it back to be sure; its number of rows."""
    rows = read(split)
    columns = {"idx": rows.ids, **dict(zip(task.text, rows.text, strict=True))}
    if rows.labels is not None:
        columns["label"] = rows.labels
    write_table(folder / f"{split}.jsonl", columns)
    back = read_split(task, folder, split)
    if (back.text, back.labels, back.ids) != (rows.text, rows.labels, rows.ids):
        raise DownloadError(f"{task.name}, {split}: what was written differs; is the disk sound?")
    return len(rows)


# -- models -------------------------------------------------------------------------------------


def wanted(files: Iterable[str]) -> list[str]:
    """Which of a repository's files make a model: small ones, and one kind of weights."""
    files = sorted(files)
    kinds = [[name for name in files if re.fullmatch(kind, name)] for kind in WEIGHTS]
    return [name for name in files if name in SMALL_FILES] + next(filter(None, kinds), [])


def fetch_model(name: str, parent: Path, revision: str | None) -> Path:
    """Downloads a model of the hub to `parent/<last part of its name>`.

    Raises:
        DownloadError: there is no such model, it has no weights, or the download broke off.
    """
    folder = parent / name.rpartition("/")[2]
    if folder.exists():
        print(f"{name}: {folder} is there already, left alone (delete it to fetch it again)")
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DownloadError(f"{name}: neither a task ({KNOWN}) nor a hub id")
    hub = endpoint()
    aside = parent / f".{folder.name}.partial"
    try:
        files = _fetch_files(name, aside, revision)
    except DownloadError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and the disk raise their own
        raise DownloadError(_reason(name, hub, revision, error)) from error
    shutil.rmtree(aside / ".cache", ignore_errors=True)  # the client's notes on the download
    aside.rename(folder)
    if any(file.endswith(".bin") for file in files):
        print(f"{name}: has no safetensors, so it is pytorch_model.bin (read with weights_only)")
    print(f"{name}: {folder} ({', '.join(files)})")
    return folder


def _fetch_files(name: str, folder: Path, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(name, revision=revision)
    there = [sibling.rfilename for sibling in info.siblings or ()]
    files = wanted(there)
    if "config.json" not in files or not any(re.fullmatch("|".join(WEIGHTS), f) for f in files):
        raise DownloadError(
            f"{name}: no config.json with model.safetensors or pytorch_model.bin in it; it has "
            f"{', '.join(sorted(there)[:12]) or 'nothing'}"
        )
    for file in files:  # all of one commit, even if the branch moves meanwhile
        hf_hub_download(name, file, revision=info.sha, local_dir=folder)
    return files


def _reason(name: str, hub: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import utils

    if isinstance(error, utils.GatedRepoError):
        return f"{name}: accept its licence at {hub}/{name}, then log in with `hf auth login`"
    if isinstance(error, utils.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}"
    if isinstance(error, utils.RepositoryNotFoundError):
        return (
            f"{name}: neither a task ({KNOWN}) nor a model you can read at {hub} "
            "(a private one needs `hf auth login`)"
        )
    first = next(iter(str(error).strip().splitlines()), "")
    return (
        f"{name}: the download broke off ({type(error).__name__}: {first}); call again, "
        "files that came whole are kept"
    )


def fetch_adapter(name: str, parent: Path) -> Path:
    """Downloads an adapter of `ADAPTERS` to `parent`, and reads it to be sure.

    Raises:
        DownloadError: it does not come, or is no file of tensors.
    """
    path = parent / ADAPTERS[name].rpartition("/")[2]
    if path.exists():
        print(f"{name}: {path} is there already, left alone (delete it to fetch it again)")
        return path
    from peft_custom.save_and_load import read_adapter

    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f".{path.name}.partial"
    try:
        fetch_url(ADAPTERS[name], aside)
        tensors = read_adapter(aside).tensors
        aside.rename(path)
    except ValueError as error:
        raise DownloadError(f"{name}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
    print(f"{name}: {path} ({len(tensors)} tensors)")
    return path


# -- the program --------------------------------------------------------------------------------


def names(words: Sequence[str]) -> list[Task | NlgTask | SquadTask | str]:
    """Tasks, and names of models and adapters."""
    found: list[Task | NlgTask | SquadTask | str] = []
    for word in words:
        task = TASKS.get(plain_name(word))
        stem = word.removesuffix(".pt").removesuffix(".bin")
        model = MODEL_CARDS.get(word, word)
        if plain_name(word) == "glue":
            found += [TASKS[name] for name in GLUE_TASKS]
        elif plain_name(word) == "nlg":
            found += NLG_TASKS.values()
        elif plain_name(word) in NLG_NAMES:
            found.append(nlg_task(word))
        elif plain_name(word) in map(plain_name, SQUAD_TASKS):
            found.append(squad_task(word))
        elif stem in ADAPTERS:
            found.append(stem)
        elif task is not None and task.hub is None:
            raise DownloadError(f"{word}: comes with the project, there is nothing to fetch")
        elif task is not None:
            found.append(task)
        else:
            found.append(f"{OWNERS[model]}/{model}" if model in OWNERS else word)
    return found


def fetch(name: Task | NlgTask | SquadTask | str, o: argparse.Namespace) -> None:
    """Fetches one of `names` to where the options say."""
    data, checkpoints = o.to or o.home / "data", o.to or o.home / "checkpoints"
    if isinstance(name, Task):
        fetch_task(name, data, o.source)
    elif isinstance(name, NlgTask):
        if o.source is None and name.hub is not None:
            _need_datasets(name.name)
            endpoint()
        fetch_nlg(name, data, o.source)
    elif isinstance(name, SquadTask):
        fetch_squad(name, data, o.source)
    elif o.source is not None:
        raise DownloadError(f"{name}: no task ({KNOWN}), and --from is for tasks")
    elif name in ADAPTERS:
        fetch_adapter(name, checkpoints)
    else:
        fetch_model(name, checkpoints, o.revision)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; what a user can mend is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="download", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names", nargs="+", metavar="NAME",
        help=f"a model's hub id, a task ({KNOWN}), glue or nlg for all of these, or an adapter "
        f"({', '.join(ADAPTERS)})",
    )  # fmt: skip
    parser.add_argument("--to", type=Path, help="instead of data/ and checkpoints/")
    parser.add_argument(
        "--from", type=Path, dest="source",
        help="folder of parquet (or other) files that tasks are read from instead of the hub",
    )  # fmt: skip
    parser.add_argument("--revision", help="of a model: branch, tag or commit")
    parser.add_argument(
        "--home", type=Path, default=Path(), help="where data/ and checkpoints/ are (here)"
    )
    o = parser.parse_intermixed_args(argv)
    try:
        if o.source is not None and not o.source.is_dir():
            raise DownloadError(f"--from {o.source}: no such folder")
        for name in names(o.names):
            fetch(name, o)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; call again, files of a model that came whole are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
