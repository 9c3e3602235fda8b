"""Where figures come from: runs, versions, machines, and whether the checkout was clean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from examples.reporting.runs import Run


def environment(run: Run) -> str:
    """Versions, machine and commit of a run in one line."""
    env = run.environment
    if not env:
        return "unknown: env.json is missing or damaged"
    versions = env.get("versions")
    packages = {"python": env.get("python"), **(versions if isinstance(versions, dict) else {})}
    known = [f"{name} {v}" for name, v in packages.items() if v and v != "not installed"]
    threads = env.get("threads")
    machine = [env.get("platform"), env.get("device"), threads and f"{threads} thread(s)"]
    return "; ".join(
        [
            ", ".join(known) or "versions unknown",
            ", ".join(str(word) for word in machine if word) or "machine unknown",
            checkout(env.get("git_commit")),
        ]
    )


def checkout(commit: object) -> str:
    """`env.json` has a commit with `+` where files differed from it."""
    if not isinstance(commit, str) or not commit:
        return "checkout unknown"
    state = "changed" if commit.endswith("+") else "clean"
    return f"commit {commit.rstrip('+')[:10]}, checkout {state}"


def environments(runs: Sequence[Run]) -> list[str]:
    """The different environments of some runs, each with how many ran there."""
    counts = Counter(environment(run) for run in runs)
    if len(counts) == 1:
        return list(counts)
    return [f"{n} of {len(runs)} runs: {text}" for text, n in counts.items()]
