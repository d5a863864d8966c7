"""Exception types for user errors, and the exit codes of every command.

- A `UserError` is printed as one line on stderr, and the process ends with exit code 2.
- An `UnavailableError` is printed as one line, too, with exit code 1: nobody made a mistake, and
  launchers start the same command again.
- Every other exception is a bug in this package and keeps its traceback.

Alternatives considered:
- Catching every exception at the top: it would hide our own bugs behind a friendly line.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells number it."""


class UserError(ValueError):
    """Base class of user errors in config, data, checkpoint or usage.

    The message says what is wrong, the numbers, which setting to change, and in which direction.
    """


class ConfigError(UserError):
    """Invalid YAML file or override; one line per mistake."""


class DataError(UserError):
    """Chunk file or manifest that is missing, damaged or does not fit the run."""


class CheckpointError(UserError):
    """Checkpoint that is missing, damaged or belongs to another run."""


class RunError(UserError):
    """Run directory that cannot be used as requested."""


class AnotherRefusedError(Exception):
    """Another rank refuses to go on and says why: this one ends with exit code 2, without a word.

    Its text is the problem there, as far as this rank knows.
    """


class UnavailableError(RuntimeError):
    """A file that could not be read or locked although it was tried for a while (`k2train.retry`).

    The environment did it: the same command may succeed later. `number` is that of the last error.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number
