"""Fetches the raw files of a text generation task: from the web, from the hub, or from a folder.

What arrives is read as `examples.data.prepare_nlg` will read it, and where the original recipe's
files are published it is said whether these are the ones.
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from examples.data import nlg
from examples.data.readers import hub_table
from examples.data.tables import write_table
from examples.data.tasks import plain_name
from examples.data.tasks.nlg import NLG_DATA, SPLITS, NlgTask
from examples.errors import DataError, DownloadError

PATIENCE = 30.0  # seconds without an answer


def fetch_nlg(task: NlgTask, parent: Path, source: Path | None) -> Path:
    """Writes the raw files of a task into `parent/<task>/`; returns that folder.

    Args:
        task: from `examples.data.tasks.nlg`.
        parent: gets the folder, which is left alone where it is there already.
        source: a folder that has the files; None: the web, or for some tasks the hub.

    Raises:
        UserError: a file is missing, damaged or does not come; nothing is left behind.
    """
    names = {plain_name(name) for name in (task.name, *task.folders)}
    for there in sorted(parent.iterdir()) if parent.is_dir() else ():
        if plain_name(there.name) in names and not there.name.startswith("."):
            print(f"{task.name}: {there} is there already, left alone (delete it to fetch again)")
            return there
    folder, aside = parent / task.name, parent / f".{task.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        if source is not None:
            _copy(task, source, aside)
        elif task.hub is not None:
            for name in task.hub_splits.values():
                write_table(aside / f"{name}{task.suffix}", hub_table(task.hub, None, name).columns)
        else:
            for path in task.sources.values():
                fetch_url(f"{NLG_DATA}/{path}", aside / path.rpartition("/")[2])
        counts = _counts(task, aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{task.name}: {folder} ({', '.join(counts)})")
    return folder


def fetch_url(url: str, path: Path) -> None:
    """Writes what a web address gives to `path`.

    Raises:
        DownloadError: it does not answer, has no such file, or breaks off.
    """
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
            size = answer.headers.get("Content-Length")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"{url}: cannot be fetched ({reason}); try again, or fetch it elsewhere: data can then "
            "be given with --from DIR"
        ) from error
    if size is not None and path.stat().st_size != int(size):
        raise DownloadError(f"{url}: broke off at {path.stat().st_size:,} of {int(size):,} bytes")


def _copy(task: NlgTask, source: Path, folder: Path) -> None:
    """Copies the raw files of a task that `source` has."""
    found = nlg.task_folder(task, source)
    paths = [nlg.split_file(task, found, split) for split in SPLITS]
    for path in filter(None, paths):
        shutil.copyfile(path, folder / path.name)
    if not any(paths):
        wanted = ", ".join(name for split in SPLITS for name in nlg.file_names(task, split)[:2])
        raise DataError(f"{found}: no file of {task.name}; looked for {wanted}, …")


def _counts(task: NlgTask, folder: Path) -> list[str]:
    """`4,693 test, as published` of every split; reading it is the check that it is whole."""
    counts = []
    for split in SPLITS:
        path = nlg.split_file(task, folder, split)
        if path is None:
            counts.append(f"no {split}")
        elif split == "test" and nlg.answers_withheld(task, path):
            counts.append("test without answers")
        else:
            pairs = nlg.read_pairs(task, path)
            sum_ = hashlib.sha256("".join(nlg.formatted_lines(pairs)).encode()).hexdigest()
            published = task.published.get(split)
            same = "" if published is None else ", as published"
            if published not in (None, sum_):
                same = ", not the published file"
            counts.append(f"{len(pairs):,} {split}{same}")
    return counts
