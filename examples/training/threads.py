"""How a program's threads wait for one another where other work runs beside it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

LOADAVG = Path("/proc/loadavg")  # Linux's; its fourth field is "runnable/all threads", now
LOOK = 0.01  # seconds
SPINS = "1000"  # turns of an empty loop before a waiting thread sleeps: some microseconds


def spin_briefly_beside_others() -> bool:
    """Lets waiting threads sleep at once where there are more threads than processors.

    Between two pieces of parallel work GNU's OpenMP, torch's on Linux, keeps its threads in an
    empty loop for milliseconds. Alone that is the fastest way. Beside another program they take the
    processor from the very thread that they wait for: of two training runs on two processors each
    takes four times as long as alone and more. Sleeping at once costs a lone run about a tenth.

    To be called before torch is imported: OpenMP reads its variables once. Whatever of them is set
    already stays. A run started later, beside this one, chooses for itself alone.

    Returns:
        Whether it was done.
    """
    if "torch" in sys.modules or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return False
    others = runnable_others()
    if others is None or others + _threads() <= (os.cpu_count() or 1):
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True


def runnable_others() -> int | None:
    """Threads of other programs that run or could; None where the system does not say.

    The median over a moment, in which this program does not sleep: of two that start together each
    sees the other. (The load average would tell them a minute later.)
    """
    found: list[int] = []
    end = time.perf_counter() + LOOK
    try:
        while time.perf_counter() < end:
            found.append(int(LOADAVG.read_text().split()[3].split("/")[0]))
    except (OSError, IndexError, ValueError):
        return None
    return sorted(found)[len(found) // 2] - 1


def _threads() -> int:
    """How many threads torch will use: what is set, else one per processor that we may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    usable = getattr(os, "sched_getaffinity", None)
    return int(given) if given.isdecimal() else len(usable(0)) if usable else os.cpu_count() or 1
