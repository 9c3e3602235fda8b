"""Errors that a user can mend: the message says what to change, and no traceback is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """The base of all of them. A program prints the message and ends with status 2."""


class OptionError(UserError, ValueError):
    """An option that does not exist, or a value that it cannot have."""


class DataError(UserError, ValueError):
    """A data file is missing or wrong; the message names it, the line and the reason."""


class DownloadError(UserError, RuntimeError):
    """What was asked for cannot be had; the message says why and what to do."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class SetupError(UserError, ValueError):
    """What a part refused while a run was built: options that do not fit, missing files."""


def is_user_error(error: BaseException) -> bool:
    """Whether an error's message says what its user should change."""
    return isinstance(error, UserError) or isinstance(error, _model_errors())


def _model_errors() -> tuple[type[Exception], ...]:
    """The model zoo's errors; it stands below `examples`, so they cannot be `UserError`s."""
    from transformers_patched.checkpoint import CheckpointError
    from transformers_patched.configuration import ConfigError

    return CheckpointError, ConfigError


def as_user_error(build: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `build`; turns ValueError, NotImplementedError and OSError into SetupError.

    A SetupError is shown to the user without a traceback.
    """
    try:
        return build(*args, **kwargs)
    except (ValueError, NotImplementedError, OSError) as error:
        if is_user_error(error):
            raise
        raise SetupError(str(error)) from error
