"""What became of every run of a sweep, over all calls: `runs.jsonl`, and `sweep.json` of this one.

A line of `runs.jsonl`: folder, labels, part, program, options, state (waiting, running, done,
failed, or stopped: a run of a search that lost early), attempts, seconds (of all attempts), and the
last lines of the log of what failed. The file is replaced whole, so a reader never sees half of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.sweeps.jobs import Job
from transformers_patched.files import write_atomically

RUNS, SUMMARY = "runs.jsonl", "sweep.json"


class Ledger:
    """The runs of the sweep in `folder`; reads what earlier calls wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, dict[str, Any]] = {}
        path = folder / RUNS
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            row = json.loads(line)
            if row["state"] == "running":  # of a call that was killed
                row["state"] = "waiting"
            self._rows[row["folder"]] = row

    def __getitem__(self, job: Job) -> dict[str, Any]:
        """The row of a run; a new one where it has none."""
        fresh = {
            "folder": job.name,
            "labels": job.labels,
            "part": job.part,
            "program": job.program,
            "options": job.options,
            "state": "waiting",
            "attempts": 0,
            "seconds": 0.0,
        }
        return self._rows.setdefault(job.name, fresh)

    def seconds(self) -> dict[str, float]:
        """Name -> seconds of the runs that are done, all their attempts together."""
        return {name: r["seconds"] for name, r in self._rows.items() if r["state"] == "done"}

    def note(self, job: Job, **values: Any) -> None:
        """Changes the row of a run, and writes the file."""
        self[job].update(values)
        self.write()

    def write(self) -> None:
        """Writes the file."""
        write_lines(self.folder / RUNS, self._rows.values())

    def summarize(self, runs: list[dict[str, Any]]) -> None:
        """Writes what this call made of the runs."""
        text = json.dumps({"runs": runs}, indent=1, default=str) + "\n"
        write_atomically(self.folder / SUMMARY, lambda aside: aside.write_text(text, "utf-8"))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a .jsonl file."""
    text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    write_atomically(path, lambda aside: aside.write_text(text, "utf-8"))
