"""How threads wait is chosen by what else runs, before torch is imported."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from examples.training import threads

linux = pytest.mark.skipif(platform.system() != "Linux", reason="Linux says what runs")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine(runnable, cpus, usable)`: one with so many runnable threads, this one included."""

    def make(runnable: int, cpus: int = 2, usable: int = 2) -> None:
        (tmp_path / "loadavg").write_text(f"0.00 0.00 0.00 {runnable}/300 12345\n")
        monkeypatch.setattr(threads, "LOADAVG", tmp_path / "loadavg")
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
        monkeypatch.setattr(sys, "modules", {n: m for n, m in sys.modules.items() if n != "torch"})
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GOMP_SPINCOUNT", "unset")  # so that it is put back in any case
        del os.environ["GOMP_SPINCOUNT"]

    return make


@pytest.mark.parametrize(
    ("runnable", "cpus", "usable", "wanted"),
    [
        (1, 2, 2, False),  # alone
        (2, 2, 2, True),  # one other thread takes a processor from ours
        (9, 2, 2, True),
        (1, 64, 64, False),
        (2, 64, 64, True),
        (41, 64, 8, False),  # 24 processors are free, and we use 8
        (61, 64, 8, True),
    ],
)
def test_threads_sleep_where_there_are_more_than_processors(
    machine, runnable: int, cpus: int, usable: int, wanted: bool
) -> None:
    machine(runnable, cpus, usable)
    assert threads.spin_briefly_beside_others() is wanted
    assert os.environ.get("GOMP_SPINCOUNT") == (threads.SPINS if wanted else None)


def test_one_thread_waits_for_nobody(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not threads.spin_briefly_beside_others()


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_has_set_stays(machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine(9)
    monkeypatch.setenv(name, "ACTIVE")
    before = dict(os.environ)
    assert not threads.spin_briefly_beside_others() and os.environ == before


@pytest.mark.parametrize("text", ["", "0.1 0.2 0.3 many/300 1", None])
def test_a_system_that_does_not_say(
    machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    machine(9)
    if text is None:
        monkeypatch.setattr(threads, "LOADAVG", tmp_path / "none")
    else:
        threads.LOADAVG.write_text(text)
    assert threads.runnable_others() is None
    assert not threads.spin_briefly_beside_others() and "GOMP_SPINCOUNT" not in os.environ


def test_after_torch_it_would_be_too_late(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(9)
    monkeypatch.setitem(sys.modules, "torch", object())
    assert not threads.spin_briefly_beside_others()


@linux
def test_another_program_is_seen_and_openmp_obeys() -> None:
    """A run that starts beside a busy program; OpenMP itself prints what it was told."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    code = (
        "from examples.training import threads; import os;"
        "os.cpu_count = lambda: 2; os.sched_getaffinity = lambda _: {0, 1};"
        "assert threads.spin_briefly_beside_others();"
        "import torch; torch.rand(300, 300) @ torch.rand(300, 300)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    finally:
        busy.kill()
        busy.wait()
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not use GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


def test_programs_choose_before_torch_is_imported() -> None:
    code = (
        "import sys; from examples.training import threads; from examples.program import main as m;"
        "threads.spin_briefly_beside_others = lambda: print('torch' in sys.modules);"
        "m.run_main(lambda argv: 0, [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"], done.stderr
