#!/usr/bin/env python3
"""Repeats published pruning runs: rows of hparams/hyperparameters.xlsx, on SQuAD, MNLI or QQP.

    python scripts/run_squad_from_excel_sheet.py --sheet squad
    python scripts/run_squad_from_excel_sheet.py --sheet squad --row 29 --dry_run
    python scripts/run_squad_from_excel_sheet.py --sheet mnli --exp_id 'topK_1.0_*_…' \\
        --remaining 30.05 --num_prototypes 64 --data_dir data

Without a choice the sheet's rows are listed. Options that are not this program's go to the runs
(`--seed 1`, `--teacher RUN`), where they win over the sheet's. Every row has a folder of its own in
--output_dir and a log beside it; a row that is done is skipped, one that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import program  # noqa: E402
from examples.cli.groups import OPTION_CLASSES  # noqa: E402
from examples.cli.squad import SquadOptions  # noqa: E402
from examples.errors import OptionError, RunError, UserError  # noqa: E402
from examples.sweeps.records import in_lanes  # noqa: E402
from examples.sweeps.workbook import (  # noqa: E402
    SHEETS,
    Row,
    Selection,
    listed,
    read_workbook,
    select,
)
from examples.sweeps.workbook_options import PROGRAMS, options, with_more  # noqa: E402

WORKBOOK = ROOT / "hparams" / "hyperparameters.xlsx"
MODEL, OWNER = "bert-base-uncased", "google-bert"
# The results to compare with the sheet's, in the run's all_results.json.
METRICS = {
    "squad": ("eval_exact", "eval_f1"),
    "mnli": ("eval_matched_accuracy", "eval_mismatched_accuracy"),
    "qqp": ("eval_accuracy", "eval_f1"),
}
TAIL = 15  # lines of a failed run's log that are shown


@dataclass(frozen=True)
class Job:
    """One row's run.

    Attributes:
        row: of the sheet.
        words: the program's module and its options.
        folder: of the run; its log stands beside it.
    """

    row: Row
    words: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_suffix(".log")

    @property
    def shown(self) -> str:
        """The command as it could be typed."""
        return "python -m " + shlex.join(self.words)


# -- the command line ---------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This program's options, and the words for the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--workbook", type=Path, default=WORKBOOK, help="another workbook of this layout")
    add("--sheet", choices=SHEETS, default="squad", help="squad unless given")
    add("--exp_id", help="the rows of this group")
    add("--remaining", help="what is left of the weights: 30.05, 30.05%% or 0.3005")
    add("--num_prototypes", type=int, help="SPLoPA's K; 0: rows without SPLoPA")
    add("--final_lambda", type=float, help="weight of the regulariser")
    add("--row", default="", help="number of a row, or several: 29,34")
    add("--marked", action="store_true", help="the rows whose Marker is *")
    add("--all", action="store_true", help="every row that is meant, not just one")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    add("--jobs", type=int, help="runs at a time (1, or as many as --gpus)")
    add("--gpus", default="", help="GPUs, one to a run: 0,1")
    add("--model_name_or_path", help=f"instead of {MODEL}")
    add(
        "--data_dir", help="folder with the task's folder; else data/ beside scripts/, else the hub"
    )
    add("--output_dir", type=Path, default=Path("runs") / "workbook", help="folder of the runs")
    return parser.parse_known_args(argv)


def selection(o: argparse.Namespace) -> Selection:
    """What the options choose.

    Raises:
        OptionError: --row holds something else than numbers.
    """
    words = [word.strip() for word in o.row.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise OptionError(f"--row {o.row}: numbers of rows are needed, such as 29 or 29,34")
    return Selection(
        exp_id=o.exp_id,
        remaining=o.remaining,
        num_prototypes=o.num_prototypes,
        final_lambda=o.final_lambda,
        numbers=tuple(map(int, words)),
        marked=o.marked,
    )


def model(given: str | None) -> str:
    """The model: as given, or what scripts/download.sh brought, or the hub's."""
    places = (ROOT / "checkpoints" / MODEL, ROOT / MODEL)
    return given or next((str(p) for p in places if p.is_dir()), f"{OWNER}/{MODEL}")


def job(row: Row, o: argparse.Namespace, more: Sequence[str]) -> Job:
    """The run of a row."""
    folder = o.output_dir / f"{row.sheet}_row{row.number:03}"
    data = o.data_dir
    if data is None and (ROOT / "data" / row.sheet).is_dir():
        data = str(ROOT / "data")
    words = [*options(row), "--model_name_or_path", model(o.model_name_or_path)]
    words += ["--data_dir", data] if data else []
    words += ["--output_dir", str(folder)]
    if not any(word.startswith("--overwrite_output_dir") for word in more):
        words += ["--resume_from_checkpoint", "auto"]
    return Job(row, [PROGRAMS[row.sheet], *with_more(words, more)], folder)


def parsed(job: Job) -> program.Options:
    """What the program makes of the command.

    Raises:
        OptionError: it refuses an option.
    """
    classes = dict(OPTION_CLASSES)
    if job.row.sheet == "squad":
        classes["data"] = SquadOptions
    found = program.parse(job.words[1:], job.words[0], "", classes, "task_name")
    assert found is not None  # --help is this program's own
    return found


# -- running ------------------------------------------------------------------------------------


def done(job: Job) -> bool:
    """Whether the run has ended; with --overwrite_output_dir it is made anew.

    Raises:
        RunError: the folder has a run of other options.
    """
    if not (job.folder / "all_results.json").is_file() or "--overwrite_output_dir" in job.words:
        return False
    from examples.training.run_folder import NOT_PART_OF_A_RUN

    try:
        saved = json.loads((job.folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{job.folder / 'config.json'}: cannot be read ({error})") from error
    now = json.loads(json.dumps(parsed(job).resolved()))
    other = [n for n in now if n not in NOT_PART_OF_A_RUN and saved.get(n) != now[n]]
    if other:
        raise RunError(
            f"{job.folder} has a run whose {other[0]} was {saved.get(other[0])}, now "
            f"{now[other[0]]}: choose another --output_dir, or --overwrite_output_dir"
        )
    return True


class Runner:
    """Runs jobs, several at a time, each on a GPU of its own.

    Args:
        jobs: runs at a time.
        gpus: their names; none: every run sees what there is.

    Attributes:
        failed: exit status of the runs that ended with one.
    """

    def __init__(self, jobs: int, gpus: Sequence[str]) -> None:
        self.jobs, self.failed = jobs, dict[int, int]()
        self.gpus: queue.Queue[str] | None = None
        if gpus:
            self.gpus = queue.Queue()
            for gpu in gpus:
                self.gpus.put(gpu)

    def run(self, jobs: Sequence[Job]) -> None:
        """All of them; a failed one does not stop the others."""
        in_lanes(self.jobs, [lambda job=job: self._one(job) for job in jobs])

    def _one(self, job: Job) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(paths)}
        if self.jobs > 1:  # processes that share the cores
            variables["OMP_NUM_THREADS"] = os.environ.get(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs))
            )
        gpu = self.gpus.get() if self.gpus else None
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        print(f"row {job.row.number}: started, log in {job.log}", flush=True)
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "a", encoding="utf-8") as log:
                print(f"+ {job.shown}", file=log, flush=True)
                status = subprocess.run(
                    [sys.executable, "-m", *job.words],
                    env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT,
                ).returncode  # fmt: skip
        finally:
            if gpu is not None and self.gpus:
                self.gpus.put(gpu)
        if status:
            self.failed[job.row.number] = status
            lines = job.log.read_text("utf-8", "replace").splitlines()[-TAIL:]
            told = "\n".join(f"  {line}" for line in lines)
            print(f"row {job.row.number}: failed with status {status}\n{told}", file=sys.stderr)


def compared(job: Job) -> str:
    """What the row's run has reached, beside what was published."""
    found: dict[str, Any] = json.loads((job.folder / "all_results.json").read_text("utf-8"))
    own = [
        f"{n.removeprefix('eval_')} {found[n]:.4g}" for n in METRICS[job.row.sheet] if n in found
    ]
    if "encoder_kept" in found:
        own.append(f"remaining {100 * found['encoder_kept'] / found['encoder_weights']:.2f} %")
    return f"{job.row}\n    here: {', '.join(own)}"


def execute(jobs: Sequence[Job], o: argparse.Namespace) -> int:
    """Runs what is not done yet; 1 if a run failed."""
    gpus = [gpu.strip() for gpu in o.gpus.split(",") if gpu.strip()]
    lanes = (len(gpus) or 1) if o.jobs is None else o.jobs
    if lanes < 1 or (gpus and lanes > len(gpus)):
        raise OptionError(
            f"--jobs {lanes}: " + (f"--gpus names {len(gpus)} GPUs" if lanes > 0 else "1 or more")
        )
    waiting = []
    for one in jobs:
        if done(one):
            print(f"row {one.row.number}: done already, in {one.folder}")
        else:
            waiting.append(one)
    runner = Runner(lanes, gpus)
    runner.run(waiting)
    for one in jobs:
        if one.row.number not in runner.failed:
            print(compared(one))
    return 1 if runner.failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; what a user can mend is one line on stderr and exit status 2."""
    o, more = arguments(argv)
    try:
        rows = read_workbook(o.workbook, o.sheet)
        wanted = selection(o)
        if wanted.empty and not o.all:
            if more:
                raise OptionError(f"{' '.join(more)}: choose a row for it, by --row for instance")
            local = sum(not (row.distilled or row.ranks_all) for row in rows)
            print(f"{SHEETS[o.sheet]}: {len(rows)} rows, {local} of them without teacher and with "
                  f"a ranking per matrix\n{listed(rows)}")  # fmt: skip
            return 0
        jobs = [job(row, o, more) for row in select(rows, wanted, several=o.all)]
        for one in jobs:
            parsed(one)  # nothing runs before all of them are possible
        if o.dry_run:
            print("\n".join(one.shown for one in jobs))
            return 0
        return execute(jobs, o)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
