"""Who can read whose adapter files: {ours, PEFT 0.11.1, newest PEFT} × {save, load} × variants.

    python -m benchmarks.interchange

Every side saves each variant of `tests/golden/peft_cases.py`, all trained parameters moved, and
every side loads what the others saved onto the same base. A cell is the largest difference of the
logits; an error is named. PEFT 0.11.1 is expected in `.peers/peft011` (see
`tests/golden/make_peft011.py`) and skipped when absent. The newest PEFT's files are also given to
0.11.1 with the configuration keys it does not know taken out, which is what its users have to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.peers import PEERS, ROOT

GOLDEN = ROOT / "tests" / "golden"
OLD = PEERS / "peft011"
WORKER = (
    "import importlib, pathlib, sys; sys.path.insert(0, sys.argv[1]); "
    "from golden import peft_cases; "
    "peft_cases.run(importlib.import_module(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]))"
)
SIDES = {"ours": ("peft_custom", ROOT), "PEFT 0.11.1": ("peft", OLD), "newest PEFT": ("peft", ROOT)}


def work(side: str, action: str, folder: Path) -> dict[str, float | str]:
    """Saves or loads every variant in a process of its own."""
    library, path = SIDES[side]
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(GOLDEN.parent), library, action, str(folder)],
        env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{side}, {action}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def without_newer_keys(folder: Path, known: set[str], target: Path) -> Path:
    """A copy of the saved adapters whose configurations have only keys that 0.11.1 knows."""
    shutil.copytree(folder, target)
    for path in target.glob("*/adapter_config.json"):
        values = json.loads(path.read_text())
        kept = {key: value for key, value in values.items() if key in known}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True))
    return target


def cell(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else value.split(":")[0]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.path.insert(0, str(GOLDEN.parent))
    from golden.peft_cases import VARIANTS

    sides = [side for side in SIDES if side != "PEFT 0.11.1" or OLD.is_dir()]
    columns: dict[str, dict[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {side: Path(place) / side.replace(" ", "_") for side in sides}
        for side in sides:
            failed = work(side, "save", folders[side])
            if failed:
                print(f"{side} could not save: {failed}")
        for saver in sides:
            for loader in sides:
                folder, label = folders[saver], f"{saver} → {loader}"
                if saver == "newest PEFT" and loader == "PEFT 0.11.1":
                    known = set(
                        json.loads(
                            (GOLDEN / "peft011" / "rslora" / "adapter_config.json").read_text()
                        )
                    )
                    folder, label = (
                        without_newer_keys(folder, known, Path(place) / "stripped"),
                        f"{label} (keys stripped)",
                    )
                columns[label] = work(loader, "load", folder)
    print("| variant | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for variant in VARIANTS:
        print(f"| {variant} | " + " | ".join(cell(c[variant]) for c in columns.values()) + " |")
    for label, results in columns.items():
        for variant, value in results.items():
            if isinstance(value, str):
                print(f"\n{label}, {variant}: {value}")


if __name__ == "__main__":
    main()
