"""The small pretrained model is found, checked, and a silent hub costs seconds."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples import backbone


def test_the_installed_weights_are_the_expected_file(minilm_dir: Path) -> None:
    assert backbone.checked(minilm_dir) == minilm_dir


def test_a_folder_is_taken_before_anything_else(minilm_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(backbone, "hub_answers", lambda: pytest.fail("the hub was asked"))
    assert backbone.minilm(minilm_dir) == minilm_dir
    monkeypatch.setenv("RANKWISE_MINILM", str(minilm_dir))
    assert backbone.minilm() == minilm_dir


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file.*model.safetensors"):
        backbone.minilm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not these")
    with pytest.raises(SystemExit, match="SHA-256 is .*expected 53aa5117"):
        backbone.minilm(tmp_path)


def ask_in_a_process(**variables: str) -> tuple[bool, float]:
    """`hub_answers()` of a fresh process (the hub's address is read at import), and its seconds."""
    code = (
        "import time; from examples import backbone; import transformers_patched.checkpoint;"
        "start = time.perf_counter(); print(backbone.hub_answers(), time.perf_counter() - start)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    answer, seconds = done.stdout.split()
    return answer == "True", float(seconds)


def test_a_hub_that_accepts_and_stays_silent_costs_at_most_five_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        answered, seconds = ask_in_a_process(HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert not answered and seconds < 5.0


def test_offline_asks_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        answered, seconds = ask_in_a_process(
            HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HUB_OFFLINE="1"
        )
    assert not answered and seconds < 1.0


def test_without_hub_the_package_is_installed(tmp_path: Path, monkeypatch, minilm_dir) -> None:
    found = iter([None, minilm_dir])
    commands = []

    class Done:
        returncode = 0

    monkeypatch.delenv("RANKWISE_MINILM", raising=False)
    monkeypatch.setattr(backbone, "from_package", lambda: next(found))
    monkeypatch.setattr(backbone, "from_hub", lambda local_files_only: None)
    monkeypatch.setattr(backbone, "hub_answers", lambda: False)
    monkeypatch.setattr(
        backbone.subprocess, "run", lambda command, **_: commands.append(command) or Done()
    )
    assert backbone.minilm() == minilm_dir
    assert commands[0][-2:] == ["--no-deps", backbone.PACKAGE]
