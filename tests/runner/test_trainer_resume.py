"""A run that is killed and goes on ends with the same bytes; failing to save is said."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support.runner_cases import lines, pair_task, results, tiny_bert

from examples import program
from examples.run_glue import main
from examples.training import checkpoints
from examples.training.checkpoints import Progress, RunError, read_state
from peft_custom.state_files import write_tree

ROWS = {"train": 60, "validation": 20}
OPTIONS = (
    "--task_name mrpc --base_dtype float32 --learning_rate 5e-3 --num_train_epochs 3 "
    "--max_length 40 --lora_dropout 0.1 --warmup_ratio 0.1 --logging_steps 1 --eval_steps 3 "
    "--no_cache"
).split()
# What may differ between a run that went through and one that was killed.
TIMES = re.compile("seconds|memory|tokens_per")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    pair_task(folder / "mrpc", ROWS)
    return folder


def words(home, out, *more):
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    return [*where, *OPTIONS, "--output_dir", str(out), *more]


def run(home, out, *more):
    return program.run_main(main, words(home, out, *more))


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An uninterrupted run of 24 steps that saves every second one."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(home, out, "--save_steps", "2", "--save_total_limit", "0") == 0
    return out


def assert_same_end(one, two):
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (
        {k: v for k, v in results(run).items() if not TIMES.search(k)} for run in (one, two)
    )
    assert first == second
    for name in ("metrics.jsonl", "log.jsonl"):
        assert lines(one / name) == lines(two / name), name


def test_kill_9_at_a_random_step(home, whole, tmp_path):
    """Killed twice, at whatever moment after a random step, then let through."""
    rng = random.Random()
    command = [sys.executable, "-m", "examples.run_glue"]
    command += words(home, tmp_path / "run", "--save_steps", "2", "--save_total_limit", "0")
    command += ["--resume_from_checkpoint", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for last in (rng.randint(1, 10), rng.randint(11, 23)):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(f"step {last}/"):
                break
        else:
            pytest.fail("".join(said))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert run(home, tmp_path / "run", *command[-6:]) == 0
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("step", [2, 8, 18, 24])
def test_going_on_from_any_checkpoint(home, whole, tmp_path, step):
    """Step 8 ends an epoch, 18 follows an evaluation, 24 is the end."""
    shutil.copytree(whole, tmp_path / "run")
    save = ["--save_steps", "2", "--save_total_limit", "0"]
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert run(home, tmp_path / "run", *save, "--resume_from_checkpoint", str(checkpoint)) == 0
    assert_same_end(whole, tmp_path / "run")


def test_auto_starts_where_nothing_is_there(home, tmp_path):
    assert (
        run(home, tmp_path / "r", "--max_train_steps", "2", "--resume_from_checkpoint", "auto") == 0
    )
    assert results(tmp_path / "r")["steps"] == 2


def test_old_checkpoints_go_and_the_best_stays(home, tmp_path):
    assert run(home, tmp_path / "run", "--save_steps", "1", "--save_total_limit", "2") == 0
    kept = {path.name for path in checkpoints.list_checkpoints(tmp_path / "run")}
    best = f"checkpoint-{results(tmp_path / 'run')['best_step']}"
    assert kept == {"checkpoint-23", "checkpoint-24", best}


def test_a_checkpoint_holds_no_pickle(whole):
    names = {path.name for path in (whole / "checkpoint-2").iterdir()}
    assert names == {"state.safetensors", "progress.json"}


def test_a_damaged_checkpoint_is_named(home, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-24" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:900])
    more = ["--save_steps", "2", "--save_total_limit", "0", "--resume_from_checkpoint", "auto"]
    assert run(home, tmp_path / "run", *more) == 2
    assert f"{file}: damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoint-24")
    assert run(home, tmp_path / "run", *more) == 0
    assert_same_end(whole, tmp_path / "run")


FULL_DISK = """
import resource, sys
from examples import program
from examples.run_glue import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # no file may grow larger
sys.exit(program.run_main(main, sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_earlier_checkpoint(home, tmp_path):
    """A limit on file sizes stands in for a full disk: saving fails in the middle of a file."""
    save = ["--save_steps", "2", "--save_total_limit", "0"]
    assert run(home, tmp_path / "part", *save, "--max_train_steps", "24") == 0
    shutil.rmtree(tmp_path / "part" / "adapter")
    for path in checkpoints.list_checkpoints(tmp_path / "part"):
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    (tmp_path / "part" / "all_results.json").unlink()
    file = tmp_path / "part" / "checkpoint-4" / "state.safetensors"
    before = file.read_bytes()
    more = [*save, "--max_train_steps", "24", "--resume_from_checkpoint", "auto"]
    script = FULL_DISK.format(limit=len(before) // 2)
    done = subprocess.run(
        [sys.executable, "-c", script, *words(home, tmp_path / "part", *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "checkpoint-4 is untouched" in done.stderr
    assert file.read_bytes() == before
    assert not list((tmp_path / "part").glob("*.tmp"))
    assert run(home, tmp_path / "part", *more) == 0


def test_any_tree_of_values_comes_back(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "a": {0: shared, 1: shared[2:]},
        "b": (1, 2.5, None, True, "x", [torch.zeros(2, dtype=torch.bfloat16)]),
        "$odd": float("inf"),
    }
    write_tree(tmp_path / "state.safetensors", state)
    found = read_state(tmp_path / "state.safetensors")
    assert torch.equal(found["a"][0], shared) and torch.equal(found["a"][1], shared[2:])
    assert found["b"][:5] == state["b"][:5] and found["b"][5][0].dtype == torch.bfloat16
    assert found["$odd"] == float("inf")
    with pytest.raises(TypeError, match="x is a function"):
        write_tree(tmp_path / "no.safetensors", {"x": lambda: 0})
    with pytest.raises(RunError, match="no such file"):
        read_state(tmp_path / "none")


def test_checkpoints_of_earlier_versions_are_read() -> None:
    names = "step tokens seconds best best_step worse stopped loss_sum loss_steps log_sum log_steps"
    progress = Progress(step=7, evals_without_gain=3)
    saved = progress.to_dict()
    assert list(saved) == names.split() and saved["worse"] == 3
    assert Progress.from_dict(saved) == progress
