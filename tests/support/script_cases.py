"""Task scripts run dry: what would they call, and what does the program make of that?"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from examples import program, run_nlg
from examples.cli.groups import TrainingOptions
from examples.run_glue import OPTION_CLASSES, SUMMARY
from support.paths import ROOT

# Writes what it was called as, where, and with which words, one per line; preparing data makes its
# folder, with a valid split and no test split.
RECORDER = """#!/bin/sh
case "$1" in -c) exit 0;; esac
{ basename "$0"; pwd; echo "$PYTHONPATH"; printf '%s\\n' "$@"; echo "$END"; } >>"$RECORD"
case "$2" in examples.data.prepare_nlg) ;; *) exit 0;; esac
while [ "$1" != --output_dir ]; do shift; done
mkdir -p "$2" && touch "$2/valid.jsonl" "$2/valid_formatted.jsonl"
"""
END = "== end of a command =="


class Dry:
    """Runs scripts with a python and an accelerate that only note their arguments.

    `commands` are those of the last call, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[list[str]] = []
        self.record = folder / "called"
        (folder / "bin").mkdir()
        for name in ("python", "accelerate"):
            path = folder / "bin" / name
            path.write_text(RECORDER)
            path.chmod(0o755)

    def __call__(
        self, script: str, *words: str, root: Path = ROOT, **environment: str
    ) -> tuple[list[str], subprocess.CompletedProcess[str]]:
        """The last command it would run (empty: none), and how the script itself ended."""
        self.record.unlink(missing_ok=True)
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", str(root / "scripts" / script), *words],
            cwd=self.folder,
            env={"PATH": path, "RECORD": str(self.record), "END": END, **environment},
            capture_output=True,
            text=True,
        )
        text = self.record.read_text() if self.record.exists() else ""
        self.commands = []
        for block in text.split(f"{END}\n")[:-1]:
            lines = block.splitlines()
            assert lines[1:3] == [str(self.folder), str(root)]
            self.commands.append(lines[:1] + lines[3:])
        return (self.commands or [[]])[-1], done


def parsed(command: Sequence[str]) -> program.Options:
    """What run_glue makes of a recorded command."""
    words = list(command[command.index("examples.run_glue") + 1 :])
    options = program.parse(words, "examples.run_glue", SUMMARY, OPTION_CLASSES, "task_name")
    assert options is not None
    return options


def parsed_nlg(command: Sequence[str]) -> program.Options:
    """What run_nlg makes of a recorded command."""
    words = list(command[command.index("examples.run_nlg") + 1 :])
    options = program.parse(
        words, "examples.run_nlg", run_nlg.SUMMARY, run_nlg.CLASSES, "task_name"
    )
    assert options is not None
    return options


def rows_per_step(options: program.Options, processes: int) -> int:
    training = options[TrainingOptions]
    at_once = program.rows_at_once(training, processes)
    return at_once * program.accumulation(training, processes) * processes


def script_module(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
