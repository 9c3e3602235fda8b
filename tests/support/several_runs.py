"""Runs of programs one after another in the same processes: python several_runs.py FILE.

FILE is JSON: a list of runs, each the name of a program and the words for its command line. What
goes wrong in one is printed, and the next begins.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import torch.distributed

from examples import program

if __name__ == "__main__":
    # accelerate takes the group down at the end of a run; the next one needs it
    torch.distributed.destroy_process_group = lambda group=None: None
    for name, *words in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        program.run_main(import_module(f"examples.{name}").main, words)
