"""Fault injection: named points where a run can be made to fail on purpose, for tests of recovery.

A fault is `POINT[@rank=R][@step=S][@nth=N]:ACTION`. Several are separated by `;`; each fires once:

    save.hashed@rank=1@step=10:kill    SIGKILL to rank 1 at that point of the save of step 10
    step.forward@nth=3:sleep=0.5       at the third visit of the point, on any rank
    gradient@rank=0@step=4:nan         a value fault: the caller asks with `find` and applies it

- Actions of `point`: kill, stop (SIGSTOP), term, usr1, abort, segv, exit=CODE, sleep=SECONDS,
  error=ERRNO (an OSError such as ENOSPC).
- Faults are armed once, by a command line, from the variable K2TRAIN_FAULTS. A start is refused
  unless `run.allow` names `faults`, and its ledger keeps what was armed: a variable that was left
  behind must not change the numbers of a run without a trace.
- Without armed faults a point costs one function call and the check of an empty list.

Alternatives considered:
- Patching functions from outside: it reaches one process of several, and breaks when a name
  changes.
"""

import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from k2train.errors import RunError

VARIABLE = "K2TRAIN_FAULTS"
PERMISSION = "faults"
"""Name in `run.allow` that permits a start with faults."""
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "abort": signal.SIGABRT,
    "segv": signal.SIGSEGV,
}

POINTS = (
    "start.locked", "start.agreed", "start.connect", "start.loaded", "start.aside",
    "step.read", "step.forward", "step.reduce", "step.update", "step.done", "evaluate",
    "save.snapshot", "save.begin", "save.room", "save.model", "save.optimizer", "save.hashed",
    "save.manifest", "save.synced", "save.renamed", "save.committed",
    "retire.expire", "retire.marked", "retire.done", "rollback.kept", "rollback.written",
    "ledger.append", "end",
)  # fmt: skip
"""Points that call `point`, in the order in which a run reaches them."""
VALUES = ("gradient", "loss", "weight", "moment")
"""Value faults: points that ask with `find` and change a value themselves."""
VALUE_ACTIONS = {
    "gradient": ("nan", "inf", "huge"),
    "loss": ("nan", "inf", "huge"),
    "weight": ("flip",),
    "moment": ("flip",),
}


@dataclass
class Fault:
    """One fault to inject. `rank` and `step` None match any; `nth` counts the matching visits."""

    point: str
    action: str
    argument: str = ""
    rank: int | None = None
    step: int | None = None
    nth: int = 1
    text: str = field(default="", compare=False)
    """The fault as it was written."""
    seen: int = field(default=0, compare=False)
    struck: bool = field(default=False, compare=False)


@dataclass
class _State:
    rank: int = 0
    step: int = 0
    armed: list[Fault] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)


_state = _State()


def parse(text: str) -> list[Fault]:
    """Parse faults in the form of the module docstring.

    Raises RunError naming the part that is not understood.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        target, colon, effect = part.partition(":")
        name, *conditions = target.split("@")
        action, _, argument = effect.partition("=")
        fault = Fault(name, action, argument, text=part)

        if not colon or name not in POINTS + VALUES:
            raise RunError(
                f"{VARIABLE}: {part!r} names no fault point; known points: "
                f"{', '.join(POINTS + VALUES)}"
            )

        if name in POINTS and action not in (*SIGNALS, "exit", "sleep", "error"):
            raise RunError(
                f"{VARIABLE}: {part!r} has no known action; known actions: {', '.join(SIGNALS)}, "
                "exit=, sleep=, error="
            )
        if name in VALUES and action not in VALUE_ACTIONS[name]:
            raise RunError(
                f"{VARIABLE}: {part!r} has no known action; those of {name} are "
                f"{', '.join(VALUE_ACTIONS[name])}"
            )

        for condition in conditions:
            key, _, value = condition.partition("=")
            if key not in ("rank", "step", "nth") or not value.isdigit():
                raise RunError(
                    f"{VARIABLE}: {condition!r} in {part!r} must be rank=, step= or nth= "
                    "and a number"
                )
            setattr(fault, key, int(value))

        found.append(fault)
    return found


def arm(text: str, rank: int) -> None:
    """Arm the faults of `text` in this process, replacing any earlier ones. Raises RunError."""
    _state.rank, _state.step, _state.armed, _state.struck = rank, 0, parse(text), []


def require_permission(text: str, allow: Sequence[str]) -> None:
    """Refuse faults that nobody permitted; `allow` is the config's `run.allow`.

    Raises RunError for faults without permission, and for those that are not understood.
    """
    if parse(text) and PERMISSION not in allow:
        raise RunError(
            f"{VARIABLE} is set ({text.strip()!r:.100}), so this run would fail on purpose; "
            f"unset it, or permit it with run.allow=[{PERMISSION}]"
        )


def armed_faults() -> list[str]:
    """Return the faults armed in this process, as they were written."""
    return [fault.text for fault in _state.armed]


def set_step(step: int) -> None:
    """Set the step that the following points belong to."""
    _state.step = step


def find(name: str) -> Fault | None:
    """Return the fault that fires at this visit of `name`, if any; it will not fire again."""
    if not _state.armed:
        return None

    return _find(name, _state.armed)


def value_changed(name: str) -> None:
    """Note that a value fault was made: the caller of `find` has changed the value."""
    _state.struck.append(name)


def take_changed() -> list[float]:
    """Return how many value faults of each kind of `VALUES` were made here since the last call."""
    struck, _state.struck = _state.struck, []
    return [float(struck.count(name)) for name in VALUES]


def _find(name: str, armed: Sequence[Fault]) -> Fault | None:
    for fault in armed:
        if fault.point != name or fault.struck or fault.rank not in (None, _state.rank):
            continue
        if fault.step not in (None, _state.step):
            continue

        # `nth` counts only the visits that match rank and step.
        fault.seen += 1
        if fault.seen == fault.nth:
            fault.struck = True
            return fault

    return None


def point(name: str) -> None:
    """Fail here when a fault is armed for the point `name`."""
    if _state.armed and (fault := _find(name, _state.armed)) is not None:
        _fire(fault)


def _fire(fault: Fault) -> None:

    if fault.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.action])
        if fault.action == "kill":
            # The signal arrives at once; nothing after this point may run before it does.
            time.sleep(60)
    elif fault.action == "exit":
        os._exit(int(fault.argument or 1))
    elif fault.action == "sleep":
        time.sleep(float(fault.argument))
    else:
        code = getattr(errno, fault.argument, errno.EIO)
        raise OSError(code, os.strerror(code), f"fault {fault.point}")
