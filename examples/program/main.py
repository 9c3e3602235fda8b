"""Options of a run from the command line, and how a program ends."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import examples.methods
import examples.optimizers  # noqa: F401  both fill the registry
from examples.cli import fields as config
from examples.cli.fields import option
from examples.errors import OptionError, as_user_error, is_user_error
from examples.methods.registry import METHODS, OPTIMIZERS, MethodSpec, OptimizerSpec
from examples.training import memory, threads


@dataclass(frozen=True)
class MethodOptions:
    method: str = option("lora", "how the model is fine-tuned", choices=METHODS)
    optimizer: str | None = option(
        None,
        "what steps the weights; none: ivon for a method that ranks by a posterior, else adamw",
        choices=OPTIMIZERS,
    )

    def specs(self) -> tuple[MethodSpec, OptimizerSpec]:
        """The method and its optimiser.

        Raises:
            OptionError: the method needs a posterior and the optimiser has none.
        """
        method = METHODS[self.method]
        optimizer = OPTIMIZERS[self.optimizer or method.optimizer]
        if method.needs_posterior and not optimizer.has_posterior:
            able = " or ".join(spec.name for spec in OPTIMIZERS.values() if spec.has_posterior)
            raise OptionError(
                f"--method {method.name} ranks by the optimiser's posterior, and --optimizer "
                f"{optimizer.name} has none: use --optimizer {able}"
            )
        return method, optimizer


@dataclass(frozen=True)
class Options:
    """All options of a run.

    Attributes:
        groups: option class -> its instance.
        method: the chosen method; `method_options` are its own.
        optimizer: the chosen optimiser; `optimizer_options` are its own.
        config_file: of `--config`.
        program: its name, such as `run_glue`.
        started: when they were read, for the wall time.
    """

    groups: dict[type, Any]
    method: MethodSpec
    method_options: Any
    optimizer: OptimizerSpec
    optimizer_options: Any
    config_file: str | None = None
    program: str = ""
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __getitem__(self, owner: type) -> Any:
        return self.groups[owner]

    def resolved(self) -> dict[str, Any]:
        """Every option by name, as `--config` reads it."""
        values: dict[str, Any] = {}
        for part in self._parts():
            values.update(dataclasses.asdict(part))
        values |= {"method": self.method.name, "optimizer": self.optimizer.name}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def changed(self) -> dict[str, Any]:
        """Those that are not at their default, and the method and its optimiser."""
        defaults = {i.name: i.default for part in self._parts() for i in dataclasses.fields(part)}
        defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
        chosen = {"method", "optimizer"}
        return {k: v for k, v in self.resolved().items() if k in chosen or v != defaults[k]}

    def _parts(self) -> tuple[Any, ...]:
        return (*self.groups.values(), self.method_options, self.optimizer_options)


def parse(
    argv: Sequence[str],
    program: str,
    summary: str,
    option_classes: Mapping[str, type],
    row: str | None,
    examples: Mapping[str, Iterable[str]] | None = None,
) -> Options | None:
    """Options from the command line and `--config`; None after `--help`.

    Args:
        argv: the words after the program's name.
        program: its module, for `--help`.
        summary: what it does.
        option_classes: title -> option class, beside those of method and optimiser.
        row: the option whose value chooses a row of a config file's `tasks`.
        examples: option -> values that `--help` names.
    """
    option_classes = {**option_classes, "method": MethodOptions}
    specs: dict[str, MethodSpec | OptimizerSpec] = {
        **{f"method {spec.name}": spec for spec in METHODS.values()},
        **{f"optimizer {spec.name}": spec for spec in OPTIMIZERS.values()},
    }
    if any(word in ("-h", "--help") for word in argv):
        own = {f"{title} ({spec.summary})": spec.options for title, spec in specs.items()}
        groups = {**option_classes, **own}
        print(config.help_text(program, summary, groups, examples))
        return None
    everything = config.fields_of(
        [*option_classes.values(), *(spec.options for spec in specs.values())]
    )
    typed = config.given_on_command_line(argv, everything)
    values: dict[str, Any] = {}
    file = typed.pop("config", None)
    given = config.canonical(typed, everything, "command line")
    if file is not None:
        from_file = config.read_file(file, given.get(row or ""))
        values = config.canonical(from_file, everything, f"--config {file}")
    method, optimizer = config.build(MethodOptions, values | given).specs()
    given = config.by_method(given, method.options, "command line")
    values = config.by_method(values, method.options, f"--config {file}") | given
    _refuse_options_of_others(given, option_classes, specs, method, optimizer)
    groups = {group: config.build(group, values) for group in option_classes.values()}
    return Options(
        groups,
        method,
        config.build(method.options, values),
        optimizer,
        config.build(optimizer.options, values),
        file,
        program.rpartition(".")[2],
    )


def with_known_task(
    options: Options | None, data: type, find: Callable[[str], object]
) -> Options | None:
    """The options, unless they name a task that `find` does not know: that is said at once.

    Args:
        options: of a program.
        data: the option class with `task_name`.
        find: raises ValueError.
    """
    if options is not None and options[data].task_name is not None:
        as_user_error(find, options[data].task_name)
    return options


def _refuse_options_of_others(
    given: Mapping[str, Any],
    option_classes: Mapping[str, type],
    specs: Mapping[str, MethodSpec | OptimizerSpec],
    method: MethodSpec,
    optimizer: OptimizerSpec,
) -> None:
    """An option on the command line that the chosen method does not have would do nothing."""
    known = config.fields_of([*option_classes.values(), method.options, optimizer.options])
    for name in given:
        if name not in known:
            title = next(t for t, s in specs.items() if name in config.fields_of([s.options]))
            kind = title.split()[0]
            raise OptionError(
                f"--{name} is an option of {kind} {title.split()[1]}, but --{kind} is "
                f"{method.name if kind == 'method' else optimizer.name}"
            )


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a program; what a user can mend is one line on stderr and exit status 2.

    Args:
        main: gets the words after the program's name; it has not imported torch yet, which reads
            the environment that is set here.
        argv: those words; default: the command line's.
    """
    memory.keep_compiled_kernels()
    memory.keep_freed_memory()
    threads.spin_briefly_beside_others()
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint auto goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
