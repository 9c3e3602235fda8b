"""Writes the adapters of `peft_cases.py` with PEFT 0.11.1, or loads with it what we wrote.

PEFT 0.11.1 needs a Transformers and a hub client of its time, and shares its import name with the
newest PEFT, so it lives in a folder of its own and runs in a process of its own:

    pip install --no-deps --target .peers/peft011 peft==0.11.1 transformers==4.40.2 \\
        tokenizers==0.19.1 huggingface_hub==0.25.2 requests urllib3 charset-normalizer idna certifi
    PYTHONPATH=.peers/peft011 python tests/golden/make_peft011.py save tests/golden/peft011
    PYTHONPATH=.peers/peft011 python tests/golden/make_peft011.py load FOLDER

The first form made the committed folder; `benchmarks/interchange.py` uses both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import peft

    from golden import peft_cases

    if peft.__version__ != "0.11.1":
        sys.exit(f"this is PEFT {peft.__version__}; put 0.11.1 first on PYTHONPATH (see above)")
    action, folder = sys.argv[1:]
    peft_cases.run(peft, action, Path(folder))
    for card in Path(folder).glob("*/README.md"):
        if action == "save":
            card.unlink()  # PEFT's template, not needed here


if __name__ == "__main__":
    main()
