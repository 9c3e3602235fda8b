"""examples.report: what is averaged, what is left out, what the pages hold."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.report_runs import COMMIT, comparison, write_adapter, write_run
from support.runner_cases import pair_task, tiny_bert

from examples import program, report, run_glue
from examples.reporting import module_maps
from examples.reporting.figures import Figures, pareto_front
from examples.reporting.groups import tasks_of
from examples.reporting.runs import read
from examples.reporting.svg import Series, chart
from examples.reporting.tables import against, cuts, overview, spread

VOID = {"meta", "img", "line", "rect", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Every element with its attributes; a tag that is not closed in its order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def run(*words: object) -> int:
    return program.run_main(report.main, [str(word) for word in words])


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two tasks, beside its runs."""
    root = tmp_path_factory.mktemp("report")
    comparison(root / "runs")
    axes = ("--pareto", "parameters,metric", "--pareto", "seconds,ece")
    assert run(root / "runs", "--output", root / "out", "--latex", *axes) == 0
    return root


# --- what is averaged ----------------------------------------------------------------------------


def test_only_seeds_are_averaged(tmp_path: Path) -> None:
    for seed, value in ((0, 0.5), (1, 0.7)):
        write_run(tmp_path / f"a{seed}", seed=seed, values=[value, 0.1])
    write_run(tmp_path / "b", lora_r=4, values=[0.9])
    [task] = tasks_of(read([tmp_path]).runs, None)
    assert [(c.label, len(c.runs)) for c in task.configurations] == [
        ("lora, lora_r 4", 1), ("lora, lora_r 8", 2)]  # fmt: skip
    wide = task.configurations[1]
    assert spread(list(wide.by_seed("best").values())) == "0.6000 ± 0.1414"
    assert spread(list(wide.by_seed("last").values())) == "0.1000"
    assert task.shown["lora"] is wide  # more seeds before a better value


def test_variants_of_a_sweep_are_compared_as_it_calls_them(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    rows = []
    for label, options in (("lora", {}), ("wide", {"lora_r": 16}), ("from data", {"rho": 2.0})):
        for seed in (0, 1):
            folder = write_run(sweep / f"{label[0]}{seed}", "lora", seed, **options)
            labels = {"method": label, "seed": str(seed)}
            rows.append(json.dumps({"folder": folder.name, "labels": labels}))
    (sweep / "runs.jsonl").write_text("\n".join(rows))
    [task] = tasks_of(read([tmp_path]).runs, "wide")
    assert list(task.shown) == ["from data", "lora", "wide"]
    assert task.reference is task.shown["wide"] and len(task.reference.runs) == 2
    assert [row[0] for row in overview([task])[0].rows] == ["from data", "lora", "wide"]
    (sweep / "runs.jsonl").write_text("\n".join([*rows[:2], '{"folder": 3']))  # cut short
    [task] = tasks_of(read([tmp_path]).runs, None)
    assert list(task.shown) == ["lora"] and len(task.configurations) == 3


def test_every_run_is_in_the_figure_of_methods(tmp_path: Path) -> None:
    for method, values in (("lora", (0.7, 0.8)), ("full", (0.9, 0.6)), ("adalora", (0.85, 0.95))):
        for seed, value in enumerate(values):
            write_run(tmp_path / f"{method}{seed}", method, seed, values=[value])
    [task] = tasks_of(read([tmp_path]).runs, "lora")
    [figure] = Figures([task], []).seeds(task)
    assert re.findall(r'text-anchor="end">(\w+)<', figure.svg) == ["adalora", "full", "lora"]
    assert figure.svg.count("<circle") == 6 and figure.svg.count('stroke="var(--s1)"') == 3
    rings = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', figure.svg)]
    bars = [float(x) for x in re.findall(r'x1="([\d.]+)"[^>]*stroke="var\(--s1\)"', figure.svg)]
    assert bars == pytest.approx([sum(rings[i : i + 2]) / 2 for i in (0, 2, 4)], abs=0.2)
    [dashed] = re.findall(r'x1="([\d.]+)"[^>]*stroke-dasharray', figure.svg)
    assert float(dashed) == bars[2] and "the mean of lora" in figure.note
    for run in tmp_path.glob("*1"):
        (run / "config.json").unlink()  # one seed of each is left
    assert not list(Figures([], []).seeds(tasks_of(read([tmp_path]).runs, None)[0]))


def test_trials_of_a_search_are_on_no_front(tmp_path: Path) -> None:
    for rate, seeds in ((0.1, 1), (0.01, 2), (0.001, 2)):
        for seed in range(seeds):
            write_run(tmp_path / f"{rate}-{seed}", "lora", seed, learning_rate=rate)
    write_run(tmp_path / "full", "full", 0)
    [task] = tasks_of(read([tmp_path]).runs, None)
    assert len(task.configurations) == 4
    assert [c.label.split(", ")[1] for c in task.compared] == [
        "learning_rate 0.001", "learning_rate 0.001", "learning_rate 0.01"
    ]  # fmt: skip
    [figure] = Figures([task], []).scatter(task, "seconds", "metric", "Time", front=True)
    assert "Left out: 1 with fewer seeds" in figure.note and "rate 0.1" not in figure.svg


def test_cuts_of_a_runs_adapter_stand_beside_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"plain{seed}", "lora", seed, values=[0.5 + 0.1 * seed])
        folder = write_run(tmp_path / f"wide{seed}", "adalora", seed) / "curve"
        folder.mkdir()
        rules = {
            rule: {"values": [value, 0.8 + 0.2 * seed], "aurac_linear": 0.5}
            for rule, value in (("global", 0.6 + 0.1 * seed), ("uniform", 0.4))
        }
        content = {"budgets": [36, 72], "metric": "f1", **rules}
        (folder / "budget_curve.json").write_text(json.dumps(content))
    found = read([tmp_path])
    assert not found.budget_curves
    [task] = tasks_of(found.runs, "lora")
    table = cuts(task)
    assert table is not None and [row[:2] for row in table.rows] == [
        ["adalora", "36"], ["adalora", "72"]
    ]  # fmt: skip
    assert table.rows[0][2:] == ["0.6500 ± 0.0707", "+0.1000 ± 0.0000 (n 2)",
                                 "0.4000", "-0.1500 ± 0.6353 (n 2)"]  # fmt: skip
    assert run(tmp_path, "--output", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Cut after training: mrpc" in page and "figures/cuts-mrpc.svg" in page


def test_options_that_change_nothing_are_no_configurations(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, logging_steps=1, cache=True)
    write_run(tmp_path / "b", seed=1, logging_steps=9, cache=False)
    [task] = tasks_of(read([tmp_path]).runs, None)
    assert len(task.configurations) == 1


def test_a_base_that_differs_between_methods_is_in_their_labels(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "lora", model_name_or_path="/x/small")
    write_run(tmp_path / "b", "full", model_name_or_path="/x/large")
    [task] = tasks_of(read([tmp_path]).runs, None)
    labels = [c.label for c in task.configurations]
    assert labels == ["full, model_name_or_path large", "lora, model_name_or_path small"]


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", values=[0.5])
    write_run(tmp_path / "b", values=[0.5])
    found = read([tmp_path])
    assert len(found.runs) == 1 and "as a" in found.skipped["b"]
    assert len(read([tmp_path / "a", tmp_path]).runs) == 1


def test_values_of_two_metrics_are_in_two_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "a", values=[0.5])
    write_run(tmp_path / "b", seed=1, values=[0.4], metric="eval_loss")
    names = [task.name for task in tasks_of(read([tmp_path]).runs, None)]
    assert names == ["mrpc, f1", "mrpc, loss"]


def test_a_loss_is_the_better_the_smaller(tmp_path: Path) -> None:
    write_run(tmp_path / "a", values=[0.9, 0.3, 0.6], metric="eval_loss")
    [found] = read([tmp_path]).runs
    assert (found.best, found.last) == (0.3, 0.6)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    for seed, (ours, theirs) in enumerate(((0.60, 0.50), (0.71, 0.60), (0.82, 0.70), (0.1, 0.9))):
        write_run(tmp_path / f"dylora{seed}", "dylora", seed, values=[ours])
        if seed < 3:
            write_run(tmp_path / f"lora{seed}", "lora", seed, values=[theirs])
    [task] = tasks_of(read([tmp_path]).runs, None)
    # gaps .10 .11 .12: s = .01, t(2) = 4.303, half = 4.303·.01/√3
    assert against(task, task.shown["dylora"]) == f"+0.1100 ± {0.04303 / math.sqrt(3):.4f} (n 3)"
    assert against(task, task.shown["lora"]) == "reference"
    [best, gaps] = overview([task])
    assert best.rows[0][1] == "0.5575 ± 0.3179 (n 4)" and gaps.rows[1] == ["lora", "reference"]


# --- what is left out ----------------------------------------------------------------------------


def damage(root: Path) -> dict[str, str]:
    """Folders that cannot be used -> a word of the reason."""
    write_run(root / "good")
    for name in ("no_config", "cut", "list", "unfinished", "results", "method"):
        write_run(root / name, seed=len(name))
    (root / "no_config" / "config.json").unlink()
    (root / "cut" / "config.json").write_text('{"method": "lo')
    (root / "list" / "config.json").write_text("[]")
    (root / "unfinished" / "all_results.json").unlink()
    (root / "results" / "all_results.json").write_bytes(b"\xff\xfe")
    config = json.loads((root / "method" / "config.json").read_text())
    (root / "method" / "config.json").write_text(json.dumps({**config, "method": 3}))
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text('{"model_type": "bert"}')
    return {
        "no_config": "no config.json", "cut": "cannot be read", "list": "a list",
        "unfinished": "unfinished", "results": "cannot be read", "method": "method or seed",
        "model": "no run's",
    }  # fmt: skip


def test_damaged_folders_are_named_counted_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = damage(tmp_path / "runs")
    assert run(tmp_path / "runs", "--output", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "1 run, 1 configuration" in said.out and f"{len(wrong)} folders left out" in said.out
    pages = [(tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html")]
    for name, word in wrong.items():
        assert re.search(rf"left out: {name}: .*{word}", said.err)
        assert all(name in page.replace("\\_", "_") for page in pages)


def test_a_line_cut_short_costs_the_rest_of_its_file_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", values=[0.5, 0.6, 0.7])
    text = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([text[0], text[1][:9], text[2]]))
    (folder / "env.json").unlink()
    [found] = read([tmp_path]).runs
    assert (found.best, found.last) == (0.5, 0.5)
    assert found.notes[0] == "env.json is missing" and "line 2 of 3" in found.notes[1]


def test_values_that_are_no_numbers_are_not_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", results={"eval_ece": math.nan, "train_seconds": "long"})
    (folder / "metrics.jsonl").write_text('{"step": 1, "eval_f1": NaN, "epoch": 1}\n')
    [found] = read([tmp_path]).runs
    assert found.figure("ece") is None and found.figure("train_seconds") is None
    assert found.best == 0.8  # of all_results.json
    assert run(tmp_path / "a", "--output", tmp_path / "out") == 0


def test_without_a_run_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    assert run(tmp_path / "runs", "--output", tmp_path / "out") == 2
    assert run(tmp_path / "none", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "no finished run" in said and "no such folder" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pareto", "metric"], "two names"),
        (["--pareto", "metric,nonsense"], "--pareto nonsense: the runs have"),
        (["--reference", "vilora"], "--reference vilora: the runs are of lora"),
    ],
)
def test_wrong_options_name_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    write_run(tmp_path / "a")
    assert run(tmp_path / "a", "--output", tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- its folder ----------------------------------------------------------------------------------


def test_only_its_own_folder_is_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a")
    out = tmp_path / "out"
    assert run(tmp_path / "a", "--output", out, "--latex") == 0
    assert run(tmp_path / "a", "--output", out) == 0  # again, without LaTeX
    assert not (out / "report.tex").exists()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run(tmp_path / "a", "--output", folder) == 2
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (out / "mine.txt").write_text("kept")
    assert run(tmp_path / "a", "--output", out) == 2
    assert "mine.txt" in capsys.readouterr().err and (out / "mine.txt").read_text() == "kept"


def test_a_mark_cannot_make_it_remove_files_outside(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("kept")
    files = ["../mine.txt", str(tmp_path / "mine.txt")]
    mark = {"made_by": "examples.report", "files": files}
    (tmp_path / "out" / "report.json").write_text(json.dumps(mark))
    assert run(tmp_path / "a", "--output", tmp_path / "out") == 0
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_report_among_the_runs_is_no_run(made: Path) -> None:
    assert run(made / "runs", "--output", made / "runs" / "report") == 0
    assert not read([made / "runs"]).skipped


def test_the_same_runs_give_the_same_bytes(made: Path) -> None:
    again = made / "again"
    axes = ("--pareto", "parameters,metric", "--pareto", "seconds,ece")
    assert run(made / "runs", "--output", again, "--latex", *axes) == 0
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert all((again / n).read_bytes() == (made / "out" / n).read_bytes() for n in files)


# --- the pages -----------------------------------------------------------------------------------


def test_the_page_needs_nothing_beside_it(made: Path) -> None:
    text = (made / "out" / "report.html").read_text("utf-8")
    page = Page(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    sources = [a["src"] for a in page.all("img")] + [a["href"] for a in page.all("a")]
    assert all(str(source).startswith(("data:", "#")) for source in sources)
    assert "url(" not in text and "@import" not in text and "http" not in text
    targets = {a["id"] for a in page.all("section")}
    assert {str(a["href"])[1:] for a in page.all("a")} == targets
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    fixed = [a for tag, a in page.elements if tag in ("svg", "img", "table") and "width" in a]
    assert not fixed  # everything scales with the page


def test_every_figure_is_there_and_names_its_runs(made: Path) -> None:
    page = (made / "out" / "report.html").read_text("utf-8")
    figures = re.findall(r"<figure>.*?</figure>", page, re.S)
    titles = " ".join(re.findall(r"<h3>(.*?)</h3>", " ".join(figures)))
    for kind in ("Learning curves", "Training loss", "Metric over learning rate", "Rank curves",
                 "Calibration and metric", "Forgetting and metric", "Ranks of adalora",
                 "Pareto: metric over parameters", "Pareto: ece over seconds"):  # fmt: skip
        assert titles.count(kind) >= 2, kind  # one for each task
    for figure in figures:
        assert ("<svg" in figure) != ("<img" in figure)
        assert re.search(r"<li>(cola|mrpc)/\w+-[\d.e-]+-0</li>", figure)
        assert "torch 2.13.0" in figure and "Linux-6, cpu, 1 thread" in figure
        assert f"commit {COMMIT[:10]}, checkout clean" in figure


def test_markdown_shows_the_figures_that_are_there(made: Path) -> None:
    text = (made / "out" / "report.md").read_text("utf-8")
    shown = re.findall(r"\]\((figures/[^)]+)\)", text)
    there = {p.relative_to(made / "out").as_posix() for p in (made / "out" / "figures").iterdir()}
    assert {*shown} == there and len(shown) == len(there)
    widths = {row.replace("\\|", "").count("|") for row in text.splitlines() if row[:3] == "|:-"}
    assert widths  # each table's rows have the columns of its head
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({row.replace("\\|", "").count("|") for row in table.splitlines()}) == 1


def test_csv_has_numbers_for_all(made: Path) -> None:
    runs = lines(made / "out" / "runs.csv")
    assert len(runs) == 40 and all(float(row["best"]) > 0.5 for row in runs)
    rows = lines(made / "out" / "configurations.csv")
    assert len(rows) == 24
    [row] = [
        r for r in rows if r["task"] == "mrpc" and r["configuration"] == "full, learning_rate 0.001"
    ]
    own = [r for r in runs if r["task"] == "mrpc" and r["method"] == "full"]
    values = [float(r["best"]) for r in own if r["learning_rate"] == "0.001"]
    assert float(row["best_mean"]) == pytest.approx(sum(values) / 3) and row["seeds"] == "0 1 2"


def test_latex_is_balanced(made: Path) -> None:
    text = (made / "out" / "report.tex").read_text("utf-8")
    assert text.count(r"\begin{") == text.count(r"\end{") and r"learning\_rate" in text
    for table in re.findall(r"\\begin{tabular}{(l r*|lr*)}(.*?)\\end{tabular}", text, re.S):
        columns = len(table[0]) - 1
        rows = [row for row in table[1].splitlines() if row.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns}


def test_names_with_marks_stay_text(tmp_path: Path) -> None:
    bad = "<b>x|y</b> $a_b$ & 50%"
    write_run(tmp_path / "a", lora_r=bad)
    write_run(tmp_path / "b", lora_r=2)
    assert run(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out", "--latex") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;x|y" in page and Page(page)
    assert "\\|y" in (tmp_path / "out" / "report.md").read_text()
    assert r"\$a\_b\$ \& 50\%" in (tmp_path / "out" / "report.tex").read_text()


def test_where_environments_differ_each_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, environment={"git_commit": COMMIT + "+"})
    write_run(tmp_path / "c", seed=2, environment={"git_commit": None, "device": "cuda:0"})
    assert run(tmp_path, "--output", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    for words in (
        "checkout clean",
        "checkout changed",
        "checkout unknown",
        "1 of 3 runs",
        "cuda:0",
    ):
        assert words in page


# --- charts --------------------------------------------------------------------------------------

FINITE = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 3))


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=30), st.booleans())
def test_points_are_inside_their_frame(points: list[tuple[float, float]], log: bool) -> None:
    if log:
        points = [(abs(x) + 1e-3, y) for x, y in points]
    svg = chart([Series("all", points, 0)], "x", "y", log_x=log)
    places = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', svg)
    assert len(places) == len(points) + 1  # and that of the legend
    assert all(58 <= float(x) <= 426 and 12 <= float(y) <= 220 for x, y in places[:-1])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_a_front_is_what_none_beats(points: list[tuple[int, int]]) -> None:
    """The smaller first figure, the larger second one."""
    front = pareto_front(points, [-1, 1])
    for x, y in points:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in front) != beaten


def test_ranks_are_read_from_the_file_of_an_adapter(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    own = {"bert.encoder.layer.0.attention.self.query": 0, "bert.encoder.layer.1.output.dense": 3}
    write_adapter(folder, own)
    assert module_maps.ranks(folder) == own
    rows, columns, cells = module_maps.grid([own, {**own, "bert.encoder.layer.1.output.dense": 6}])
    assert (rows, columns) == (["layer 1", "layer 0"], ["query", "output"])
    assert cells == [[None, 4.5], [0, None]]
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert module_maps.ranks(folder) == {}


def test_masks_are_drawn_by_layer_and_module(tmp_path: Path) -> None:
    for seed, kept in ((0, 0.5), (1, 0.25)):
        folder = write_run(tmp_path / "runs" / str(seed), method="splora", seed=seed)
        shares = {"bert.encoder.layer.0.attention.output.dense": kept, "pooler.dense": 1.0}
        (folder / "mask_shares.json").write_text(json.dumps(shares))
    [task] = tasks_of(read([tmp_path / "runs"]).runs, None)
    [figure] = Figures([task], []).mask_maps(task)
    assert figure.title.startswith("Masks of splora") and len(figure.runs) == 2
    assert ">38<" in figure.svg and ">attention.output<" in figure.svg
    (folder / "mask_shares.json").write_text('{"pooler.dense": "all"}')
    found = next(r for r in read([tmp_path / "runs"]).runs if r.seed == 1)
    assert not found.masks and "mask_shares.json holds something else" in found.notes[0]


# --- a run's own folder --------------------------------------------------------------------------


def test_a_real_run_is_read_whole(tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    data = pair_task(tmp_path / "data", {"train": 24, "validation": 12})
    for seed in (0, 1):
        words = ["--model_name_or_path", bert, "--max_length", 24, "--seed", seed, "--lora_r", 2]
        words += ["--train_file", data / "train.jsonl", "--learning_rate", 0.01]
        words += ["--validation_file", data / "validation.jsonl", "--method", "lora"]
        words += ["--num_train_epochs", 2, "--per_device_train_batch_size", 8, "--logging_steps", 1]
        words += ["--output_dir", tmp_path / "runs" / str(seed), "--calibration", "true"]
        assert program.run_main(run_glue.main, [str(word) for word in words]) == 0
    assert run(tmp_path / "runs", "--output", tmp_path / "out") == 0
    [row] = lines(tmp_path / "out" / "configurations.csv")
    results = [json.loads((tmp_path / "runs" / s / "all_results.json").read_text()) for s in "01"]
    assert row["n"] == "2" and row["metric"] == "eval_accuracy" == results[0]["main_metric"]
    best = sum(found["eval_accuracy"] for found in results) / 2
    assert float(row["best_mean"]) == pytest.approx(best)
    size = (tmp_path / "runs" / "0" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert float(row["file_bytes_mean"]) == size
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Learning curves" in page and "Calibration: train.jsonl" in page
    assert "left out" in page and not read([tmp_path / "runs"]).skipped
