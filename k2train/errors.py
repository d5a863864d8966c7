"""The mistakes a user can make, as one family of exceptions.

Anything derived from `UserError` is shown as one line on stderr and ends the process with exit code 2. Everything else
is our own bug and keeps its traceback: catching it here would hide it.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75


class UserError(ValueError):
    """A mistake in config, data, checkpoint or usage; the message says what, the numbers, which knob, which way."""


class ConfigError(UserError):
    """A mistake in a YAML file or an override; one line a mistake."""


class DataError(UserError):
    """A chunk file or a manifest that is missing, damaged or does not fit the run."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class RunError(UserError):
    """A run directory that cannot be used as asked."""
