"""An older name of `examples.export`."""

import sys

from examples import program
from examples.export import main

if __name__ == "__main__":
    sys.exit(program.run_main(main))
