"""The run folder: what every run writes, and when it may write there.

config.json        all resolved options; `--config` reads it back
env.json           program, versions, device, seed, git commit
metrics.jsonl      one line per evaluation
log.jsonl          one line per `logging_steps`
all_results.json   the end: metrics of the result, best epoch, parameters, time, memory
adapter/, model/   the result
checkpoint-N/      to go on from
learning_curve.png
plots/             the pictures of --plots
and what the method's summary writes, such as rank_curve.json and its picture

While a run writes there, `.claim` is locked, and what it replaces waits in `.replaced`. A run
writes over and removes only what a run's own config.json there proves to be a run's.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from examples.errors import RunError
from examples.training import replacing
from examples.training.checkpoints import ASIDE, Diverged, list_checkpoints, saving_failed
from examples.training.claim import Claim
from examples.training.file_names import (
    CONFIG,
    CURVE,
    ENVIRONMENT,
    LOG,
    METRICS,
    NOT_PART_OF_A_RUN,
    PLOTS,
    PROOF,
    REPLACED,
    RESULTS,
    SUBMISSION,
)  # fmt: skip
from transformers_patched.files import write_atomically

ALWAYS = (CONFIG, ENVIRONMENT, RESULTS, METRICS, LOG, CURVE, SUBMISSION)  # of every run
# Options that name what a run reads; a whole folder of these must not be the run's own.
FOLDERS_READ = ("model_name_or_path", "tokenizer_name", "lora_path", "teacher")
READ = (
    *FOLDERS_READ, "features_path", "data_dir", "dataset_name", "train_file", "validation_file",
    "test_file", "config",
)  # fmt: skip
WEIGHTS = (  # a folder with one of these at its top is a model's or an adapter's
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "adapter_model.safetensors", "adapter_model.bin",
    "lora.safetensors",
)  # fmt: skip
PACKAGES = ("rankwise", "torch", "numpy", "accelerate", "safetensors", "tokenizers")


class RunFolder:
    """One run's folder. Every process has one; only the main process writes.

    Args:
        path: the folder.
        config: all resolved options.
        main: this is the main process.
        results: method -> what it writes into the folder, beside what every run does.
        program: that makes the run, for `env.json`: no option, so that older runs still resume.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        main: bool = True,
        results: Mapping[str, tuple[str, ...]] | None = None,
        program: str = "",
    ) -> None:
        self.path, self.config, self.main, self.program = path, config, main, program
        self.results = results or {}
        self._claim = Claim(path)

    # -- whose the folder is --------------------------------------------------------------------

    def claim(self, config_file: str | None = None) -> Path | None:
        """Takes the folder for this run, until `close`; the checkpoint to go on from, if any.

        To be called on the main process, and to be closed even where training is not asked for.

        Args:
            config_file: of `--config`.

        Raises:
            RunError: another run is writing there, or its results or someone's files are there, or
                the run reads what it would write over, or the checkpoint is another run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"--output_dir {self.path} is a file")
        self._claim.take()
        try:
            resume = self.config.get("resume_from_checkpoint")
            self._refuse_inputs({**self.config, "config": None if resume else config_file})
            replacing.discard_rest(self.path)
            self._settle(keep=True)
            if not self.config.get("do_train", True):
                return None
            return self.check(bool(self.config.get("overwrite_output_dir")), resume)
        except BaseException:
            self._claim.release()
            raise

    def check(self, overwrite: bool, resume: str | None) -> Path | None:
        """Whether the run may use the folder; the checkpoint to go on from, if any.

        Raises:
            RunError: the folder holds another run's results or somebody's files, or the checkpoint
                is another run's.
        """
        if resume is not None and overwrite:
            raise RunError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")
        if resume is not None and resume != "auto":
            folder = Path(resume).expanduser()
            if not folder.is_dir():
                raise RunError(f"--resume_from_checkpoint {folder}: no such folder")
            self._refuse_other_run(folder.parent)
            if not (self.path.is_dir() and folder.parent.samefile(self.path)):
                self._refuse_foreign()
                if self._own():
                    self._refuse_other_run(self.path)
            return folder
        checkpoints = list_checkpoints(self.path)
        if resume == "auto" and checkpoints:
            self._refuse_other_run(self.path)
            return checkpoints[-1]
        self._refuse_foreign()
        # What a run has before its first checkpoint is not worth a question.
        began = {*self._own()} - {CONFIG, ENVIRONMENT, METRICS, LOG}
        if overwrite or not any((self.path / name).exists() for name in began):
            return None
        if resume == "auto":
            self._refuse_other_run(self.path)
            return None
        finished = (self.path / RESULTS).exists()
        state = "a finished run" if finished else "an unfinished run"
        advice = "" if finished else ", --resume_from_checkpoint auto to go on with it"
        raise RunError(
            f"--output_dir {self.path} holds {state}: choose another folder{advice}, or "
            "--overwrite_output_dir to replace it"
        )

    def _names(self, config: dict[str, Any]) -> list[str]:
        """What a run with these options writes, its checkpoints left out."""
        plots = (PLOTS,) if config.get("plots") else ()
        return [*ALWAYS, *self.results.get(config.get("method", ""), ()), *plots]

    def _own(self) -> list[str]:
        """What in the folder is a run's, by its config.json: nothing where there is no such."""
        try:
            config = json.loads((self.path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError):
            return []
        if not isinstance(config, dict) or not config.keys() >= PROOF:
            return []
        return [*self._names(config), *(path.name for path in list_checkpoints(self.path))]

    def _refuse_foreign(self) -> None:
        """What has the name of something to be written, and is no run's, is somebody's."""
        weights = [name for name in WEIGHTS if (self.path / name).exists()]
        if weights:
            raise RunError(
                f"--output_dir {self.path} is a model's folder (it has {weights[0]}): choose "
                "another folder"
            )
        names = {*self._names(self.config), *(path.name for path in list_checkpoints(self.path))}
        if not self.config.get("do_predict"):
            names.remove(SUBMISSION)
        names -= {*self._own()}
        foreign = sorted(name for name in names if os.path.lexists(self.path / name))
        if foreign:
            raise RunError(
                f"--output_dir {self.path} has {', '.join(foreign)}, and no run's {CONFIG} that "
                "proves a run to have written it, so it is not written over: choose another folder"
            )

    def _refuse_inputs(self, options: Mapping[str, Any]) -> None:
        """Nothing that the run reads may be where it writes or removes."""
        trains = self.config.get("do_train", True)
        names = {SUBMISSION}
        if trains:
            names |= {*self._names(self.config), *self._own(), REPLACED}
        written = [self.path / name for name in names if (self.path / name).exists()]
        for option in READ:
            path = Path(options.get(option) or "").expanduser()
            if not options.get(option) or not path.exists():
                continue  # not given, or on the hub, or yet to be written
            if trains and option in FOLDERS_READ and path.samefile(self.path):
                raise RunError(f"--output_dir {self.path} is --{option} too: choose another folder")
            path = path.resolve()
            for target in written:
                if any(part.samefile(target) for part in (path, *path.parents)):
                    raise RunError(
                        f"--{option} {options[option]} is in {target}, which the run would write "
                        "over: choose another --output_dir"
                    )

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
            if resumed_at is not None:
                for name in (METRICS, LOG):
                    self._cut(self.path / name, resumed_at)
            elif own := self._own():
                replacing.set_aside(self.path, own)
            self.write_json(CONFIG, self.config)
            found = {"program": self.program, **environment(seed, device)}
            self.write_json(ENVIRONMENT, found)
        except OSError as error:
            raise saving_failed(self.path, error) from error

    def close(self, error: BaseException | None = None) -> None:
        """Ends the run's claim; what it replaces goes, or comes back where the run came to nothing.

        Args:
            error: that ended the run.
        """
        if not self._claim.held:  # another process of the run has it, or it needs none
            return
        try:
            if self._settle(keep=not isinstance(error, Diverged)):
                aside = self.path / REPLACED
                print(
                    f"the run that this one replaces waits in {aside} until this one has ended",
                    file=sys.stderr,
                )
        finally:
            self._claim.release()

    def _settle(self, keep: bool) -> bool:
        """Decides between the folder's run and the one aside; whether that still waits.

        Args:
            keep: the folder's run may go on from its checkpoints.
        """
        aside = self.path / REPLACED
        if not aside.is_dir():
            return False
        moved = (aside / CONFIG).exists()
        if moved and (self.path / RESULTS).exists():
            replacing.discard(self.path)
        elif moved and keep and list_checkpoints(self.path):
            return True
        else:
            replacing.put_back(self.path, self._own())
        return False

    # -- its files ------------------------------------------------------------------------------

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
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def environment(seed: int, device: str) -> dict[str, Any]:
    """What a figure depends on beside the options."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__  # with its local part, which the metadata may lack
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "git_commit": source_commit(),
        "arguments": sys.argv[1:],
    }


def source_commit() -> str | None:
    """The commit of this source tree, with `+` where files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
