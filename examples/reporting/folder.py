"""The folder of a report: what is written there, and when it may be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from examples.errors import RunError
from examples.reporting import html_page, text_pages
from examples.reporting.content import Content
from examples.reporting.runs import MARK, Found
from examples.reporting.svg import standalone
from transformers_patched.files import write_atomically

MADE_BY = "examples.report"


class ReportFolder:
    """Where a report goes. Making it refuses a folder that holds anything but an earlier report.

    Args:
        path: the folder.

    Raises:
        RunError: something else is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise RunError(f"--output {path} is a file: choose a new folder")
        self.earlier = self._earlier()
        there = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()}
        if foreign := sorted(there - {*self.earlier}):
            raise RunError(
                f"--output {path} has {foreign[0]}, which no report has written there: choose a "
                "new folder"
            )

    def _earlier(self) -> list[str]:
        """The files of the report that is there, itself among them."""
        try:
            mark = json.loads((self.path / MARK).read_text("utf-8"))
            files = mark["files"] if mark["made_by"] == MADE_BY else []
            inside = [name for name in files if ".." not in Path(name).parts]
            return [MARK, *(name for name in inside if not Path(name).is_absolute())]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def refuse_empty(self, found: Found) -> None:
        """Nothing is written where no run was found.

        Raises:
            RunError: there is no run; the message has the first folder that was left out.
        """
        if found.runs:
            return
        why = "; ".join(f"{name}: {reason}" for name, reason in [*found.skipped.items()][:1])
        count = len(found.skipped)
        more = f": {count} folder(s) left out, the first {why}" if why else ""
        raise RunError(f"no finished run in what was named{more}")

    def write(self, content: Content, latex: bool) -> None:
        """Writes all files; those of an earlier report that this one has not are removed."""
        files: dict[str, bytes] = {}
        for figure in content.figures:
            name = f"{text_pages.FIGURES}/{figure.file}"
            files[name] = figure.png or standalone(figure.svg).encode("utf-8")
        texts = {
            "configurations.csv": text_pages.configurations_csv(content.tasks),
            "runs.csv": text_pages.runs_csv(content.found.runs),
            "report.md": text_pages.markdown(content),
            "report.html": html_page.page(content),
        }
        if latex:
            texts["report.tex"] = text_pages.latex(content)
        files |= {name: text.encode("utf-8") for name, text in texts.items()}
        mark = {"made_by": MADE_BY, "files": sorted({*files, *self.earlier} - {MARK})}
        self._put(MARK, json.dumps(mark, indent=2).encode("utf-8"))  # first: it proves the others
        for name, data in files.items():
            self._put(name, data)
        for name in {*self.earlier} - {*files, MARK}:
            (self.path / name).unlink(missing_ok=True)
        if (figures := self.path / text_pages.FIGURES).is_dir() and not any(figures.iterdir()):
            shutil.rmtree(figures)
        mark["files"] = sorted(files)
        self._put(MARK, json.dumps(mark, indent=2).encode("utf-8"))

    def _put(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda aside: aside.write_bytes(data))
