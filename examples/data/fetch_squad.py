"""Fetches SQuAD's official files, from its site or from a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from examples.data.fetch_nlg import fetch_url
from examples.data.squad import find_squad, read_squad
from examples.data.tasks.squad import SquadTask

SITE = "https://rajpurkar.github.io/SQuAD-explorer/dataset"


def fetch_squad(task: SquadTask, parent: Path, source: Path | None) -> Path:
    """Writes `train-v1.1.json` and `dev-v1.1.json` into `parent/squad/`; returns that folder.

    Args:
        task: from `examples.data.tasks.squad`; the second version is v2.0, in `squad_v2`.
        parent: gets the folder, which is left alone where it is there already.
        source: a folder that has the files; None: the site.

    Raises:
        UserError: a file is missing, damaged or does not come; nothing is left behind.
    """
    folder, aside = parent / task.name, parent / f".{task.name}.partial"
    if folder.exists():
        print(f"{task.name}: {folder} is there already, left alone (delete it to fetch it again)")
        return folder
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    counts = []
    try:
        for official, split in (("train", "train"), ("dev", "validation")):
            path = aside / f"{official}-{task.version}.json"
            if source is None:
                fetch_url(f"{SITE}/{path.name}", path)
            else:
                shutil.copyfile(find_squad(task, source, split), path)
            found = read_squad(path, unanswerable=task.unanswerable)
            counts.append(f"{len(found):,} {official}")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{task.name}: {folder} ({', '.join(counts)})")
    return folder
