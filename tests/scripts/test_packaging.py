"""What is declared installs: the two environments agree, and the scripts are what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def pip_part() -> list[str]:
    return next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))


def test_the_conda_environment_has_the_python_that_the_project_admits() -> None:
    assert "python>=3.12" in CONDA["dependencies"] and "pip" in CONDA["dependencies"]
    assert PROJECT["requires-python"] == ">=3.10"  # no upper bound: machines come with newer ones
    assert any(entry.startswith("-e .") for entry in pip_part())


def test_requirements_txt_is_the_core_of_pyproject() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == PROJECT["dependencies"]


def test_every_extra_that_is_promised_exists() -> None:
    promised = {"data", "plots", "nlg", "tracking", "sweep", "test", "dev"}
    assert promised == set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_the_pip_part_of_the_conda_environment_installs(nested_venv: Path, tmp_path: Path) -> None:
    python = nested_venv / "bin" / "python"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(pip_part()).replace("-e .", f"-e {ROOT}") + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    packages = "loralib, peft_custom, transformers_patched, examples"
    code = f"import {packages}, importlib.metadata as m; print(m.version('rankwise'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == PROJECT["version"], done.stderr


def test_scripts_refuse_a_python_that_is_too_old(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "test.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "Python 3.10 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda p: p.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_citation_names_the_methods() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"]["text"] == "Apache-2.0"
    links = {entry["url"].rsplit("/", 1)[1] for entry in citation["references"]}
    assert {"2106.09685", "2210.07558", "2303.10512", "2409.10673", "2211.10155"} <= links


def test_no_text_names_a_machine() -> None:
    """No absolute path of a developer's machine in anything that is committed."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w+")
    found = [
        f"{name}: {match.group()}"
        for name in files
        if name.endswith((".py", ".md", ".sh", ".yml", ".yaml", ".toml", ".cff", ".json", ".jsonl"))
        for match in [pattern.search((ROOT / name).read_text(encoding="utf-8"))]
        if match
    ]
    assert not found, json.dumps(found, indent=1)
