"""`run_glue` under the name of the example that scripts of the originals call."""

from __future__ import annotations

import sys

from examples.program import run_main
from examples.run_glue import main

if __name__ == "__main__":
    sys.exit(run_main(main))
