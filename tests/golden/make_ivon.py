"""Writes ivon.npz: what ivon-opt 0.1.3 computes in `ivon_cases.py`, for `test_ivon_golden.py`.

    pip install --no-deps --target .peers/ivon ivon-opt==0.1.3
    PYTHONPATH=.peers/ivon python tests/golden/make_ivon.py

A process of its own, because the package has the name of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))


def main() -> None:
    import ivon
    from golden import ivon_cases

    if (FOLDER.parents[1] / "ivon") in Path(ivon.__file__).resolve().parents:
        sys.exit("this is our own package: put ivon-opt first on PYTHONPATH (see above)")
    arrays = {
        f"{case}/{name}": tensor.numpy()
        for case in ivon_cases.CASES
        for name, tensor in ivon_cases.run(ivon.IVON, case).items()
    }
    np.savez_compressed(FOLDER / "ivon.npz", **arrays)


if __name__ == "__main__":
    main()
