"""The card of what a run has learnt: base, data, metrics, seed, licences, how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
UNKNOWN = "not known here: that of the base model and of the data holds"


def write_card(
    folder: Path, options: Mapping[str, Any], results: Mapping[str, Any], commit: str | None
) -> None:
    """Writes `README.md` beside the weights; figures that change from run to run stay out.

    Args:
        folder: of the adapter or the model.
        options: of the run.
        results: its metrics among them.
        commit: of this source tree.
    """
    (folder / CARD).write_text(card(options, results, commit), encoding="utf-8")


def card(options: Mapping[str, Any], results: Mapping[str, Any], commit: str | None) -> str:
    """The card as Markdown with the hub's front matter."""
    base, method = str(options.get("model_name_or_path")), options["method"]
    local = Path(base).is_absolute() or Path(base).expanduser().is_dir()
    data = _data(options)
    licence = _licence(Path(base).expanduser())
    front = {
        "base_model": None if local else base,
        "library_name": "transformers" if method == "full" else "peft",
        "license": licence,
        "datasets": [options["dataset_name"]] if options.get("dataset_name") else None,
        "tags": [method],
        "metrics": sorted(_metrics(results)),
    }
    lines = ["---"]
    lines += [f"{name}: {json.dumps(value)}" for name, value in front.items() if value]
    name = Path(base).name if local else base
    lines += ["---", "", f"# {name} on {data}, {method}", ""]
    facts = {
        "Base model": name + (" (a local folder)" if local else ""),
        "Data": data,
        "Method": f"{method}, optimiser {options.get('optimizer')}",
        "Seed": options.get("seed"),
        "Trained parameters": f"{results['trainable_parameters']:,}",
        "Licence": licence or UNKNOWN,
        "Source": f"commit {commit}" if commit else None,
    }
    lines += [f"- {what}: {value}" for what, value in facts.items() if value is not None]
    if metrics := _metrics(results):
        lines += ["", "| metric, validation | value |", "|:--|--:|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
        lines += ["", "One seed says little about another: compare means over several."]
    return "\n".join([*lines, ""])


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    found = {n.removeprefix("eval_"): v for n, v in results.items() if n.startswith("eval_")}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def _data(options: Mapping[str, Any]) -> str:
    names = ("task_name", "dataset_name", "train_file")
    found = next((str(options[name]) for name in names if options.get(name)), "no named data")
    return found if options.get("task_name") else Path(found).name


def _licence(base: Path) -> str | None:
    """What the front matter of the base's own card says."""
    try:
        text = (base / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    lines = [line.partition(":")[2] for line in front.splitlines() if line.startswith("license:")]
    return lines[0].strip().strip("\"'") or None if lines else None
