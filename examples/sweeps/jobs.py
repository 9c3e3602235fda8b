"""One run of a sweep: its options parsed, its folder named by their content, its commands."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from examples.errors import OptionError, is_user_error
from examples.sweeps.sheet import Point

RESULTS = "all_results.json"  # a run's last file
LOGS = "logs"
SET_HERE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
# Options that may change without a run becoming another one: they do not name its folder.
NOT_IN_THE_NAME = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint data_dir cache cache_dir "
    "local_files_only report_to project_prefix disable_tqdm config".split()
)
LONGEST = 60  # characters of a name before its hash


@dataclass(frozen=True)
class Step:
    """A command after the run: it writes `aside`, which becomes `result` when it has succeeded."""

    command: tuple[str, ...]
    aside: Path
    result: Path


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        name: of its folder and its log.
        labels: axis -> the word for its value.
        part: "grid" or "search".
        program: the module.
        options: as they were given.
        folder: the run's.
        log: what its commands print.
        command: the run's.
        trains: it ends with `all_results.json`.
        then: commands after it.
    """

    name: str
    labels: dict[str, str]
    part: str
    program: str
    options: dict[str, Any]
    folder: Path
    log: Path
    command: tuple[str, ...]
    trains: bool
    then: tuple[Step, ...]

    @property
    def ran(self) -> bool:
        """Whether its own result is there."""
        return (self.folder / RESULTS).is_file()

    @property
    def done(self) -> bool:
        """Whether all its results are there."""
        return self.ran and all(step.result.exists() for step in self.then)

    def results(self) -> dict[str, Any]:
        """The figures of its end; empty before that."""
        try:
            return json.loads((self.folder / RESULTS).read_text("utf-8"))
        except (OSError, ValueError):
            return {}


def make_job(point: Point, folder: Path, source: str, part: str = "grid", **more: Any) -> Job:
    """The run of a point.

    Args:
        point: of the sheet.
        folder: the sweep's.
        source: named in errors.
        part: "grid" or "search".
        more: options that win over the point's.

    Raises:
        OptionError: the program, or one of its options, does not exist or cannot be so.
    """
    options = {**point.options, **more}
    labels = {axis: word for axis, word in point.labels.items() if axis not in more}
    labels |= {option: str(value) for option, value in more.items()}
    where = f"{source}: {' '.join(labels.values()) or point.program}"
    for name in SET_HERE:
        if name in options:
            raise OptionError(f"{where}: --{name} is set by the sweep; leave it out")
    module = _program(point.program, where)
    given = as_words(options)
    try:
        parsed = module.options_of([*given, "--output_dir=RUN"])
    except Exception as error:
        if not is_user_error(error):
            raise
        raise OptionError(f"{where}: {error}") from error
    if parsed is None:
        raise OptionError(f"{where}: --help is no option of a run")
    content = {n: v for n, v in parsed.changed().items() if n not in NOT_IN_THE_NAME}
    name = _name(labels, [module.__name__, content, point.then])
    own, log = folder / name, folder / LOGS / f"{name}.log"
    resolved = parsed.resolved()
    command = [sys.executable, "-m", module.__name__, *given, f"--output_dir={own}"]
    if "resume_from_checkpoint" in resolved:
        command.append("--resume_from_checkpoint=auto")
    then = tuple(_step(title, words, own, where) for title, words in point.then.items())
    trains = bool(resolved.get("do_train", True))
    if then and not trains:
        raise OptionError(f"{where}: `then` goes with runs that train")
    return Job(name, labels, part, module.__name__, options, own, log, tuple(command), trains, then)


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as they are typed, `--name=value`."""
    return [f"--{name}={_text(value)}" for name, value in options.items()]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _program(name: str, where: str) -> ModuleType:
    """The module of a program: one of examples/, else one by its full name."""
    for full in (f"examples.{name}", name):
        try:
            found = importlib.util.find_spec(full) is not None
        except (ImportError, ValueError):
            found = False
        module = importlib.import_module(full) if found else None
        if hasattr(module, "options_of"):
            return module
    raise OptionError(
        f"{where}: there is no program {name!r} whose runs can be swept; there are run_glue, "
        "run_squad, run_multiple_choice, run_nlg and pretrain, or modules with `options_of(words)`"
    )


def _name(labels: Mapping[str, str], content: list[Any]) -> str:
    """Words for people, and a hash of what tells the run from every other."""
    words = [f"s{word}" if axis == "seed" else word for axis, word in labels.items()]
    shown = re.sub(r"[^A-Za-z0-9_.,+-]+", "_", "-".join(words))[:LONGEST].strip("-.") or "run"
    text = json.dumps(content, sort_keys=True)
    return f"{shown}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _step(title: str, words: Any, run: Path, where: str) -> Step:
    """A command of `then`: its first word a program of ours, {run} and {out} put in."""
    if not isinstance(words, str) or "{out}" not in words:
        raise OptionError(f"{where}: then: {title}: a command that writes {{out}} is needed")
    aside, result = run / f"{title}.part", run / title
    program, *rest = shlex.split(words)
    if importlib.util.find_spec(program) is None:
        raise OptionError(f"{where}: then: {title}: there is no module {program}")
    filled = [word.replace("{run}", str(run)).replace("{out}", str(aside)) for word in rest]
    return Step((sys.executable, "-m", program, *filled), aside, result)
