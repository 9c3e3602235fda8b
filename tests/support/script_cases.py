"""Task scripts run dry: what would they call, and what does the program make of that?"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from examples import program
from examples.cli.groups import TrainingOptions
from examples.run_glue import OPTION_CLASSES, SUMMARY
from support.paths import ROOT

# Writes what it was called as, where, and with which words, one per line.
RECORDER = """#!/bin/sh
case "$1" in -c) exit 0;; esac
{ basename "$0"; pwd; echo "$PYTHONPATH"; printf '%s\\n' "$@"; } >"$RECORD"
"""


class Dry:
    """Runs scripts with a python and an accelerate that only note their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "called"
        (folder / "bin").mkdir()
        for name in ("python", "accelerate"):
            path = folder / "bin" / name
            path.write_text(RECORDER)
            path.chmod(0o755)

    def __call__(
        self, script: str, *words: str, root: Path = ROOT, **environment: str
    ) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        """The command it would run (empty: none), and how the script itself ended."""
        self.record.unlink(missing_ok=True)
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", str(root / "scripts" / script), *words],
            cwd=self.folder,
            env={"PATH": path, "RECORD": str(self.record), **environment},
            capture_output=True,
            text=True,
        )
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        if lines:
            assert lines[1:3] == [str(self.folder), str(root)]
        return lines[:1] + lines[3:], done


def parsed(command: Sequence[str]) -> program.Options:
    """What run_glue makes of a recorded command."""
    words = list(command[command.index("examples.run_glue") + 1 :])
    options = program.parse(words, "examples.run_glue", SUMMARY, OPTION_CLASSES, "task_name")
    assert options is not None
    return options


def rows_per_step(options: program.Options, processes: int) -> int:
    training = options[TrainingOptions]
    at_once = program.rows_at_once(training, processes)
    return at_once * program.accumulation(training, processes) * processes
