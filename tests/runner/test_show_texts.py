"""What a run has written is shown beside its tables, a reference each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.show_texts import main

LINES = [
    "name : The Inn | area : north||The Inn is in the north.",
    "name : The Inn | area : north||Find The Inn in the north.",
    "name : The Mill||There is The Mill.",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "submission").mkdir(parents=True)
    (tmp_path / "test.txt").write_text("\n".join(LINES) + "\n")
    config = {"task_name": "e2e", "data_dir": str(tmp_path)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "submission" / "test_predictions.txt").write_text("A text.\nAnother text.\n")
    return folder


@pytest.mark.parametrize("own", [False, True])
def test_texts_stand_beside_their_tables(
    run: Path, own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if own:  # a file of one's own in place of a task
        config = {"task_name": None, "test_file": str(run.parent / "test.txt")}
        (run / "config.json").write_text(json.dumps(config))
    assert main([str(run)]) == 0
    first, second, end = capsys.readouterr().out.strip("\n").split("\n\n")
    assert [line.split(maxsplit=1) for line in first.splitlines()] == [
        ["name", "The Inn"],
        ["area", "north"],
        ["written", "A text."],
        ["reference", "The Inn is in the north."],
    ]
    assert second.splitlines()[1].split() == ["written", "Another", "text."]
    assert end.startswith("all 2 texts: ")


def test_a_run_that_has_decoded_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "submission" / "test_predictions.txt").unlink()
    assert main([str(run)]) == 2
    assert "--do_predict" in capsys.readouterr().err
