"""Which file imports which: the order of packages, arrows against it, and circles.

An arrow goes from a file to the file that its import statement names: `from package import name` to
`package/name.py` where that exists, else to `package/__init__.py`. Imports inside functions, those
under `if TYPE_CHECKING`, and `import_module("…")` of a literal name count like the others: whoever
reads the one file has to know the other. That importing a.b also runs a/__init__.py does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

# package -> what it may import of ours
FLOORS: dict[str, tuple[str, ...]] = {
    "loralib": (),
    "ivon": (),
    "peft_custom": ("loralib",),
    "transformers_patched": ("loralib",),
    "examples": ("loralib", "ivon", "peft_custom", "transformers_patched"),
}
PROGRAMS = "programs"  # the files at the top of examples/
# within examples, from the ground up; arrows go down
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("cli",),
    ("data",),
    ("methods", "optimizers", "training", "evaluation", "plots", "sweeps", "reporting"),
    ("program",),
    (PROGRAMS,),
)
# arrows between rooms of one level: they must not close a circle either
NEIGHBOURS = {
    ("training", "evaluation"),
    ("methods", "evaluation"),
    ("methods", "training"),
    ("methods", "plots"),
    ("optimizers", "methods"),
    ("optimizers", "evaluation"),
    ("optimizers", "plots"),
    ("sweeps", "plots"),
    ("reporting", "plots"),
    ("reporting", "sweeps"),
    ("reporting", "training"),
}
# programs that are another one under an older name -> that one
ALIASES = {
    "examples.run_glue_no_trainer": "examples.run_glue",
    "examples.export_adapter": "examples.export",
}


class Arrow(NamedTuple):
    """`source` imports `target` (dotted names of files) in its line `line`."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def files(root: Path, packages: Iterable[str] = FLOORS) -> dict[str, Path]:
    """Dotted name -> file, for every file of the packages in `root`; a package's name is its
    `__init__.py`."""
    found: dict[str, Path] = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(known: Mapping[str, Path]) -> list[Arrow]:
    """Every import of one of the `known` files by another (see `files`)."""
    found: set[Arrow] = set()
    for source, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node, source, path.name == "__init__.py"):
                target = _file_of(name, known)
                if target is not None and target != source:
                    found.add(Arrow(source, target, node.lineno))
    return sorted(found)


def _imported(node: ast.AST, source: str, is_package: bool) -> Iterator[str]:
    """The dotted names that a statement asks for, the most exact reading of each."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        # one dot is the file's own package; a package's __init__ is in it already
        parents = source.split(".")[: len(source.split(".")) - node.level + is_package]
        base = ".".join([*(parents if node.level else ()), *filter(None, [node.module])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name == "import_module" and isinstance(node.args[0].value, str):
            yield node.args[0].value


def _file_of(name: str, known: Mapping[str, Path]) -> str | None:
    """The file that has `name`: itself a file, or a name in the file one level up."""
    for candidate in (name, name.rpartition(".")[0]):
        if candidate in known:
            return candidate
    return None


def circles(graph: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of two and more nodes that reach one another, each sorted.

    Args:
        graph: pairs (from, to).
    """
    follow: dict[str, set[str]] = {}
    for source, target in graph:
        follow.setdefault(source, set()).add(target)
        follow.setdefault(target, set())
    reach = {node: _reachable(node, follow) for node in follow}
    groups = {frozenset({n, *(m for m in reach[n] if n in reach[m])}) for n in follow}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(start: str, follow: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in follow[waiting.pop()] - seen:
            seen.add(node)
            waiting.append(node)
    return seen


def room(name: str) -> str:
    """`examples.cli.fields` -> `cli`; a file at the top of examples -> `programs`."""
    parts = name.split(".")
    rooms = {room for level in ROOMS for room in level}
    return parts[1] if len(parts) > 1 and parts[1] in rooms else PROGRAMS


def against_the_order(graph: Iterable[Arrow]) -> list[Arrow]:
    """Arrows from one package or room to another that the tables above do not allow."""
    return [arrow for arrow in graph if not _allowed(arrow)]


def _allowed(arrow: Arrow) -> bool:
    ours, theirs = arrow.source.split(".")[0], arrow.target.split(".")[0]
    if ours != theirs:
        return theirs in FLOORS[ours]
    if ours != "examples" or "examples" in (arrow.source, arrow.target):
        return ours != "examples"  # examples/__init__.py imports nothing and gives nothing
    if room(arrow.source) == room(arrow.target) != PROGRAMS:
        return True
    level = {name: height for height, names in enumerate(ROOMS) for name in names}
    up, down = room(arrow.source), room(arrow.target)
    if level[up] == level[down]:
        return (up, down) in NEIGHBOURS or ALIASES.get(arrow.source) == arrow.target
    return level[up] > level[down]
