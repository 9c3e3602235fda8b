"""benchmarks/gpu.sh: its commands exist with the options it gives them, and they run."""

import argparse
import importlib
import importlib.util
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from benchmarks.common import e2e, models, peers

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The script, with this Python and without data unless `more` says so."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RANKWISE_DATA": "", **more}
    command = ["bash", SCRIPT, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


class Parsed(Exception):
    """Ends a benchmark once its options are known."""


@pytest.fixture
def parse_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser) -> None:
        raise Parsed(parse(self))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize("data", ["", "DATA"])
def test_every_command_parses(
    quick: list[str], data: str, parse_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = run("--dry_run", *quick, RANKWISE_DATA=data)
    assert dry.returncode == 0, dry.stderr
    commands = [shlex.split(line.removeprefix("+")) for line in dry.stdout.splitlines()]
    assert len(commands) == 16
    for python, m, module, *words in commands:
        assert (python, m) == ("python", "-m")
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed) as found:
            importlib.import_module(module).main()
        (o,) = found.value.args
        assert o.device == "cuda"
        if hasattr(o, "random"):
            assert o.random == (not data) and (o.data_dir == Path(data)) == bool(data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fast"], "unknown option --fast"),
        (["--device", "tpu"], "--device: cuda or cpu"),
        (["--device"], "--device: cuda or cpu"),
    ],
)
def test_bad_options_are_refused(words: list[str], said: str) -> None:
    bad = run(*words)
    assert bad.returncode == 2 and said in bad.stderr and not bad.stdout


def test_failures_are_listed_and_the_rest_still_runs(tmp_path: Path) -> None:
    """A `python` that fails for one benchmark, hangs for none."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$2"\n[ "$2" != benchmarks.gpt2_step ] || exit 3\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    done = run("--device", "cpu", PATH=path, OUT=str(out))
    assert done.returncode == 1
    said = "failed: gpt2_step: exit status 3, benchmarks.gpt2_step\n"
    assert done.stdout.endswith(said) and (out / "failures.txt").read_text() == said
    assert "benchmarks.compact_speed\n" in (out / "compact_speed.txt").read_text()  # the last one
    assert (out / "header.txt").read_text().startswith("commit: ")


@pytest.mark.slow
def test_quick_mode_runs_every_command(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--quick", OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert "torch: " in outputs.pop("header.txt")
    assert len(outputs) == 16
    for name, text in outputs.items():
        assert len(text.splitlines()) > 1 and "Traceback" not in text, (name, text)


def test_without_the_peer_ours_is_measured_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "Worker", lambda *words: started.append(words))
    peers.importable.cache_clear()
    try:
        workers = peers.step_workers("a.module", ["--batch", 2], ["ours", "peer", "peer, 384"])
    finally:
        peers.importable.cache_clear()
    assert started == [("a.module", "--batch", 2, "--side", "ours")]
    assert math.isnan(workers["peer, 384"].ask()["tokens_per_second"])
    assert capsys.readouterr().out == "left out: the peer, for lack of transformers and peft\n"


def test_random_tokens_stand_for_the_data() -> None:
    """Same seed, same rows; lengths as the real ones; answers inside their windows."""
    from benchmarks.squad_step import random_windows

    o = argparse.Namespace(random=True)
    rows = e2e.training_rows(o, 500, 3)
    assert rows == e2e.training_rows(o, 500, 3) != e2e.training_rows(o, 500, 4)
    first, second = (np.array([len(row[k]) for row in rows]) for k in (0, 1))
    assert (first.min(), first.max()) == (13, 43) and (second.min(), second.max()) == (9, 40)
    assert all(a.index(e2e.EOS) == len(a) - 1 for row in rows for a in row)
    o = argparse.Namespace(seed=0, steps=2, batch=300, size="minilm")
    windows = random_windows(o, 1)
    lengths = np.array([len(row) for batch, _ in windows for row in batch])
    assert lengths.max() == 384 and 160 < lengths.mean() < 184
    assert (
        max(max(row) for batch, _ in windows for row in batch)
        < models.SIZES["minilm"]["vocab_size"]
    )
    for batch, spans in windows:
        assert (spans[:, 0] <= spans[:, 1]).all()
        assert (spans[:, 1] < [len(row) for row in batch]).all()
