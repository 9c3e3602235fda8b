"""What a run may write over and remove, one run at a time, and what a resumed run must read."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import ROOT
from support.processes import launch_two
from support.runner_cases import pair_task, results, tiny_bert

from examples import program
from examples.data.tables import write_table
from examples.errors import RunError
from examples.run_glue import main
from examples.training import checkpoints
from examples.training.claim import CLAIM, Claim
from examples.training.replacing import GONE, REPLACED
from peft_custom.state_files import read_tree, write_tree

FAST = (
    "--base_dtype float32 --learning_rate 5e-3 --num_train_epochs 2 --max_length 40 --no_cache "
    "--disable_tqdm --logging_steps 0"
).split()
OVER = "--overwrite_output_dir"
AUTO = ["--resume_from_checkpoint", "auto"]
# Finite in the first epoch, which ends with a checkpoint, and then no more.
LATE = (
    "--max_grad_norm 0 --lr_scheduler_type clr --lr_schedule_first_lr 1e-3 "
    "--lr_schedule_const_epochs 1 --lr_schedule_second_lr 1e30"
).split()
AT_ONCE = "--max_grad_norm 0 --learning_rate 1e30".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    pair_task(folder / "data" / "mrpc", {"train": 24, "validation": 8, "test": 4})
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home / "data")]
    return ["--task_name", "mrpc", *where, "--output_dir", str(out), *FAST, *more]


def run(home: Path, out: Path, *more: str) -> int:
    return program.run_main(main, words(home, out, *more))


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole model: 6 steps, a checkpoint after each epoch."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(home, out, "--method", "full", "--base_dtype", "auto", "--do_predict") == 0
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- inputs --------------------------------------------------------------------------------------


def test_a_models_folder_is_no_output_folder(home: Path, tmp_path: Path, capsys) -> None:
    model = Path(shutil.copytree(home / "bert", tmp_path / "M"))
    before = files(model)
    for more in ([], [OVER], AUTO):
        assert run(home, model, "--model_name_or_path", str(model), *more) == 2
        assert "--output_dir" in (said := capsys.readouterr().err) and str(model) in said
        assert run(home, model, *more) == 2  # nor where it is not what this run reads
        assert "is a model's folder" in capsys.readouterr().err
    (model / "model.safetensors").unlink()
    assert run(home, model, OVER) == 2
    assert "has config.json, and no run's" in capsys.readouterr().err
    assert {name: data for name, data in before.items() if "safetensors" not in name} == files(
        model
    )


@pytest.mark.parametrize(
    ("option", "inside"),
    [
        ("model_name_or_path", "model"),
        ("model_name_or_path", "model/deeper"),
        ("tokenizer_name", "model"),
        ("data_dir", "submission"),
        ("train_file", "metrics.jsonl"),
        ("validation_file", "checkpoint-3/rows.jsonl"),
        ("test_file", "submission/test.jsonl"),
        ("config", "config.json"),
        ("lora_path", "."),
        ("features_path", "model/features.safetensors"),
    ],
)
def test_what_is_read_is_not_written_over(
    home: Path, finished: Path, capsys, option: str, inside: str
) -> None:
    """The folder holds a run of the whole model, which this one is to replace."""
    rows = home / "data" / "mrpc" / "train.jsonl"
    if inside == "model/deeper":
        shutil.copytree(home / "bert", finished / inside)
    elif inside.endswith(("rows.jsonl", "test.jsonl", "features.safetensors")):
        shutil.copy(rows, finished / inside)
    elif option == "train_file":
        shutil.copy(rows, finished / inside)
    before = files(finished)
    more = [OVER, f"--{option}", str(finished / inside)]
    given = words(home, finished, *more)
    if option.endswith("_file"):
        given = given[2:]
        for split in ("train", "validation"):
            if option != f"{split}_file":
                given += [f"--{split}_file", str(rows)]
        at = given.index("--data_dir")
        del given[at : at + 2]
    if option == "features_path":
        given += ["--method", "bim_lora"]
    assert program.run_main(main, given) == 2
    assert f"--{option}" in capsys.readouterr().err
    assert files(finished) == before


def test_a_link_is_no_way_around(home: Path, finished: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "link").symlink_to(finished / "model")
    assert run(home, finished, OVER, "--model_name_or_path", str(tmp_path / "link")) == 2
    assert "which the run would write over" in capsys.readouterr().err
    shutil.rmtree(finished / "model")
    (finished / "model").symlink_to(home / "bert")
    before = files(home / "bert")
    more = ["--method", "full", "--base_dtype", "auto", "--max_train_steps", "1"]
    assert run(home, finished, OVER, *more) == 2
    assert run(home, finished, OVER, "--max_train_steps", "1", "--model_name_or_path", "x") == 2
    assert files(home / "bert") == before


def test_what_waits_to_be_replaced_is_not_read(home: Path, finished: Path, capsys) -> None:
    killed(home, finished, "checkpoints", "save", OVER, after=True)
    model = str(finished / REPLACED / "model")
    assert run(home, finished, OVER, "--model_name_or_path", model) == 2
    assert "which the run would write over" in capsys.readouterr().err


def test_a_checkpoint_from_elsewhere_goes_on_in_no_other_runs_folder(
    home: Path, whole: Path, finished: Path, capsys
) -> None:
    full = ["--method", "full", "--base_dtype", "auto"]
    more = [*full, "--resume_from_checkpoint", str(whole / "checkpoint-3")]
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps({**config, "seed": 5}))
    before = files(finished)
    assert run(home, finished, *more) == 2
    assert "seed was 5, now 0" in capsys.readouterr().err
    assert files(finished) == before
    assert run(home, finished.parent / "new", *more, "--seed", "5") == 2
    assert "seed was 0, now 5" in capsys.readouterr().err
    assert run(home, finished.parent / "new", *more) == 0  # the best weights may be of before


def test_a_run_goes_on_with_its_own_configuration(home: Path, finished: Path) -> None:
    shutil.rmtree(finished / "checkpoint-6")
    more = ["--output_dir", str(finished), "--config", str(finished / "config.json")]
    assert program.run_main(main, [*more, *AUTO]) == 0


# --- what is somebody's --------------------------------------------------------------------------


def test_folders_and_pictures_that_no_run_has_written_stay(home: Path, tmp_path: Path) -> None:
    mine = ["model/weights.bin", "plots/mine.png", "holiday.png"]
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    for _ in range(2):  # the second time a run's config.json is there
        assert run(home, tmp_path / "run", OVER, "--max_train_steps", "1") == 0
        for name in mine:
            assert (tmp_path / "run" / name).read_text() == name
    assert not (tmp_path / "run" / REPLACED).exists()


@pytest.mark.parametrize(
    "name", ["model/mine.txt", "checkpoint-5/mine.txt", "learning_curve.png", "config.json"]
)
def test_what_has_a_results_name_and_is_no_runs_is_refused(
    home: Path, tmp_path: Path, capsys, name: str
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"output_dir": "mine"}')
    more = ["--method", "full", "--base_dtype", "auto", "--max_train_steps", "1"]
    for flag in ([], [OVER], AUTO):
        assert run(home, tmp_path / "run", *more, *flag) == 2
        said = capsys.readouterr().err
        assert name.split("/")[0] in said or "config.json: cannot be read" in said
    assert files(tmp_path / "run") == {name: b'{"output_dir": "mine"}'}


def test_overwriting_removes_what_the_run_before_has_written(home: Path, finished: Path) -> None:
    """It wrote a whole model and predictions; the new one has neither."""
    assert run(home, finished, OVER, "--max_train_steps", "1") == 0
    there = {path.name for path in finished.iterdir()}
    assert "adapter" in there and results(finished)["steps"] == 1
    assert there.isdisjoint({"model", "submission", "checkpoint-3", "checkpoint-6", CLAIM})
    assert there.isdisjoint({REPLACED, GONE})


# --- a replaced run waits until the new one stands -----------------------------------------------


@pytest.mark.parametrize("diverging", [AT_ONCE, LATE])
def test_divergence_leaves_the_run_that_was_to_be_replaced(
    home: Path, finished: Path, capsys, diverging: list[str]
) -> None:
    before = files(finished)
    assert run(home, finished, OVER, *diverging) == 2
    said = capsys.readouterr().err
    assert "diverged; the run that was to be replaced is as it was" in said
    assert files(finished) == before


def test_an_error_leaves_it_too(home: Path, finished: Path, monkeypatch) -> None:
    """Before the first checkpoint the new run is nothing, after it something to go on from."""
    before = files(finished)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    real = checkpoints.save
    monkeypatch.setattr(checkpoints, "write_tree", full)
    assert run(home, finished, OVER) == 2
    assert files(finished) == before
    monkeypatch.undo()
    saved = []
    monkeypatch.setattr(checkpoints, "save", lambda *a: full() if saved else saved.append(real(*a)))
    with pytest.raises(OSError, match="No space"):
        run(home, finished, OVER)
    monkeypatch.undo()
    kept = files(finished / REPLACED)
    assert kept == before and checkpoints.list_checkpoints(finished)[-1].name == "checkpoint-3"
    assert run(home, finished, *AUTO) == 0
    assert results(finished)["steps"] == 6 and not (finished / REPLACED).exists()


KILLED = """
import os, signal, sys
from examples import program
from examples.run_glue import main
from examples.training import {module} as module
real = module.{name}
def dying(*arguments, **more):
    {before}
    os.kill(os.getpid(), signal.SIGKILL)
module.{name} = dying
program.run_main(main, sys.argv[1:])
"""


def killed(home: Path, out: Path, module: str, name: str, *more: str, after: bool = False) -> None:
    """A run that is killed as it calls a function, or after that."""
    call = "real(*arguments, **more)" if after else "pass"
    script = KILLED.format(module=module, name=name, before=call)
    done = subprocess.run(
        [sys.executable, "-c", script, *words(home, out, *more)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_before_its_first_checkpoint_it_has_changed_nothing(
    home: Path, finished: Path, capsys
) -> None:
    before = files(finished)
    killed(home, finished, "checkpoints", "save", OVER)
    assert (finished / REPLACED / "model").is_dir()
    assert run(home, finished) == 2  # whoever comes next puts it right
    assert "holds a finished run" in capsys.readouterr().err
    assert files(finished) == before


@pytest.mark.parametrize("moves", range(18))
def test_killed_while_files_are_moved(
    home: Path, finished: Path, tmp_path: Path, monkeypatch, moves: int
) -> None:
    """Whatever number of them, aside or back: the next one finds all the old run's files."""
    from examples.training import replacing

    before, real, done = files(finished), replacing.os.replace, []

    def some(*paths: object) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(paths)
        real(*paths)

    names = sorted({name.split("/")[0] for name in before})
    monkeypatch.setattr(replacing.os, "replace", some)
    with pytest.raises(KeyboardInterrupt):
        replacing.set_aside(finished, names)
        (finished / "config.json").write_text("the new one's")
        replacing.put_back(finished, names)
    monkeypatch.undo()
    if (finished / REPLACED).is_dir():
        replacing.put_back(finished, names)
    assert files(finished) == before


def test_killed_after_a_checkpoint_it_goes_on(home: Path, finished: Path, capsys) -> None:
    before = files(finished)
    killed(home, finished, "checkpoints", "save", OVER, after=True)
    assert run(home, finished) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert files(finished / REPLACED) == before
    assert run(home, finished, OVER, *AT_ONCE) == 2  # or is replaced, by what comes to nothing
    assert files(finished) == before


# --- one run at a time ---------------------------------------------------------------------------

HOLDING = """
import sys, time
from pathlib import Path
from examples.training.claim import Claim
Claim(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(600)
"""


def test_the_second_run_is_refused_and_the_successor_of_a_killed_one_is_not(
    home: Path, tmp_path: Path, capsys
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == b"taken\n"
        for more in ([], [OVER], AUTO, ["--eval_only", "--do_predict"]):
            assert run(home, tmp_path / "run", *more) == 2
            said = capsys.readouterr().err
            assert "another run is writing there" in said and f"process {first.pid} on" in said
        assert [path.name for path in (tmp_path / "run").iterdir()] == [CLAIM]
    finally:
        first.kill()
        first.communicate()
    assert run(home, tmp_path / "run", "--max_train_steps", "1") == 0
    assert not (tmp_path / "run" / CLAIM).exists()


def test_evaluating_beside_a_run_that_replaces_another(home: Path, finished: Path) -> None:
    """It writes nothing, so it needs no claim, and leaves alone what the run has put aside."""
    killed(home, finished, "checkpoints", "save", OVER)
    before = files(finished)
    assert run(home, finished, "--eval_only") == 0
    assert files(finished) == before


def test_a_claim_ends_with_its_run(tmp_path: Path) -> None:
    one, two = Claim(tmp_path / "a" / "b"), Claim(tmp_path / "a" / "b")
    one.take()
    with pytest.raises(RunError, match="another run"):
        two.take()
    one.release()
    assert not (tmp_path / "a").exists()  # made for nothing
    two.take()
    (tmp_path / "a" / "b" / "kept").touch()
    two.release()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_lock_on_a_file_that_has_gone_is_none(tmp_path: Path, monkeypatch) -> None:
    """Between opening the file and locking it, the run before ends and the next one begins."""
    from examples.training import claim

    one, two, three = (Claim(tmp_path) for _ in range(3))
    one.take()
    real, calls = claim._lock, []

    def late(file: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            one.release()
            three.take()
        real(file)

    monkeypatch.setattr(claim, "_lock", late)
    with pytest.raises(RunError, match="another run"):
        two.take()


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch, capsys) -> None:
    import errno

    from examples.training import claim

    def refuse(file: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim, "_lock", refuse)
    Claim(tmp_path).take()
    assert "has no locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(home: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert run(home, tmp_path / "file" / "run") == 2
    assert f"--output_dir {tmp_path / 'file' / 'run'}" in capsys.readouterr().err
    assert run(home, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err


def test_several_processes_of_a_launch_are_one_run(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    command += ["-m", "examples.run_glue"]
    out = tmp_path / "run"
    for more, status in (((), 0), ((), 1), ((OVER,), 0)):
        done = subprocess.run(
            [*command, *words(home, out, "--max_train_steps", "1", *more)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr[-2000:]
        assert status == 0 or "holds a finished run" in done.stderr
    assert not (out / CLAIM).exists() and not (out / REPLACED).exists()


def test_nothing_holds_the_group_when_it_is_taken_down(home: Path, tmp_path: Path) -> None:
    """A DistributedDataParallel that is freed after it may wait for ever (see `Trainer.let_go`)."""
    said = launch_two(
        [ROOT / "tests/support/alive_at_end.py"],
        *words(home, tmp_path / "run", "--max_train_steps", "1"),
    )
    assert said.count("still there: 0") == 2 and "still there: 1" not in said


# --- what a resumed run reads --------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that was killed after its first epoch."""
    out = tmp_path_factory.mktemp("half") / "run"
    assert run(home, out) == 0
    for name in ("adapter", "checkpoint-6"):
        shutil.rmtree(out / name)
    (out / "all_results.json").unlink()
    return out


def edited(home: Path, to: Path, what: str) -> Path:
    """A copy of the home in which something has changed."""
    shutil.copytree(home, to)
    if what == "base weights":
        path = to / "bert" / "model.safetensors"
        tensors = load_file(path)
        tensors["encoder.layer.1.output.dense.weight"][3, 5] += 1e-6
        save_file(tensors, path)
        return to
    if what == "tokenizer":
        path = to / "bert" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "do_lower_case": False}))
        return to
    split = "validation" if "validation" in what else "train"
    path = to / "data" / "mrpc" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if "labels" in what:
        rows[5]["label"] = 1 - rows[5]["label"]
    else:
        rows[5]["sentence2"] += " bado"
    write_table(path, {name: [row[name] for row in rows] for name in rows[0]})
    return to


@pytest.mark.parametrize(
    "what",
    [
        "texts of the train split",
        "labels of the train split",
        "texts of the validation split",
        "labels of the validation split",
        "base weights",
        "tokenizer",
    ],
)
def test_what_has_changed_since_a_checkpoint_is_named(
    home: Path, half: Path, tmp_path: Path, capsys, what: str
) -> None:
    out = Path(shutil.copytree(half, tmp_path / "run"))
    before = files(out)
    other = edited(home, tmp_path / "other", what)
    where = ["--data_dir", str(other / "data")]
    if what in ("base weights", "tokenizer"):  # of the same name as before
        config = out / "config.json"
        config.write_text(config.read_text().replace(str(home / "bert"), str(other / "bert")))
        where += ["--model_name_or_path", str(other / "bert")]
        before = files(out)
    assert run(home, out, *AUTO, *where) == 2
    said = capsys.readouterr().err
    assert "checkpoint-3" in said
    changed = said.partition("changed since: ")[2].partition(".")[0]
    if what == "tokenizer":
        what = "tokenizer of the train split, tokenizer of the validation split"
    assert sorted(changed.split(", ")) == sorted(what.split(", "))
    assert files(out) == before
    if len(where) == 2:
        assert run(home, out, *AUTO) == 0  # with the old files again, from wherever


def test_checkpoints_without_keys_are_gone_on_from(home: Path, half: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(half, tmp_path / "run"))
    path = out / "checkpoint-3" / "state.safetensors"
    content = read_tree(path)
    assert content.pop("read")
    write_tree(path, content)
    other = edited(home, tmp_path / "other", "texts of the train split")
    assert run(home, out, *AUTO, "--data_dir", str(other / "data")) == 0


def test_features_of_something_else_are_refused(home: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "features.safetensors"
    bim = ["--method", "bim_lora", "--block_size", "8", "--max_train_steps", "1"]
    bim += ["--features_path", str(file), "--collection_steps", "2"]
    assert run(home, tmp_path / "one", *bim) == 0
    before = file.read_bytes()
    # Another seed or rate is no other data, nor are other rows to evaluate on.
    other = edited(home, tmp_path / "validation", "texts of the validation split")
    more = ["--seed", "7", "--learning_rate", "1e-3", "--data_dir", str(other / "data")]
    assert run(home, tmp_path / "two", *bim, *more) == 0
    for what in ("texts of the train split", "labels of the train split", "base weights"):
        other = edited(home, tmp_path / what, what)
        more = ["--data_dir", str(other / "data"), "--model_name_or_path", str(other / "bert")]
        assert run(home, tmp_path / "no", *bim, *more) == 2
        said = capsys.readouterr().err
        assert f"{file} was collected from something else" in said and f"{what}: " in said
    assert run(home, tmp_path / "no", *bim, "--collection_steps", "3") == 2
    said = capsys.readouterr().err
    assert "collection_steps: 2 of 1 batches there, 3 of 1 batches here" in said
    assert file.read_bytes() == before
    save_file(load_file(file), file, metadata={"block_size": "8"})  # of an earlier version
    assert run(home, tmp_path / "three", *bim, "--collection_steps", "3") == 0


def test_the_key_of_weights_sees_every_change() -> None:
    from peft_custom.digest import digest

    torch.manual_seed(0)
    tensors = {"a": torch.randn(70, 33), "b": torch.randn(5).bfloat16(), "c": torch.tensor(3)}
    first = digest(tensors)
    assert first == digest({name: t.clone() for name, t in reversed(tensors.items())})
    assert first == digest({**tensors, "a": torch.randn(71, 33).copy_(torch.cat(
        [torch.zeros(1, 33), tensors["a"]]))[1:]})  # fmt: skip
    for name, change in (
        ("a", lambda t: t.index_fill(0, torch.tensor([69]), 0.0)),
        ("a", lambda t: t.flip(0)),
        ("a", lambda t: t.view(33, 70)),
        ("a", lambda t: torch.where(torch.arange(70 * 33).view(70, 33) == 1000, t + 1e-6, t)),
        ("b", lambda t: t.flip(0)),
        ("b", lambda t: t.float()),
        ("c", lambda t: t + 1),
    ):
        assert digest({**tensors, name: change(tensors[name])}) != first
    assert digest({"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]}) != first
