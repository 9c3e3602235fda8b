"""Writes `adalora/` with PEFT 0.11.1, or loads with it the adapters that we wrote.

    PYTHONPATH=.peers/peft011 python tests/golden/make_adalora.py save tests/golden/adalora
    PYTHONPATH=.peers/peft011 python tests/golden/make_adalora.py load FOLDER

`make_peft011.py` says how PEFT 0.11.1 gets into `.peers/peft011`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def save(peft: Any, folder: Path) -> None:
    from golden import adalora_cases as cases

    averages: dict[str, np.ndarray] = {}

    def drive(model: Any, optimizer: Any) -> Any:
        def after(t: int) -> None:
            model.base_model.update_and_allocate(t)
            if t == 30:
                allocator = model.base_model.rankallocator
                for name, value in allocator.exp_avg_ipt.items():
                    averages[f"smoothed {name}"] = value.numpy().copy()
                    averages[f"variation {name}"] = allocator.exp_avg_unc[name].numpy().copy()

        return after

    model, arrays = cases.train(peft, drive)
    pattern = model.peft_config["default"].rank_pattern
    arrays.update({f"kept {name}": np.array(kept) for name, kept in pattern.items()})
    counts = cases.phases(peft, cases.pefts_way)
    np.savez_compressed(folder / "training.npz", **arrays, **averages, phases=np.array(counts))
    for case in cases.FILES:
        if case == "equal ranks":  # PEFT cannot cut to the ranks it starts with
            continue
        cases.save(peft, case, folder / case.replace(" ", "_"), cases.pefts_way)
    for card in folder.glob("*/README.md"):
        card.unlink()  # PEFT's template, not needed here


def main() -> None:
    import peft

    from golden import adalora_cases as cases

    if peft.__version__ != "0.11.1":
        sys.exit(f"this is PEFT {peft.__version__}; put 0.11.1 first on PYTHONPATH (see above)")
    action, folder = sys.argv[1:]
    if action == "save":
        Path(folder).mkdir(exist_ok=True)
        save(peft, Path(folder))
    else:
        cases.load_all(peft, Path(folder))


if __name__ == "__main__":
    main()
