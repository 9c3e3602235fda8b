"""The run folder: what every run writes, and when it may write there.

config.json        all resolved options; `--config` reads it back
env.json           versions, device, seed, git commit
metrics.jsonl      one line per evaluation
log.jsonl          one line per `logging_steps`
all_results.json   the end: metrics of the result, best epoch, parameters, time, memory
adapter/, model/   the result
checkpoint-N/      to go on from
learning_curve.png
plots/             the pictures of --plots
and what the method's summary writes, such as rank_curve.json and its picture
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.errors import RunError
from examples.training.checkpoints import ASIDE, list_checkpoints, saving_failed

CONFIG, ENVIRONMENT, RESULTS = "config.json", "env.json", "all_results.json"
METRICS, LOG, CURVE = "metrics.jsonl", "log.jsonl", "learning_curve.png"
PLOTS = "plots"
OUTPUTS = ("adapter", "model", "submission")
# Options that do not change what is computed: a run may be resumed with others.
NOT_PART_OF_A_RUN = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint do_train do_eval do_predict data_dir "
    "cache cache_dir local_files_only logging_steps report_to project_prefix disable_tqdm "
    "save_total_limit max_predict_samples test_file per_device_eval_batch_size plots "
    "calibration".split()
)
PACKAGES = ("rankwise", "torch", "numpy", "accelerate", "safetensors", "tokenizers")


class RunFolder:
    """One run's folder. Every process has one; only the main process writes.

    Args:
        path: the folder.
        config: all resolved options.
        main: this is the main process.
        summaries: files that some method's summary writes; overwriting removes them.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        main: bool = True,
        summaries: Iterable[str] = (),
    ) -> None:
        self.path, self.config, self.main = path, config, main
        self.summaries = tuple(summaries)

    def check(self, overwrite: bool, resume: str | None) -> Path | None:
        """Whether the run may use the folder; the checkpoint to go on from, if any.

        Raises:
            RunError: the folder holds another run's results, or the checkpoint is another run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--output_dir {self.path} is a file")
        if resume is not None and overwrite:
            raise RunError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")
        if resume is not None and resume != "auto":
            folder = Path(resume).expanduser()
            if not folder.is_dir():
                raise RunError(f"--resume_from_checkpoint {folder}: no such folder")
            self._refuse_other_run(folder.parent)
            return folder
        if overwrite or not self._holds_something():
            return None
        if resume == "auto":
            self._refuse_other_run(self.path)
            return (list_checkpoints(self.path) or [None])[-1]
        state = "a finished run" if (self.path / RESULTS).exists() else "an unfinished run"
        advice = (
            ""
            if (self.path / RESULTS).exists()
            else (", --resume_from_checkpoint auto to go on with it")
        )
        raise RunError(
            f"--output_dir {self.path} holds {state}: choose another folder{advice}, or "
            "--overwrite_output_dir to replace it"
        )

    def _holds_something(self) -> bool:
        names = (*OUTPUTS, RESULTS)
        return any((self.path / n).exists() for n in names) or bool(list_checkpoints(self.path))

    def _refuse_other_run(self, folder: Path) -> None:
        try:
            saved = json.loads((folder / CONFIG).read_text("utf-8"))
            if not isinstance(saved, dict):
                raise ValueError(f"a {type(saved).__name__}, not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{folder / CONFIG}: cannot be read, so whose checkpoints these are is unknown "
                f"({error})"
            ) from error
        now = json.loads(json.dumps(self.config))
        names = [
            n for n in {**saved, **now} if n not in NOT_PART_OF_A_RUN and saved.get(n) != now.get(n)
        ]
        if names:
            shown = "; ".join(f"{n} was {saved.get(n)}, now {now.get(n)}" for n in names[:5])
            raise RunError(
                f"{folder} is the folder of another run: {shown}. Resume with the same options, "
                "or choose another --output_dir"
            )

    def open(self, seed: int, device: str, resumed_at: int | None) -> None:
        """Makes the folder ready: removes an overwritten run, writes config and environment.

        Args:
            seed: for `env.json`.
            device: for `env.json`.
            resumed_at: the step the run goes on from, None for a new one.
        """
        if not self.main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.glob(f"checkpoint-*{ASIDE}"):
                shutil.rmtree(path, ignore_errors=True)
            if resumed_at is None:
                self._clear()
            else:
                for name in (METRICS, LOG):
                    self._cut(self.path / name, resumed_at)
            self.write_json(CONFIG, self.config)
            self.write_json(ENVIRONMENT, environment(seed, device))
        except OSError as error:
            raise saving_failed(self.path, error) from error

    def _clear(self) -> None:
        folders = OUTPUTS
        if (self.path / CONFIG).is_file():  # a run was here, so the folder of that name is its own
            folders = (*OUTPUTS, PLOTS)
        for path in [*list_checkpoints(self.path), *(self.path / name for name in folders)]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (RESULTS, METRICS, LOG, CURVE, *self.summaries):
            (self.path / name).unlink(missing_ok=True)

    def _cut(self, path: Path, step: int) -> None:
        """Drops the lines that come after the step the run goes on from."""
        lines = [row for row in self.read_lines(path.name) if row["step"] <= step]
        self._replace(path, "".join(json.dumps(row) + "\n" for row in lines))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a .jsonl file; a last line that was cut short is left out."""
        path = self.path / name
        rows = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def add_line(self, name: str, row: dict[str, Any]) -> None:
        """Appends one row."""
        if self.main:
            try:
                with open(self.path / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise saving_failed(self.path / name, error) from error

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes one file at once or not at all."""
        if self.main:
            try:
                self._replace(self.path / name, json.dumps(values, indent=2) + "\n")
            except OSError as error:
                raise saving_failed(self.path / name, error) from error

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def environment(seed: int, device: str) -> dict[str, Any]:
    """What a figure depends on beside the options."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "git_commit": _commit(),
        "arguments": sys.argv[1:],
    }


def _commit() -> str | None:
    """The commit of this source tree, with `+` where files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
