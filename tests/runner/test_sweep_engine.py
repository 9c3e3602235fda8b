"""Sweeps that run: what is skipped, tried again, reported; a sweep that is killed and goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.paths import ROOT
from support.runner_cases import lines

from examples import program
from examples.data.cache import cached
from examples.errors import OptionError, RunError
from examples.sweep import main
from examples.sweeps.engine import Engine, Fixed
from examples.sweeps.jobs import Job, make_job
from examples.sweeps.launchers import local
from examples.sweeps.ledger import Ledger
from examples.sweeps.progress import Board, Running, clock, seconds_left
from examples.sweeps.sheet import Point

STUB = "support.stub_program"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@pytest.fixture(autouse=True)
def _imports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT.get(name, "1"))


def sheet(folder: Path, **values: object) -> Path:
    path = folder / "sweep.yaml"
    whole = {"program": STUB, "output_dir": str(folder / "out"), **values}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def summary(folder: Path) -> dict[str, list[dict]]:
    """status -> the runs of the last call."""
    found: dict[str, list[dict]] = {}
    for run in json.loads((folder / "out" / "sweep.json").read_text())["runs"]:
        found.setdefault(run["status"], []).append(run)
    return found


def starts(folder: Path) -> list[int]:
    """The step from which each attempt of a stub went on."""
    return [int(line) for line in (folder / "starts").read_text().split()]


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_twelve_runs_of_which_two_fail_and_the_sweep_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, shy = ({"task_name": n, "fail": f} for n, f in (("bad", "always"), ("shy", "once")))
    tasks = ["a", "b", "c", bad, shy, {"task_name": "slow", "pause": 0.3, "steps": 8}]
    path = sheet(tmp_path, grid={"task_name": tasks[::-1], "seed": [0, 1]})
    command = [sys.executable, "-m", "examples.sweep", str(path), "--lanes", "2"]
    killed = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    out = tmp_path / "out"

    def slow_ones() -> list[Path]:
        return [folder for folder in out.glob("slow-*") if (folder / "step").exists()]

    wait_until(lambda: len(slow_ones()) == 2)
    killed.kill()
    killed.wait()
    reached = {folder: (folder / "step").read_text() for folder in slow_ones()}
    time.sleep(0.5)
    again = {folder: (folder / "step").read_text() for folder in slow_ones()}
    assert again == reached  # they died with it

    assert main([str(path), "--lanes", "2"]) == 1
    found = summary(tmp_path)
    assert {status: len(runs) for status, runs in found.items()} == {"done": 10, "failed": 2}
    for folder, step in reached.items():
        assert starts(folder) == [0, int(step)]  # it went on
    for run in found["done"]:
        assert (Path(run["folder"]) / "all_results.json").exists() and run["log_tail"] == []
    for run in found["failed"]:
        assert run["options"]["task_name"] == "bad" and run["seconds"] > 0
        assert run["log_tail"][-1] == "error: made to fail"
        assert starts(Path(run["folder"])) == [0, 1]  # tried twice, the second time from there
    shown = capsys.readouterr()
    assert shown.err.count("again  ") == 4 and shown.err.count("error: made to fail") == 4
    assert "10 done, 2 failed" in shown.out and "[12/12]" in shown.err
    rows = {row["folder"]: row for row in lines(out / "runs.jsonl")}
    assert len(rows) == 12
    for row in rows.values():
        task = row["labels"]["task_name"]
        assert row["attempts"] == (2 if task in ("bad", "shy", "slow") else 1)
        assert row["state"] == ("failed" if task == "bad" else "done")

    assert main([str(path), "--lanes", "2"]) == 1  # what failed is tried anew, what is done is not
    found = summary(tmp_path)
    assert {status: len(runs) for status, runs in found.items()} == {"skipped": 10, "failed": 2}
    rows = {row["folder"]: row for row in lines(out / "runs.jsonl")}
    assert sorted(row["attempts"] for row in rows.values()) == [1] * 6 + [2] * 4 + [4] * 2


def test_an_interrupted_sweep_ends_its_runs_and_says_so(tmp_path: Path) -> None:
    path = sheet(tmp_path, options={"pause": 0.2, "steps": 100}, grid={"seed": [0, 1, 2]})
    command = [sys.executable, "-m", "examples.sweep", str(path), "--lanes", "1"]
    sweep = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any((tmp_path / "out").glob("s0-*/step")))
    [step] = (tmp_path / "out").glob("s0-*/step")
    with pytest.raises(RunError, match="another run is writing there"):
        main([str(path)])
    sweep.send_signal(signal.SIGTERM)
    _, error = sweep.communicate()
    assert sweep.returncode == 130 and "the same command goes on" in error
    reached = step.read_text()
    time.sleep(0.5)
    assert step.read_text() == reached
    rows = lines(tmp_path / "out" / "runs.jsonl")
    assert [row["state"] for row in rows] == ["waiting"] * 3 and rows[0]["seconds"] > 0
    assert not (tmp_path / "out" / ".claim").exists()


def test_a_command_after_the_run_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "then_write.py").write_text(
        "import pathlib, sys\n"
        "run, out = map(pathlib.Path, sys.argv[1:])\n"
        "assert (run / 'all_results.json').exists() and not out.exists()\n"
        "out.mkdir()\n"
        "(out / 'x').touch()\n"
        "if not (run / 'again').exists(): (run / 'again').touch(); sys.exit(3)\n"
    )
    path = sheet(tmp_path, then={"cut": "then_write {run} {out}"})
    before = os.environ["PYTHONPATH"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{before}{os.pathsep}{tmp_path}")
        patch.syspath_prepend(tmp_path)
        assert main([str(path)]) == 0
        [row] = lines(tmp_path / "out" / "runs.jsonl")
        folder = tmp_path / "out" / row["folder"]
        assert row["attempts"] == 2 and starts(folder) == [0]  # the run itself was not repeated
        assert (folder / "cut" / "x").exists() and not (folder / "cut.part").exists()
        assert main([str(path)]) == 0 and [*summary(tmp_path)] == ["skipped"]


def test_a_run_that_writes_no_result_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_result.py").write_text("from support.stub_program import options_of\n")
    monkeypatch.setenv("PYTHONPATH", f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{tmp_path}")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([str(sheet(tmp_path, program="no_result"))]) == 1
    [run] = summary(tmp_path)["failed"]
    assert run["log_tail"][-1] == "the program ended well, but without all_results.json"


# -- a search ---------------------------------------------------------------------------------


def test_every_place_is_tuned_and_its_winner_run_over_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"task_name": "b", "best_rate": 0.1, "search": {"learning_rate": [0.1, 1]}}
    path = sheet(
        tmp_path,
        options={"steps": 1},
        grid={"task_name": ["a", other], "seed": [0, 1]},
        search={"options": {"learning_rate": [0.01, 0.001]}, "metric": "score"},
    )
    assert main([str(path)]) == 0
    assert len(summary(tmp_path)["done"]) == 6  # 2 x (2 tried, and seed 1 of the winner)
    rows = lines(tmp_path / "out" / "search.jsonl")
    chosen = {row["cell"]["task_name"]: row["options"] for row in rows if row["chosen"]}
    assert len(rows) == 4
    assert chosen == {"a": {"learning_rate": 0.001}, "b": {"learning_rate": 0.1}}
    for row in rows:
        assert row["metric"] == "eval_score" and row["seed"] == 0 and row["state"] == "done"
        assert row["value"] == row["last"] == row["best"]
        assert row["value"] == pytest.approx(1.0 if row["chosen"] else 0.1, abs=1e-9)
    runs = lines(tmp_path / "out" / "runs.jsonl")
    assert sorted(run["part"] for run in runs) == ["grid"] * 4 + ["search"] * 2
    table = capsys.readouterr().out
    assert "* a" in table and "learning_rate 0.001" in table and "eval_score 1.0000" in table
    assert main([str(path)]) == 0 and len(summary(tmp_path)["skipped"]) == 6


def test_a_search_that_is_done_in_parts_keeps_its_whole_table(tmp_path: Path) -> None:
    path = sheet(
        tmp_path,
        options={"steps": 1},
        grid={"task_name": ["a", "b"], "seed": [0, 1]},
        search={"options": {"learning_rate": [0.01, 0.001]}, "metric": "score"},
    )
    for part, runs in (("b", 3), ("a", 3)):
        assert main([str(path), "--only", f"task_name={part}"]) == 0
        assert len(summary(tmp_path)["done"]) == runs
    rows = lines(tmp_path / "out" / "search.jsonl")
    assert [row["cell"]["task_name"] for row in rows] == ["b", "b", "a", "a"]
    assert main([str(path)]) == 0 and len(summary(tmp_path)["skipped"]) == 6
    assert len(lines(tmp_path / "out" / "search.jsonl")) == 4


def test_a_metric_that_no_run_has_is_named(tmp_path: Path) -> None:
    search = {"options": {"learning_rate": [0.001]}, "metric": "f1"}
    with pytest.raises(OptionError, match="has no eval_f1; it has eval_score"):
        main([str(sheet(tmp_path, options={"steps": 1}, search=search))])


def test_optuna_chooses_what_is_tried(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    rate = {"low": 1e-4, "high": 1e-1, "log": True}
    search = {"by": "optuna", "runs": 2, "options": {"learning_rate": rate}}
    path = sheet(tmp_path, options={"steps": 1}, grid={"seed": [0, 1]}, search=search)
    assert main([str(path)]) == 0
    rows = lines(tmp_path / "out" / "search.jsonl")
    [chosen] = [row for row in rows if row["chosen"]]
    assert len(rows) == 2 and chosen["value"] == max(row["value"] for row in rows)
    assert len(summary(tmp_path)["done"]) == 3  # and seed 1 of the winner
    assert main([str(path)]) == 0 and [*summary(tmp_path)] == ["skipped"]
    again = lines(tmp_path / "out" / "search.jsonl")
    assert [row["options"] for row in again] == [row["options"] for row in rows]


def test_optuna_halves_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from examples.sweeps.sampling import OptunaSampler

    options = {"learning_rate": {"low": 1e-4, "high": "1e-1", "log": True}, "r": [2, 4]}
    settings = {"runs": 3, "halving": 2, "metric": "score"}

    def sampler() -> OptunaSampler:
        point = Point(STUB, {}, {"task_name": "a"})
        return OptunaSampler(tmp_path, point, options, settings, 0, "here")

    first = sampler()
    assert {v["r"] for v in first.samples()} == {2, 4}
    assert {v["learning_rate"] for v in first.samples()} == {1e-4, 1e-1}
    [one] = first.ask()
    assert first.ask() == [] and 1e-4 <= one["learning_rate"] <= 1e-1
    assert one["learning_rate"] == float(f"{one['learning_rate']:.3g}")
    assert not first.lost(one, [0.9]) and not first.lost(one, [0.9, 0.9])
    first.tell(one, "done", 0.9)
    [two] = first.ask()
    assert first.lost(two, [0.1])  # the worse half at the first rung
    first.tell(two, "stopped", None)
    [three] = first.ask()
    then = sampler()  # the sweep was killed: the journal knows
    assert then.earlier() == [one, two] and then.ask() == [three]
    then.tell(three, "failed", None)
    assert then.ask() == [] and sampler().ask() == []  # three runs, good or bad

    for wrong, words in (
        ({"runs": 0}, "runs: a whole number"),
        ({"runs": 3, "halving": 2}, "halving needs to know the metric"),
    ):
        with pytest.raises(OptionError, match=words):
            OptunaSampler(tmp_path, Point(STUB, {}, {}), options, wrong, 0, "here")
    with pytest.raises(OptionError, match="here: lr: a list, or"):
        OptunaSampler(tmp_path, Point(STUB, {}, {}), {"lr": {"low": 1}}, settings, 0, "here")


def test_a_run_that_has_lost_is_ended(tmp_path: Path) -> None:
    options = {"steps": 100, "pause": 0.1}
    lost = make_job(Point(STUB, options, {"task_name": "a"}), tmp_path, "here", "search")

    class Plan(Fixed):
        def lost(self, job: Job) -> bool:
            return (job.folder / "step").exists()

    engine = Engine(
        Plan([lost]), Ledger(tmp_path), Board({}, io.StringIO()), lambda: local.Local(1)
    )
    engine.run()
    assert engine.outcomes[lost.name]["status"] == "stopped"
    [row] = lines(tmp_path / "runs.jsonl")
    reached = (lost.folder / "step").read_text()
    assert row["state"] == "stopped" and row["attempts"] == 1 and int(reached) < 100
    time.sleep(0.5)
    assert (lost.folder / "step").read_text() == reached


# -- what it shows, and where runs happen -------------------------------------------------------


def job(folder: Path, name: str, task: str = "a") -> Job:
    log = folder / f"{name}.log"
    return Job(name, {"task_name": task}, "grid", STUB, {}, folder / name, log, (), True, ())


def test_one_estimate_for_all(tmp_path: Path) -> None:
    assert seconds_left([10, 2], [5, 5], 2) == 12  # 2 + 5 + 5 in the lane that is free first
    assert seconds_left([], [4, 4, 4], 2) == 8 and seconds_left([3], [], 4) == 3
    assert clock(3723.9) == "1:02:03"
    out = io.StringIO()
    board = Board({}, out)
    board.settled(job(tmp_path, "x"), "done", 40.0, 1, 4)
    board.settled(job(tmp_path, "y", "b"), "failed", 1.0, 2, 4)
    running = job(tmp_path, "z")
    running.log.write_text("step 30/40  loss 1\n$ again\nstep 10/40  loss 0.5  (0:09 left)\n")
    board._shown -= 100
    board.show([Running(running, 30.0)], [job(tmp_path, "w")], 2, 4)
    text = out.getvalue().splitlines()
    assert text[0].startswith("[1/4] done     x  40.0 s")
    # 30 s for a quarter of z, so 90 more; w as long as x
    assert text[2] == "2 of 4 runs (1 done, 1 failed), 0:02:10 left"
    assert text[3] == "  0:00:30  z  step 10/40  loss 0.5"
    board.show([Running(running, 30.0)], [], 2, 4)
    assert len(out.getvalue().splitlines()) == 4  # once a minute


def test_lanes_are_gpus_or_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    there = local.Local()
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    logs = [tmp_path / str(i) for i in range(3)]
    runs = [there.start([sys.executable, "-c", code], log) for log in logs[:2]]
    wait_until(lambda: [run.poll() for run in runs] == [0, 0])
    third = there.start([sys.executable, "-c", code], logs[2])
    wait_until(lambda: third.poll() == 0)
    shown = [log.read_text().split() for log in logs]
    assert there.lanes == 2 and shown == [["2", "1"], ["5", "1"], ["2", "1"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.Local().lanes == local.usable_cores() and local.Local(7).lanes == 7


def test_runs_that_start_together_encode_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        time.sleep(0.2)
        return {"ids": np.arange(3)}

    found: list[np.ndarray] = []

    def run() -> None:
        found.append(cached(make, ["ids"], "key", tmp_path)["ids"])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and all((ids == np.arange(3)).all() for ids in found)
    assert [path.suffix for path in (tmp_path / "encoded").iterdir()] == [".safetensors"]


def test_slurm_jobs_on_submitits_local_executor(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    path = sheet(
        tmp_path,
        grid={"task_name": [{"task_name": "b", "fail": "once"}]},
        slurm={"cluster": "local", "timeout_min": 2},
    )
    assert main([str(path), "--launcher", "slurm"]) == 0
    assert len(summary(tmp_path)["done"]) == 1
    [row] = lines(tmp_path / "out" / "runs.jsonl")
    assert row["attempts"] == 2 and starts(tmp_path / "out" / row["folder"]) == [0, 1]
    with pytest.raises(OptionError, match="--launcher slurm: .*partitions"):
        path = sheet(tmp_path, slurm={"cluster": "local", "partitions": "x"}, grid={"seed": [9]})
        main([str(path), "--launcher", "slurm"])


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ray", "submitit", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("ray_cluster", "slurm"):
        monkeypatch.delitem(sys.modules, f"examples.sweeps.launchers.{name}", raising=False)
    path = sheet(tmp_path)
    for launcher, package in (("ray", "ray"), ("slurm", "submitit")):
        assert program.run_main(main, [str(path), "--launcher", launcher]) == 2
        assert f"--launcher {launcher}: {package} is not installed" in capsys.readouterr().err
    path = sheet(tmp_path, search={"by": "optuna", "options": {"steps": [1]}, "runs": 1})
    assert program.run_main(main, [str(path)]) == 2
    assert "optuna is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_loses_a_worker_and_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = sheet(
        tmp_path,
        options={"steps": 8, "pause": 0.5},
        grid={"seed": [0, 1]},
    )
    command = [sys.executable, "-m", "examples.sweep", str(path), "--launcher", "ray"]
    sweep = subprocess.Popen(
        [*command, "--lanes", "2"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len([*(tmp_path / "out").glob("s*/step")]) == 2)
    [folder] = (tmp_path / "out").glob("s0-*")
    os.kill(_worker_of(str(folder)), signal.SIGKILL)
    _, error = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, error
    assert len(summary(tmp_path)["done"]) == 2
    rows = {row["labels"]["seed"]: row for row in lines(tmp_path / "out" / "runs.jsonl")}
    assert (rows["0"]["attempts"], rows["1"]["attempts"]) == (2, 1)
    first, second = starts(folder)
    assert first == 0 < second < 8  # it went on where its worker was killed
    assert "Ray: WorkerCrashedError" in (tmp_path / "out/logs" / f"{folder.name}.log").read_text()


def _worker_of(folder: str) -> int:
    """The process that has started the run of that folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
            status = (path.parent / "status").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if f"--output_dir={folder}" in words and "-m" in words:
            [parent] = [row for row in status.splitlines() if row.startswith("PPid:")]
            return int(parent.split()[1])
    raise AssertionError(f"no process of {folder}")
