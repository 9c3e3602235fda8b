"""Errors that a user can mend: the message says what to change, and no traceback is shown."""

from __future__ import annotations


class UserError(Exception):
    """The base of all of them. A program prints the message and ends with status 2."""


class OptionError(UserError, ValueError):
    """An option that does not exist, or a value that it cannot have."""


class DataError(UserError, ValueError):
    """A data file is missing or wrong; the message names it, the line and the reason."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class SetupError(UserError, ValueError):
    """What a part refused while a run was built: options that do not fit, missing files."""
