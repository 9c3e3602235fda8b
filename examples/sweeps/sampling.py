"""Optuna chooses what a search tries: `by: optuna`.

A list of values is a choice; {low, high} a range, with `log: true` on a logarithmic scale, with
`step:` on a grid; whole numbers where both ends are. With `halving: 3` a run ends after 1, 3 or 9
evaluations, and so on, unless it is among the best third that got so far: asynchronous successive
halving.
The trials are in `optuna.journal` of the sweep's folder, and a sweep that was killed goes on there.
Ranges give values of three digits, so that folders have names and people can repeat a run.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.errors import OptionError
from examples.sweeps.sheet import Point, Sheet, Values

JOURNAL = "optuna.journal"
FAILED = "failed"  # of a trial that ran, unlike one that was interrupted


class OptunaSampler:
    """The trials of one place of the grid.

    Args:
        folder: the sweep's.
        point: the place.
        options: option -> values or range.
        settings: of the search.
        seed: of the sampler.
        where: for errors.

    Attributes:
        runs: how many trials there will be.
    """

    def __init__(
        self, folder: Path, point: Point, options: Values, settings: Values, seed: int, where: str
    ) -> None:
        self.runs = whole(settings, "runs", None, where)
        self.at_once = whole(settings, "at_once", 1, where)
        self.halving = whole(settings, "halving", 0, where)
        self.smaller = str(metric_of(settings, point)).endswith("loss")
        if self.halving and metric_of(settings, point) is None:
            raise OptionError(
                f"{where}: halving needs to know the metric before a run ends: give `metric`, or "
                "the option metric_for_best_model"
            )
        self.space = {n: _distribution(v, f"{where}: {n}") for n, v in options.items()}
        self.seed, self.folder = seed, folder
        content = json.dumps([point.program, point.options, options], sort_keys=True, default=str)
        words = "-".join(point.labels.values()) or "all"
        self.title = f"{words}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
        self._study: Any = None
        self._reported: dict[int, int] = {}  # trial -> its evaluations so far
        self._open: dict[str, Any] = {}  # values, as JSON -> the trial that runs with them

    @property
    def study(self) -> Any:
        """Optuna's study, in the journal. What was running when the sweep ended waits there."""
        if self._study is None:
            import optuna
            from optuna.storages.journal import JournalFileBackend

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.folder.mkdir(parents=True, exist_ok=True)
            backend = JournalFileBackend(str(self.folder / JOURNAL))
            pruner = optuna.pruners.NopPruner()
            if self.halving:
                pruner = optuna.pruners.SuccessiveHalvingPruner(1, max(2, self.halving))
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=self.title,
                pruner=pruner,
                direction="minimize" if self.smaller else "maximize",
                load_if_exists=True,
            )
            for trial in self._study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                self._study.enqueue_trial(trial.params)
            # another draw after a restart than the ones that have been drawn
            drawn = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = optuna.samplers.TPESampler(seed=self.seed + drawn)
        return self._study

    def _ended(self) -> list[Any]:
        """The trials that ran to an end, good or bad."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state.name in ("COMPLETE", "PRUNED") or FAILED in trial.user_attrs
        ]

    def samples(self) -> list[Values]:
        """The ends of all ranges together, and every choice."""
        ends = [
            {n: getattr(d, end) for n, d in self.space.items() if hasattr(d, end)}
            for end in ("low", "high")
        ]
        choices = {n: d.choices for n, d in self.space.items() if hasattr(d, "choices")}
        first = {name: values[0] for name, values in choices.items()}
        each = [{**first, n: v} for n, values in choices.items() for v in values] or [{}]
        return [{**end, **choice} for end in ends for choice in each]

    def earlier(self) -> list[Values]:
        """What was tried by earlier calls of the sweep."""
        return [_shown(trial.params) for trial in self._ended()]

    def ask(self) -> list[Values]:
        """New trials, at most `at_once` together."""
        asked = []
        room = self.runs - len(self._ended())
        while len(self._open) < min(self.at_once, room):
            trial = self.study.ask(self.space)
            values = _shown(trial.params)
            if _key(values) in self._open:  # two at once would be the same run
                self.study.tell(trial, state=_state("FAIL"))
                break
            self._open[_key(values)] = trial
            asked.append(values)
        return asked

    def tell(self, tried: Values, state: str, value: float | None) -> None:
        """What became of a trial; without a figure it counts as failed."""
        trial = self._open.pop(_key(tried), None)
        if trial is None:  # of an earlier call
            return
        if state == "stopped":
            self.study.tell(trial, state=_state("PRUNED"))
        elif value is None:
            trial.set_user_attr(FAILED, True)
            self.study.tell(trial, state=_state("FAIL"))
        else:
            self.study.tell(trial, value)

    def lost(self, tried: Values, values: list[float]) -> bool:
        """Whether successive halving ends a run with these evaluations."""
        trial = self._open.get(_key(tried))
        if trial is None or not self.halving:
            return False
        seen = self._reported.get(trial.number, 0)
        self._reported[trial.number] = len(values)
        for number, value in enumerate(values[seen:], seen + 1):
            trial.report(value, number)
            if trial.should_prune():
                return True
        return False


def optuna_sampler(sheet: Sheet, point: Point, options: Values, where: str) -> OptunaSampler:
    """The sampler of a place, after Optuna is known to be there.

    Raises:
        OptionError: it is not installed, or its options are wrong.
    """
    if find_spec("optuna") is None:
        raise OptionError(f"{where}: by: optuna is not installed; pip install 'rankwise[sweep]'")
    assert sheet.search is not None
    seed = int(sheet.seeds[0])
    return OptunaSampler(sheet.output_dir, point, options, sheet.search, seed, where)


def metric_of(settings: Values, point: Point) -> str | None:
    """The metric that is named before any run has ended."""
    return settings.get("metric") or point.options.get("metric_for_best_model")


def whole(settings: Values, name: str, default: int | None, where: str) -> int:
    """A whole number of at least 1 (0 where that is the default)."""
    value = settings.get(name, default)
    least = 0 if default == 0 else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{where}: {name}: a whole number is needed, such as {default or 8}")
    return value


def _distribution(values: Any, where: str) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(values, list) and values:
        return CategoricalDistribution(values)
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys():
        raise OptionError(f"{where}: a list, or {{low: 1e-4, high: 1e-2, log: true}}, is needed")
    try:
        ends = {n: float(v) if isinstance(v, str) else v for n, v in values.items()}
        integers = all(isinstance(ends[n], int) for n in ("low", "high"))
        return (IntDistribution if integers else FloatDistribution)(**ends)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{where}: {error}") from error


def _shown(params: Values) -> Values:
    """Numbers of three digits."""
    return {n: float(f"{v:.3g}") if isinstance(v, float) else v for n, v in params.items()}


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
