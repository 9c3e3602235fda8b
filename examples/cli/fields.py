"""Options: frozen dataclasses without torch, a command line, YAML to read, JSON to save.

A program names its option classes; the chosen method and optimiser add theirs. Values come from,
in this order, the defaults, `--config FILE.yaml` (or .json, a run's own `config.json` included),
and the command line. `--flag`, `--no_flag` and `--flag false` set switches; lists take commas. An
unknown name is an error that shows what is close to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.cli.names import ALIASES, BY_METHOD, GONE, SWITCHES
from examples.errors import OptionError


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with its help and the range of its values."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


# -- values -------------------------------------------------------------------------------------


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types a hint allows, None left out."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return tuple(k for k in typing.get_args(hint) if k is not type(None)) if union else (hint,)


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).casefold() not in known:
        raise ValueError("true or false")
    return known[str(value).casefold()]


def _whole(value: Any) -> int:
    number = float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError
    return int(number)


def _words(value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else list(value)
    return tuple(str(word).strip() for word in words if str(word).strip())


_CONVERT: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_switch, "true or false"),
    int: (_whole, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
    tuple[str, ...]: (_words, "names with commas between them"),
}


def convert(item: dataclasses.Field, hint: Any, value: Any) -> Any:
    """`value` (text, or what YAML made of it) as the field's type.

    Raises:
        OptionError: it names the option, the value, and values that would do.
    """
    if value is None or (isinstance(value, str) and value.casefold() in ("none", "null", "")):
        if _optional(hint):
            return None
        if value is None or value == "":
            raise OptionError(f"--{item.name} needs a value, such as {_example(item)}")
    wanted = []
    for kind in _kinds(hint):
        action, words = _CONVERT[kind]
        wanted.append(words)
        try:
            result = action(value)
        except (ValueError, TypeError, OverflowError):
            continue
        _check(item, result)
        return result
    raise OptionError(
        f"--{item.name} {value}: {' or '.join(wanted)} is needed, such as {_example(item)}"
    )


def _example(item: dataclasses.Field) -> str:
    choices = item.metadata.get("choices")
    if choices and item.default not in choices:
        return next(iter(choices))
    if item.default in (None, ""):
        return "8" if item.metadata.get("low") is not None else "NAME"
    return ",".join(item.default) if isinstance(item.default, tuple) else str(item.default)


def _check(item: dataclasses.Field, value: Any) -> None:
    choices, low, high = (item.metadata.get(key) for key in ("choices", "low", "high"))
    if choices:
        for word in value if isinstance(value, tuple) else (value,):
            if word not in choices:
                near = difflib.get_close_matches(str(word), choices, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise OptionError(f"--{item.name} {word}: {hint}choose among {', '.join(choices)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (low is None or value >= low) or not (high is None or value <= high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise OptionError(f"--{item.name} {value}: must be {bounds}, such as {_example(item)}")
        if value != value:
            raise OptionError(f"--{item.name} {value}: not a number; use {_example(item)}")


def fields_of(classes: Iterable[type]) -> dict[str, tuple[dataclasses.Field, Any]]:
    """name -> (field, type) of all options of these classes; the first of a name counts."""
    found: dict[str, tuple[dataclasses.Field, Any]] = {}
    for owner in classes:
        hints = _hints(owner)
        for item in dataclasses.fields(owner):
            found.setdefault(item.name, (item, hints[item.name]))
    return found


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    """The types of a class's fields: a sweep asks for them once a run."""
    return typing.get_type_hints(owner)


# -- the command line ---------------------------------------------------------------------------


def given_on_command_line(
    argv: Sequence[str], fields: Mapping[str, tuple[dataclasses.Field, Any]]
) -> dict[str, Any]:
    """name -> text (True for a bare switch), the last of each; unknown names are left in."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    unknown = object()
    words = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            name = ALIASES.get(name, name)
            if name.startswith("no_") and _is_switch(name[3:], fields):
                name, equals, value = name[3:], "=", str(not _switch(value or True)).lower()
            word = f"--{name}{equals}{value}"
        words.append(word)
    names = {*fields, *ALIASES, *SWITCHES, *GONE, "config"}
    names |= {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    for name in sorted(names):
        switch = name in SWITCHES or _is_switch(name, fields) or name not in {*fields, *ALIASES}
        extra = {"nargs": "?", "const": True} if switch and name != "config" else {}
        parser.add_argument(f"--{name}", default=unknown, **extra)
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise OptionError(str(error).replace("argument ", "", 1)) from None
    if rest:
        raise OptionError(f"{rest[0]!r} belongs to no option; options begin with --")
    return {name: value for name, value in vars(found).items() if value is not unknown}


def _is_switch(name: str, fields: Mapping[str, tuple[dataclasses.Field, Any]]) -> bool:
    name = ALIASES.get(name, name)
    return name in fields and bool in _kinds(fields[name][1])


def canonical(
    given: Mapping[str, Any],
    fields: Mapping[str, tuple[dataclasses.Field, Any]],
    source: str,
) -> dict[str, Any]:
    """Replaces the originals' names by ours and refuses unknown ones.

    Args:
        given: from the command line or a file.
        fields: all options there are.
        source: named in errors.
    """
    result: dict[str, Any] = {}
    soft: dict[str, Any] = {}
    typed: dict[str, str] = {}

    def put(name: str, value: Any, as_typed: str) -> None:
        if name in result and result[name] != value:
            raise OptionError(
                f"{source}: --{typed[name]} {result[name]} and --{as_typed} {value} are the same "
                "option; give one of them"
            )
        result[name], typed[name] = value, as_typed

    for name, value in given.items():
        target = ALIASES.get(name, name)
        if target in fields:
            put(target, value, name)
        elif name in SWITCHES:
            target, meaning = SWITCHES[name]
            if target in fields and _switch(value):
                soft[target] = meaning
        elif name.startswith("no_") and _is_switch(name[3:], fields):
            put(ALIASES.get(name[3:], name[3:]), not _switch(value), name)
        elif name in GONE:
            raise OptionError(f"{source}: --{name} has no meaning here: {GONE[name]}")
        else:
            near = difflib.get_close_matches(name, [*fields, *ALIASES, *SWITCHES], 3, 0.6)
            hint = f"; did you mean --{' or --'.join(near)}?" if near else "; see --help"
            raise OptionError(f"{source}: there is no option --{name}{hint}")
    return {**soft, **result}


def by_method(values: Mapping[str, Any], owner: type, source: str) -> dict[str, Any]:
    """The names that mean an option of `owner`, the chosen method's, under that option's name."""
    own = fields_of([owner])
    found = dict(values)
    for name, target in BY_METHOD.items():
        if name in values and name not in own and target in own:
            if target in values and values[target] != values[name]:
                raise OptionError(f"{source}: --{name} and --{target} are the same; give one")
            found[target] = found.pop(name)
    return found


def build(owner: type, values: Mapping[str, Any]) -> Any:
    """An instance of one option class from raw values, those of other classes ignored."""
    fields = fields_of([owner])
    chosen = {name: convert(*fields[name], values[name]) for name in fields if name in values}
    missing = [
        item.name
        for item, _ in fields.values()
        if item.default is dataclasses.MISSING and item.name not in chosen
    ]
    if missing:
        raise OptionError(f"--{missing[0]} is needed (see --help)")
    return owner(**chosen)


def read_file(path: str | Path, row: str | None = None) -> dict[str, Any]:
    """Options from YAML or JSON: `name: value` lines; `tasks:` holds rows that add to them.

    `like: OTHER.yaml` adds the file to another one beside it, line by line and row by row.

    Args:
        path: the file.
        row: which row of `tasks`.
    """
    values, rows = _sheet(Path(path))
    if rows and row is not None:
        if row not in rows:
            raise OptionError(f"--config {path}: no row {row!r} under tasks; has {', '.join(rows)}")
        values.update(rows[row])
    for name, value in values.items():
        if isinstance(value, dict):
            raise OptionError(f"--config {path}: {name} must be one value, not a table")
    return {str(name): value for name, value in values.items()}


def _sheet(path: Path, after: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, dict]]:
    """A file's lines and rows, those of the files it is like included.

    Args:
        path: the file.
        after: the files that led here.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--config {path}: cannot be read ({reason})") from error
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:  # yaml's errors share no base with json's
        raise OptionError(f"--config {path}: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise OptionError(f"--config {path}: lines of the form `name: value` are expected")
    rows = {task: row or {} for task, row in (values.pop("tasks", None) or {}).items()}
    other = values.pop("like", None)
    if other is None:
        return values, rows
    if path in after:
        raise OptionError(f"--config {path}: it is like itself")
    before, earlier = _sheet(path.with_name(str(other)), (*after, path))
    merged = {task: {**earlier.get(task, {}), **rows.get(task, {})} for task in {**earlier, **rows}}
    return {**before, **values}, merged


def help_text(
    program: str,
    summary: str,
    groups: Mapping[str, type],
    examples: Mapping[str, Iterable[str]] | None = None,
) -> str:
    """What `--help` prints: every option with its type, default and meaning.

    Args:
        program: its module.
        summary: what it does.
        groups: title -> option class.
        examples: option -> values to name beside its meaning.
    """
    lines = [f"usage: python -m {program} --option value … [--config FILE.yaml]", "", summary]
    seen: set[str] = set()
    every = ALIASES | BY_METHOD
    also = {target: [a for a in every if every[a] == target] for target in every.values()}
    for title, owner in groups.items():
        own = {n: f for n, f in fields_of([owner]).items() if n not in seen}
        if not own:
            continue
        lines += ["", f"{title}:"]
        for name, (item, hint) in own.items():
            seen.add(name)
            kind = "|".join(item.metadata.get("choices") or ()) or _metavar(hint)
            names = ", ".join(f"--{n}" for n in (name, *also.get(name, ())))
            head = f"  {names} {kind}".rstrip()
            default = "needed" if item.default is dataclasses.MISSING else _shown(item.default)
            meaning = item.metadata["help"]
            if values := (examples or {}).get(name):
                meaning += f": {' '.join(values)}"
            lines += [head, f"        {meaning} (default: {default})"]
    lines += ["", "Switches of the originals, for other options:"]
    lines += [f"  --{name}: --{target} {value}" for name, (target, value) in SWITCHES.items()]
    return "\n".join(lines)


def _metavar(hint: Any) -> str:
    names = {bool: "[true|false]", int: "N", float: "X", str: "TEXT", tuple[str, ...]: "A,B,…"}
    return "|".join(names[kind] for kind in _kinds(hint))


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return (
        ",".join(default)
        if isinstance(default, tuple)
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )
