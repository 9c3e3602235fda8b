"""The order of the house: which package may import which, no circles, and no torch at the door."""

from __future__ import annotations

import ast
import importlib.util
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from benchmarks import import_graph
from benchmarks.import_graph import FLOORS, NEIGHBOURS, PROGRAMS, ROOMS, Arrow

FILES = import_graph.files(ROOT)
ARROWS = import_graph.arrows(FILES)
# What has options, and what a command reads before it knows what to do.
LIGHT = (
    "examples.errors",
    "examples.config",
    "examples.program",
    "examples.methods",
    "examples.optimizers",
    *sorted(name for name in FILES if name.startswith("examples.cli")),
)
HELP_SECONDS = 0.3  # of a processor; bare Python takes a tenth of it


# --- imports -------------------------------------------------------------------------------------


def test_no_import_goes_against_the_order() -> None:
    wrong = import_graph.against_the_order(ARROWS)
    assert not wrong, "\n".join(map(str, wrong))


def test_no_files_import_one_another() -> None:
    """Imports in functions and for type checkers count: they hide a circle, they do not open it."""
    rings = import_graph.circles((arrow.source, arrow.target) for arrow in ARROWS)
    inside = [str(a) for ring in rings for a in ARROWS if {a.source, a.target} <= set(ring)]
    assert not rings, "\n".join(inside)


def test_the_allowed_order_has_no_circle() -> None:
    assert not import_graph.circles(NEIGHBOURS)
    rooms = {room for level in ROOMS for room in level}
    assert {room for pair in NEIGHBOURS for room in pair} <= rooms


def test_every_folder_of_examples_has_its_place() -> None:
    """A new folder would count among the programs, which may import everything."""
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/*.py")}
    assert folders <= {room for level in ROOMS for room in level} - {PROGRAMS}


def test_ivon_needs_torch_alone() -> None:
    """And safetensors, for the file of its posterior."""
    found: set[str] = set()
    for path in (ROOT / "ivon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) - {"ivon"} <= {"torch", "safetensors"}


def house(folder: Path, **files: str) -> list[Arrow]:
    """The arrows of a small project: `a__b` is a/b.py."""
    for package in FLOORS:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    for name, text in files.items():
        path = (folder / name.replace("__", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return import_graph.arrows(import_graph.files(folder))


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("ivon__auto", "from loralib.utils import x"),
        ("loralib__layers", "def f():\n    import peft_custom"),
        ("peft_custom__hooks", "from ivon import IVON"),
        ("peft_custom__model", "import transformers_patched.auto as auto"),
        ("transformers_patched__auto", "from examples.cli import fields"),
        ("examples__cli__fields", "from examples.data.tables import DataError"),
        ("examples__data__tables", "from ..training import trainer"),
        ("examples__training__trainer", "from examples.methods import registry"),
        ("examples__methods__lora", "from examples.program import main"),
        ("examples__program__main", "from examples import run_glue"),
        ("examples__run_squad", "from .run_glue import main"),
        ("examples__data__encode", "def f():\n    import_module('examples.methods.lora')"),
    ],
)
def test_each_kind_of_wrong_arrow_is_seen(tmp_path: Path, where: str, text: str) -> None:
    others = dict.fromkeys(
        ("examples__cli__fields examples__data__tables examples__training__trainer "
         "examples__methods__registry examples__methods__lora examples__program__main "
         "examples__run_glue loralib__utils transformers_patched__auto").split(), ""
    )  # fmt: skip
    for package in ("cli", "data", "training", "methods", "program"):
        others[f"examples__{package}____init__"] = ""
    graph = house(tmp_path, **others | {where: text})
    [wrong] = import_graph.against_the_order(graph)
    assert wrong.source == where.replace("__", ".")


def test_arrows_that_are_allowed(tmp_path: Path) -> None:
    graph = house(
        tmp_path,
        examples__run_glue_no_trainer="from examples.run_glue import main",
        examples__run_glue="from examples.cli import fields\nimport ivon, torch",
        examples__cli__fields="",
        examples__cli____init__="from . import fields",
        peft_custom__model="from loralib import Linear\nfrom .hooks import attach",
        peft_custom__hooks="",
    )
    assert len(graph) == 6 and not import_graph.against_the_order(graph)


def test_a_circle_is_seen_wherever_its_imports_stand(tmp_path: Path) -> None:
    graph = house(
        tmp_path,
        ivon__a="from .b import x",
        ivon__b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ivon.c import y",
        ivon__c="def f():\n    from ivon import a",
    )
    rings = import_graph.circles((arrow.source, arrow.target) for arrow in graph)
    assert rings == [["ivon.a", "ivon.b", "ivon.c"]]


# --- no torch at the door ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIGHT)
def test_options_are_read_without_torch(name: str) -> None:
    heavy = ("torch", "numpy", "accelerate", "transformers_patched", "peft_custom")
    code = f"import sys, {name}; sys.exit(' '.join(n for n in {heavy} if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def programs() -> list[str]:
    """The programs that take a run's options."""
    options = "examples.program"
    found = {a.source for a in ARROWS if a.target.startswith(options) and a.source.count(".") == 1}
    return sorted({*found, *import_graph.ALIASES} - {options})


@pytest.mark.parametrize("program", programs())
def test_help_costs_next_to_nothing(program: str) -> None:
    """CPU seconds, the least of five: a busy machine makes them more, never less."""
    assert importlib.util.find_spec(program) is not None
    costs = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", program, "--help"], check=True, capture_output=True, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if costs[-1] < HELP_SECONDS:
            return
    pytest.fail(f"{program} --help: {min(costs):.2f} s of CPU")
