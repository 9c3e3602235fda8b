"""A run's progress for people: a bar with remaining time, loss and metric, or lines of text."""

from __future__ import annotations

import sys
import time


class ProgressBar:
    """One bar on a terminal; elsewhere a line per log entry.

    Args:
        total: optimiser steps of the whole run.
        done: steps done before (a resumed run).
        show: this is the main process.
        plain: lines even on a terminal.
    """

    def __init__(
        self, total: int, done: int = 0, *, show: bool = True, plain: bool = False
    ) -> None:
        self.total, self.first, self.show = total, done, show
        self.started = time.perf_counter()
        self.facts: dict[str, str] = {}
        self.bar = None
        if show and not plain and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1
            )

    def advance(self) -> None:
        """One more step is done."""
        if self.bar is not None:
            self.bar.update()

    def note(self, step: int, **facts: float) -> None:
        """Shows figures beside the bar, or prints a line with them and the time that is left."""
        self.facts.update({name: f"{value:.4g}" for name, value in facts.items()})
        if self.bar is not None:
            self.bar.set_postfix(self.facts, refresh=False)
        elif self.show:
            words = "  ".join(f"{name} {value:.4g}" for name, value in facts.items())
            self._print(f"step {step}/{self.total}  {words}  ({self._left(step)} left)")

    def line(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.show:
            self._print(text)

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        done = step - self.first
        if done < 1:
            return "?"
        seconds = int((time.perf_counter() - self.started) / done * (self.total - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
