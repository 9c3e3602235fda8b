"""What a program keeps in memory: freed blocks, and a bounded number of compiled kernels."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
FREED = """
import os
import examples.training.memory as memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

print(memory.keep_freed_memory())
before = resident()
block = bytearray(200 * 2**20)
block[:] = b"x" * len(block)
del block
print(resident() - before)
"""


def run(code: str, **variables: str) -> list[str]:
    ours = ("MALLOC_", "LRU_CACHE", "ONEDNN_PRIMITIVE_CACHE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@glibc
def test_freed_blocks_stay_for_the_next_step() -> None:
    done, kept = run(FREED)
    assert done == "True" and int(kept) > 150 * 2**20


@glibc
def test_thresholds_of_the_environment_stay() -> None:
    done, kept = run(FREED, MALLOC_TRIM_THRESHOLD_="131072")
    assert done == "False" and int(kept) < 50 * 2**20


def test_room_for_compiled_kernels_unless_it_is_set() -> None:
    code = (
        "import os; from examples.program import run_main;"
        "run_main(lambda argv: 0, []);"
        "print(os.environ['LRU_CACHE_CAPACITY'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    )
    assert run(code, LRU_CACHE_CAPACITY="7", ONEDNN_PRIMITIVE_CACHE_CAPACITY="8") == ["7", "8"]
    assert run(code) == ["256", "256"]
