"""Sizes and habits of the project's code, a row per folder; other folders of Python for comparison.

    python -m benchmarks.code_measures                          # the project's own packages
    python -m benchmarks.code_measures --root OLD_CHECKOUT      # before a change
    python -m benchmarks.code_measures ../litgpt/litgpt         # beside another project

Lines are counted as in the file; a function's from `def` to its end, methods and inner functions
included. ret, arg: functions and parameters that are annotated (without self, cls, ctx); Any: of
the annotated ones, those that are just Any (without *args and **kwargs); doc, cm: lines that a
docstring or a comment is on. up, circles: imports against the order of packages, and groups of
files that import one another (benchmarks/import_graph.py says how both are counted).
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import import_graph

OWN = (*import_graph.FLOORS, "benchmarks", "tests")
HEADS = (
    "code", "files", "loc", "median file", "longest file", "fns", "median fn", "p90", "longest fn",
    "> 60", "ret %", "arg %", "Any %", "doc %", "cm %", "col", "up", "circles",
)  # fmt: skip
LONG = 60  # lines of a function that are too many
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Measures:
    """What is counted in the files of one folder."""

    file_lines: dict[str, int] = field(default_factory=dict)
    function_lines: list[tuple[int, str]] = field(default_factory=list)
    returns: int = 0
    parameters: int = 0
    annotated: int = 0
    named: int = 0  # annotated, without *args and **kwargs
    anything: int = 0
    docstring_lines: int = 0
    comment_lines: int = 0
    widest: int = 0

    def add(self, path: Path) -> None:
        """Counts one file."""
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        name = path.parent.name if path.name == "__init__.py" else path.stem
        self.file_lines[f"{name} {path}"] = len(lines)
        self.widest = max([self.widest, *map(len, lines)])
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comment_lines += sum(token.type == tokenize.COMMENT for token in tokens)
        for node in ast.walk(ast.parse(text)):
            self._add_docstring(node)
            if isinstance(node, Function):
                self._add_function(node)

    def _add_docstring(self, node: ast.AST) -> None:
        if not isinstance(node, ast.Module | ast.ClassDef | Function) or not node.body:
            return
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                self.docstring_lines += _length(first)

    def _add_function(self, node: Function) -> None:
        self.function_lines.append((_length(node), node.name))
        self.returns += node.returns is not None
        given = node.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        named = [one for one in named if one.arg not in ("self", "cls", "ctx")]
        stars = [one for one in (given.vararg, given.kwarg) if one is not None]
        self.parameters += len(named) + len(stars)
        self.annotated += sum(one.annotation is not None for one in [*named, *stars])
        kinds = [ast.unparse(one.annotation) for one in named if one.annotation is not None]
        self.named += len(kinds)
        self.anything += sum(kind in ("Any", "Any | None") for kind in kinds)

    def cells(self) -> list[str]:
        """The table's cells between the folder's name and its imports."""
        sizes = list(self.file_lines.values())
        total = sum(sizes)
        lengths = sorted(length for length, _ in self.function_lines) or [0]
        longest_file = max(self.file_lines, key=self.file_lines.__getitem__).split()[0]
        longest, name = max(self.function_lines, default=(0, "–"))
        return [
            f"{len(sizes)}",
            f"{total:,}",
            f"{statistics.median(sizes):.0f}",
            f"{max(sizes):,} {longest_file}",
            f"{len(self.function_lines):,}",
            f"{statistics.median(lengths):.0f}",
            f"{lengths[int(0.9 * len(lengths))]}",
            f"{longest} {name}",
            f"{sum(length > LONG for length in lengths)}",
            _percent(self.returns, len(self.function_lines)),
            _percent(self.annotated, self.parameters),
            _percent(self.anything, self.named, 1),
            _percent(self.docstring_lines, total, 1),
            _percent(self.comment_lines, total, 1),
            f"{self.widest}",
        ]


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _percent(part: int, whole: int, digits: int = 0) -> str:
    return f"{100 * part / whole:.{digits}f}" if whole else "–"


def measured(folders: Sequence[Path]) -> Measures:
    """Counts every Python file in `folders`."""
    found = Measures()
    for folder in folders:
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
            found.add(path)
    return found


def imports(root: Path) -> dict[str, list[str]]:
    """Package -> how many of its imports go upwards, and how many circles its files are in."""
    found = import_graph.arrows(import_graph.files(root))
    up = [arrow.source for arrow in import_graph.against_the_order(found)]
    rings = import_graph.circles((arrow.source, arrow.target) for arrow in found)
    return {
        package: [
            str(sum(name.split(".")[0] == package for name in up)),
            str(sum(ring[0].split(".")[0] == package for ring in rings)),
        ]
        for package in import_graph.FLOORS
    }


def table(root: Path, others: Sequence[Path]) -> str:
    """The rows as Markdown: the project's folders in `root`, all but tests together, the others."""
    own = [root / name for name in OWN if (root / name).is_dir()]
    arrows = imports(root)
    rows = [(folder.name, [folder], arrows.get(folder.name, ["–", "–"])) for folder in own]
    if own:
        together = [folder for folder in own if folder.name != "tests"]
        sums = [str(sum(int(pair[i]) for pair in arrows.values())) for i in (0, 1)]
        rows.insert(len(together), ("**all but tests**", together, sums))
    rows += [(other.name, [other], ["–", "–"]) for other in others]
    lines = [HEADS, ["---"] * len(HEADS)]
    lines += [[name, *measured(folders).cells(), *pair] for name, folders, pair in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("others", nargs="*", type=Path, help="folders or files of other projects")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    options = parser.parse_args()
    print(table(options.root, options.others))


if __name__ == "__main__":
    main()
