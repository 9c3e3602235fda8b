"""The workbook of published runs: its rows, how they are chosen, and what options they become."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import ROOT
from support.script_cases import script_module

from examples import program
from examples.cli.groups import OPTION_CLASSES, TeacherOptions, TrainingOptions
from examples.cli.squad import SquadOptions
from examples.errors import DataError, OptionError
from examples.sweeps import workbook
from examples.sweeps.workbook import SHEETS, Row, Selection, read_workbook, select, with_remaining
from examples.sweeps.workbook_options import method, options, with_more

openpyxl = pytest.importorskip("openpyxl")
FILE = ROOT / "hparams" / "hyperparameters.xlsx"
ROWS = {sheet: read_workbook(FILE, sheet) for sheet in SHEETS}
EVERY = [row for rows in ROWS.values() for row in rows]
TOP_K = "topK_1.0_*_1_2_null_0._3e-5_1e-2_topK_constant_0._10_epochs"


def row(sheet: str, number: int) -> Row:
    [found] = select(ROWS[sheet], Selection(numbers=(number,)))
    return found


def parsed(row: Row, *more: str) -> program.Options:
    words = [*options(row), "--model_name_or_path", "m", "--output_dir", "o"]
    classes = dict(OPTION_CLASSES)
    if row.sheet == "squad":
        classes["data"] = SquadOptions
    found = program.parse(with_more(words, more), "p", "", classes, "task_name")
    assert found is not None
    return found


# -- what is in it ------------------------------------------------------------------------------


def test_fact_23_counts() -> None:
    """Rows with an EXP ID, those without teacher and global ranking, and their old names."""
    counts = {}
    for sheet, rows in ROWS.items():
        local = [row for row in rows if not (row.distilled or row.ranks_all)]
        names = {f"{r.exp_id}_{r.remaining or float('nan'):.1f}%" for r in local}
        counts[sheet] = len(rows), len(local), len(names)
    assert counts == {"squad": (46, 46, 37), "mnli": (86, 78, 54), "qqp": (61, 61, 44)}
    assert len(EVERY) == 193


def test_published_results() -> None:
    """Rows of spec 4 and 7, the figures to the last digit."""
    dense = row("squad", 3)
    assert dense.results == (("EM", 80.4162724692526), ("F1", 88.0748307083071))
    assert (dense.percent, dense.prunes, method(dense)) == (100.0, False, "full")
    soft = row("squad", 52)
    assert soft.remaining == 0.0904636351597019 and soft.percent == pytest.approx(9.0463635)
    assert soft.model == "Soft Movement, SPLoPA-R128" and soft.code == "E2"
    assert row("mnli", 56).results == (("acc", 0.727929210740439),)
    assert [name for name, _ in row("mnli", 5).results] == ["acc", "ent", "acc", "ent"]
    assert [name for name, _ in row("qqp", 5).results] == ["acc", "acc&f1", "ent", "f1"]
    assert row("mnli", 29).percent == 0.999465471912209  # the one percent below one


def test_the_columns_stand_where_the_original_has_them() -> None:
    book = openpyxl.load_workbook(FILE)
    assert book.sheetnames == [*SHEETS.values(), "HP description"]
    page = book["Details - SQuAD"]
    places = {"D2": "EXP ID", "E2": "Effective encoder remain weights %", "F2": "EM", "G2": "F1"}
    places |= {"H2": None, "I2": "per_gpu_train_batch_size", "L2": "learning_rate"}
    places |= {"Z2": "alpha_distil", "AA2": "num_splopa_prototypes", "AD2": "Marker"}
    assert {name: page[name].value for name in places} == places
    assert page["D29"].value == TOP_K and page["E29"].value == 30.0465922635171
    cells = [str(c.value) for p in book for line in p.iter_rows() for c in line]
    assert not any("http" in text for text in cells)


def test_the_table_gives_the_same_bytes(real_data, tmp_path: Path) -> None:
    source = real_data("hparams/workbook_rows.tsv")
    make = script_module("make_workbook")
    for name in ("a.xlsx", "b.xlsx"):
        assert make.main([str(source), "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.xlsx").read_bytes() == (tmp_path / "b.xlsx").read_bytes()
    with zipfile.ZipFile(FILE) as ours, zipfile.ZipFile(tmp_path / "a.xlsx") as made:
        assert ours.namelist() == made.namelist()
        for name in ours.namelist():  # unpacked: another zlib packs otherwise
            if "worksheets" in name:
                assert ours.read(name) == made.read(name), name
        assert {info.date_time for info in made.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_every_line_of_the_table_is_in_it(real_data) -> None:
    table = script_module("make_workbook").table(real_data("hparams/workbook_rows.tsv"))
    assert len(table) == len(EVERY)
    for line in table:
        sheet = next(name for name, title in SHEETS.items() if title == line["sheet"])
        found = row(sheet, line["row"])
        published = [line[f"result_{i}"] for i in (1, 2, 3, 4)]
        assert [value for _, value in found.results] == [v for v in published if v is not None]
        assert (found.exp_id, found.remaining) == (line["EXP ID"], line[workbook.REMAINING])
        given = {n: line[n] for n in workbook.SETTINGS if line[n] is not None}
        if line["code"] == "D4":  # the teacher stands in SPLoPA's columns once more
            given = {n: v for n, v in given.items() if n not in workbook.SPLOPA}
        assert found.settings == given


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sheet", SHEETS)
def test_every_row_is_a_command_that_parses(sheet: str) -> None:
    for one in ROWS[sheet]:
        options_of_run = parsed(one)
        training, own = options_of_run[TrainingOptions], options_of_run.method_options
        given = one.settings
        assert options_of_run.method.name == method(one)
        assert training.per_device_train_batch_size == given["per_gpu_train_batch_size"]
        assert training.num_warmup_steps == given["warmup_steps"]
        assert training.learning_rate == given["learning_rate"]
        for name in (
            "final_threshold", "final_lambda", "mask_scale", "num_splopa_prototypes",
            "splopa_prototype_rank", "final_warmup", "mask_scores_learning_rate",
        ):  # fmt: skip
            if name in given:
                assert getattr(own, name) == given[name]
        assert options_of_run[TeacherOptions].teacher == given.get("teacher_name_or_path")


def test_fact_23_flags_of_row_5() -> None:
    words = " ".join(options(row("squad", 5)))
    assert (
        "--per_gpu_train_batch_size 16 --warmup_steps 5400 --num_train_epochs 10 "
        "--learning_rate 3e-05 --initial_threshold 1 --final_threshold 0.9 --initial_warmup 1 "
        "--final_warmup 2 --pruning_method magnitude --mask_block_rows 32 --mask_block_cols 32"
    ) in words
    assert "regularization" not in words and "splopa" not in words


def test_what_the_sheets_do_not_say() -> None:
    soft = parsed(row("squad", 49)).method_options
    assert soft.splopa_prototypes_not_shared and soft.clip_regularization
    assert not parsed(row("squad", 29)).method_options.global_topk
    ranked = parsed(row("mnli", 63))
    assert ranked.method.name == "block_prune" and ranked.method_options.global_topk
    teacher = ranked[TeacherOptions]
    assert (teacher.alpha_ce, teacher.alpha_distil) == (0.1, 0.9)
    assert parsed(row("mnli", 63), "--teacher", "mine")[TeacherOptions].teacher == "mine"


NAMES = ("learning_rate", "lr", "warmup_steps", "num_warmup_steps", "seed", "global_topk")


@given(st.lists(st.sampled_from(NAMES), unique=True), st.lists(st.sampled_from(NAMES)))
def test_later_options_take_the_place_of_earlier_ones(old: list[str], new: list[str]) -> None:
    same = {"lr": "learning_rate", "warmup_steps": "num_warmup_steps"}
    words = [word for name in old for word in (f"--{name}", "1")]
    more = [word for name in new for word in (f"--{name}", "2")]
    taken = {same.get(name, name) for name in new}
    kept = [name for name in old if same.get(name, name) not in taken]
    assert with_more(words, more) == [w for n in kept for w in (f"--{n}", "1")] + more


# -- choosing -----------------------------------------------------------------------------------


@given(st.sampled_from([r for r in EVERY if r.percent and r.percent < 99]), st.integers(1, 9))
def test_a_row_is_found_by_what_remains(one: Row, digits: int) -> None:
    rows = ROWS[one.sheet]
    percent = f"{one.percent:.{digits}f}%"
    found = with_remaining(rows, percent)
    assert one in found
    share = f"{float(percent[:-1]) / 100:.{digits + 2}f}"
    assert with_remaining(rows, share) == found
    most = max(0.5 * 10.0**-digits, 1e-9) * 1.001
    assert all(abs((other.percent or 0) - float(percent[:-1])) <= most for other in found)


@given(st.sampled_from(EVERY))
def test_every_row_can_be_named_without_its_number(one: Row) -> None:
    """EXP ID, what remains, K and λ tell rows apart."""
    found = select(
        ROWS[one.sheet],
        Selection(
            exp_id=one.exp_id,
            remaining="100" if one.remaining is None else f"{one.percent:.9f}%",
            num_prototypes=one.settings.get("num_splopa_prototypes", 0),
            final_lambda=one.settings.get("final_lambda"),
        ),
    )
    assert found == [one]


def test_percent_and_shares() -> None:
    found = {
        text: [r.number for r in with_remaining(ROWS["squad"], text)]
        for text in ("30", "0.3", "30.05", "0.3005", "0.30046592", "30.2%", "5%")
    }
    thirty = [8, 16, 20, 29]  # 29.5 to 30.5
    assert found == {
        "30": thirty, "0.3": thirty, "30.05": [29], "0.3005": [29], "0.30046592": [29], "30.2%": [],
        "5%": [18, 32],
    }  # fmt: skip
    only = [row for row in ROWS["squad"] if row.number in (23, 24)]
    assert [r.number for r in with_remaining(only, "0.3")] == [23]  # 29.3: no other is nearer
    for text in ("many", "-1", "101", "nan", ""):
        with pytest.raises(OptionError, match="--remaining"):
            with_remaining(EVERY, text)


def test_ambiguous_and_missing_rows_name_the_candidates() -> None:
    with pytest.raises(OptionError) as several:
        select(ROWS["squad"], Selection(exp_id=TOP_K, num_prototypes=64))
    assert str(several.value).startswith("4 rows are meant")
    assert [f"row {n} " in str(several.value) for n in (33, 34, 35, 36, 37, 38)] == [
        False, True, True, True, True, False,
    ]  # fmt: skip
    with pytest.raises(OptionError) as none:
        select(ROWS["squad"], Selection(exp_id=TOP_K, remaining="77"))
    assert "--remaining 77" in str(none.value) and str(none.value).count("\n") == 15
    with pytest.raises(OptionError, match="EXP IDs are:\n  topK_1.0"):
        select(ROWS["squad"], Selection(exp_id=TOP_K[:-1]))
    with pytest.raises(OptionError, match="no row has --row 4"):
        select(ROWS["squad"], Selection(numbers=(5, 4)))
    assert len(select(ROWS["squad"], Selection(exp_id=TOP_K), several=True)) == 15


# -- workbooks of others ------------------------------------------------------------------------


def changed(folder: Path, **cells: object) -> Path:
    """A copy with other cells in SQuAD's sheet."""
    book = openpyxl.load_workbook(FILE)
    for place, value in cells.items():
        book["Details - SQuAD"][place] = value
    book.save(folder / "other.xlsx")
    return folder / "other.xlsx"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"AB2": "rank"}, "unknown column 'rank' in row 2"),
        ({"D2": None}, "no column 'EXP ID'"),
        ({"AD2": "mask_scale"}, "column 'mask_scale' is there twice"),
        ({"E29": "a third"}, "row 29, Effective .*'a third' is not a number"),
        ({"O29": "low"}, "row 29, final_threshold: 'low' is not a number"),
    ],
)
def test_what_is_not_known_is_named(tmp_path: Path, cells: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_workbook(changed(tmp_path, **cells), "squad")


def test_marked_rows(tmp_path: Path) -> None:
    rows = read_workbook(changed(tmp_path, AD29="*", AD34="*", AD35="no"), "squad")
    assert [row.number for row in select(rows, Selection(marked=True))] == [29, 34]
    with pytest.raises(OptionError, match="no row has --marked"):
        select(ROWS["squad"], Selection(marked=True))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_workbook(FILE.with_suffix(".xslx"), "squad") == ROWS["squad"]
    (tmp_path / "text.xlsx").write_text("no archive")
    with pytest.raises(DataError, match="cannot be read as a workbook"):
        read_workbook(tmp_path / "text.xlsx", "squad")
    with pytest.raises(DataError, match="no such workbook"):
        read_workbook(tmp_path / "absent.xlsx", "squad")
    monkeypatch.setattr(workbook, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install openpyxl"):
        read_workbook(FILE, "squad")
