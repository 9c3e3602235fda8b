"""A sweep's file: it is checked before anything starts, and every run has a name of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

from examples import program
from examples.errors import OptionError
from examples.sweep import main
from examples.sweeps.jobs import Job, make_job
from examples.sweeps.sheet import read_sheet

COMMON = {"model_name_or_path": "m", "task_name": "mrpc"}


def sheet(folder: Path, **values: object) -> Path:
    path = folder / "sweep.yaml"
    whole = {"program": "run_glue", "output_dir": str(folder / "out"), "options": COMMON, **values}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def jobs(folder: Path, more: dict | None = None, **values: object) -> list[Job]:
    found = read_sheet(sheet(folder, **values), more or {})
    return [make_job(point, found.output_dir, "sweep.yaml") for point in found.points]


def test_every_combination_of_the_axes(tmp_path: Path) -> None:
    wide = {"label": "wide", "method": "lora", "lora_r": 64}
    found = jobs(
        tmp_path,
        grid={"task_name": ["mrpc", {"task_name": "cola", "max_length": 64}],
              "method": ["full", wide], "seed": [0, 1]},
    )  # fmt: skip
    assert len(found) == 8 and len({job.name for job in found}) == 8
    assert [job.name.rsplit("-", 1)[0] for job in found[:4]] == [
        "mrpc-full-s0", "mrpc-full-s1", "mrpc-wide-s0", "mrpc-wide-s1",
    ]  # fmt: skip
    last = found[-1]
    for word in ("--task_name=cola", "--max_length=64", "--method=lora", "--lora_r=64", "--seed=1"):
        assert word in last.command
    assert "--label=wide" not in last.command and last.labels["method"] == "wide"
    assert last.command[-1] == "--resume_from_checkpoint=auto"
    assert f"--output_dir={tmp_path / 'out' / last.name}" in last.command


def test_a_folder_is_named_by_what_is_computed(tmp_path: Path) -> None:
    def name(more: dict | None = None, **options: object) -> str:
        [job] = jobs(tmp_path, more, options={**COMMON, **options})
        return job.name

    plain = name()
    assert name(learning_rate=5e-5) == plain  # the default
    assert name(lr="5e-5") == plain == name(seed=0)
    assert name(data_dir="here", cache=False, disable_tqdm=True) == plain
    different = {name(learning_rate=1e-4), name(lora_r=4), name(method="full"), name({"seed": 1})}
    assert len(different | {plain}) == 5
    config = tmp_path / "h.yaml"
    config.write_text("lora_r: 4\n")
    assert name(config=str(config)) == name(lora_r=4)


def test_rows_of_an_excel_sheet(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.create_sheet("MRPC")
    lines = [("published", None, None), ("LR", "lora_r", "who"), (0.001, 4, "me"), (None,) * 3,
             (0.002, None, "you")]  # fmt: skip
    for line in lines:
        book["MRPC"].append(line)
    book.save(tmp_path / "runs.xlsx")
    asked = {"file": "runs.xlsx", "sheet": "MRPC", "header": 2,
             "columns": {"LR": "learning_rate", "lora_r": "lora_r"}}  # fmt: skip
    found = jobs(tmp_path, rows=asked, grid={"seed": [3]})
    assert [job.labels for job in found] == [{"row": "3", "seed": "3"}, {"row": "5", "seed": "3"}]
    assert {"--learning_rate=0.001", "--lora_r=4"} <= {*found[0].command}
    assert "--learning_rate=0.002" in found[1].command
    assert not any("lora_r" in word for word in found[1].command)

    def error(**other: object) -> str:
        with pytest.raises(OptionError) as raised:
            jobs(tmp_path, rows={**asked, **other})
        return str(raised.value)

    assert "has no sheet 'QQP'; it has Sheet, MRPC" in error(sheet="QQP")
    assert "line 2 has no column 'rate'; it has LR" in error(columns={"rate": "learning_rate"})
    assert "the sheet has 5 lines" in error(header=9)
    assert "no option --who" in error(columns=None) or "--LR" in error(columns=None)
    assert "cannot be read as Excel" in error(file="sweep.yaml")
    assert "`file:` is needed" in error(files="x")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grids": {}}, "there is no key 'grids'; did you mean grid?"),
        ({"grid": {"seed": 3}}, "grid: seed: a list of values is needed"),
        ({"grid": {"seed": []}}, "grid: seed: a list of values is needed"),
        ({"grid": {"lora_q": [1]}}, "1: command line: there is no option --lora_q; did you mean"),
        ({"grid": {"lora_r": [4, "four"]}}, "four: --lora_r four: a whole number is needed"),
        ({"grid": {"task_name": ["mrcp"]}}, "mrcp: unknown task 'mrcp'; choose among"),
        ({"grid": {"method": ["lorra"]}}, "--method lorra: did you mean lora?"),
        ({"grid": {"seed": [1, "1"]}}, "1: the same run as 1"),
        ({"program": "run_gluon"}, "there is no program 'run_gluon'"),
        ({"program": "examples.cli"}, "there is no program 'examples.cli'"),
        ({"program": None}, "program is missing"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"options": [1]}, "options: lines of the form `name: value` are expected"),
        ({"options": {**COMMON, "output_dir": "x"}}, "--output_dir is set by the sweep"),
        ({"options": {"task_name": "mrpc"}}, "--model_name_or_path is needed"),
        ({"then": {"cut": "examples.export {run}"}}, "then: cut: a command that writes {out}"),
        ({"then": {"cut": "examples.nothing --out {out}"}}, "there is no module examples.nothing"),
        ({"search": {"option": {}}}, "search: there is no key 'option'; did you mean options?"),
        ({"search": {"options": {}}}, "nothing is to be tried"),
        ({"search": {"options": {"lora_r": 4}}}, "lora_r: a list of values is needed"),
        ({"search": {"options": {"seed": [1]}}}, "seed is set already"),
        ({"search": {"by": "luck", "options": {"lora_r": [4]}}}, "by: luck: choose among grid"),
        (
            {"search": {"options": {"lora_r": [4, 8]}},
             "grid": {"method": ["lora", {"method": "full", "search": {"learning_rate": [1]}}]}},
            "--lora_r is an option of method",
        ),
        (
            {"search": {"options": {"learning_rate": [1, 2]}},
             "grid": {"method": ["lora", {"method": "full", "search": {"learning_rate": [1]}}]}},
            "1 runs for full, but 2 for lora: every place",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_error_before_anything_starts(
    tmp_path: Path, values: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run_main(main, [str(sheet(tmp_path, **values))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "sweep.yaml" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not YAML: "), ("- 1", "lines of the form"), (None, "cannot be read (No such file")],
)
def test_a_file_that_is_no_sheet(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match="x.yaml") as raised:
        main([str(path)])
    assert words in str(raised.value)


def test_options_of_the_command_line_are_those_of_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sheet(tmp_path, grid={"seed": [0, 1]}, then={"cut": "examples.export {run} --out {out}"})
    words = [str(path), "--dry_run", "--lora_r", "4", "--packing", "--learning-rate=1e-3"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not (tmp_path / "out").exists()
    for line in lines:
        assert "-m examples.run_glue --model_name_or_path=m --task_name=mrpc" in line
        assert "--lora_r=4 --packing=true --learning_rate=1e-3" in line
    with pytest.raises(OptionError, match="at least 1"):
        main([str(path), "--lanes", "0"])
    with pytest.raises(OptionError, match="belongs to no option"):
        main([str(path), "here"])


def test_a_part_of_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"label": "wide", "method": "lora", "lora_r": 64}
    path = sheet(tmp_path, grid={"task_name": ["mrpc", "cola"], "method": ["full", "lora", wide]})

    def chosen(*only: str) -> list[str]:
        words = [word for choice in only for word in ("--only", choice)]
        assert main([str(path), "--dry_run", *words]) == 0
        out = capsys.readouterr().out
        return re.findall(r"/out/(\S+)-\w+ ", out)

    assert chosen("task_name=cola") == ["cola-full", "cola-lora", "cola-wide"]
    assert chosen("method=wide,full", "task_name=mrpc") == ["mrpc-full", "mrpc-wide"]
    with pytest.raises(OptionError, match="no axis 'task'; choose among task_name, method"):
        main([str(path), "--only", "task=cola"])
    with pytest.raises(OptionError, match="method has no 'dora'; it has full, lora, wide"):
        main([str(path), "--only", "method=full,dora"])


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sheets_of_the_project(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--model_name_or_path", "m", "--data_dir", "d"]
    assert main([str(file), "--dry_run", *more]) == 0
    assert f"python -m examples.sweep {file.relative_to(ROOT)}" in file.read_text()
    assert len(capsys.readouterr().out.splitlines()) >= 4
