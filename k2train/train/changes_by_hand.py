"""Changes by hand that a start makes: which keys differ from the checkpoint's run, and why.

- `run.why` and `run.expect` are of the start that brings them: a later one that still has them in
  its config states nothing new.
- What only says how to start (`run.resume`, `run.allow` and the like) is no change of the run.

Alternatives considered:
- Refusing a change without a reason: people then write a dot.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.config.load import config_differences
from k2train.record.change_events import Change, KeyChange
from k2train.record.changes import what_text, why_text
from k2train.train.preflight import Start
from k2train.train.run_logger import RunLogger

NO_REASON = "no reason given (run.why)"


def changes_of(
    before: CheckpointManifest, config: Mapping[str, Any], order: Sequence[str]
) -> tuple[KeyChange, ...]:
    """Return the changes by hand since a checkpoint: `config` and the chunks of `order` are now."""
    found = []
    for difference in config_differences(before.config, config):
        key, _, values = difference.partition(": ")
        old, _, new = values.partition(" -> ")
        if not key.startswith("run."):
            names = [chunk.name for chunk in before.chunks.order]
            found.append(KeyChange(kind=_kind(key, names, order), key=key, before=old, after=new))
    return tuple(found)


def log_change(
    logger: RunLogger,
    start: Start,
    before: CheckpointManifest | None,
    allowed: Sequence[str] = (),
) -> None:
    """Record what a start changes by hand, and say it; nothing where it changes nothing.

    `before` is the checkpoint it continues, `allowed` what run.allow permits of the differences.
    """
    config = start.setup.config
    changes: tuple[KeyChange, ...] = ()
    said: Mapping[str, Any] = {}
    if before is not None:
        changes = changes_of(before, config.model_dump(mode="json"), start.order.names)
        changes += _other(allowed, changes, before, start.order.names)
        run = before.config.get("run")
        said = run if isinstance(run, dict) else {}

    why, expect = config.run.why, config.run.expect
    states = why != said.get("why") or expect != said.get("expect")
    if not changes and not (states and (why or expect)):
        return

    step = 0 if before is None else before.step
    event = Change(attempt=logger.attempt, step=step, changes=changes, why=why, expect=expect)
    logger.event(event)
    reason = NO_REASON if why is None else why_text(why)
    logger.info(f"changed by hand: {what_text(event)}; {reason}" if changes else reason)
    if expect is not None:
        logger.info(f"expected: {expect} (after step {step}); the run measures it")


def _other(
    allowed: Sequence[str],
    known: Sequence[KeyChange],
    before: CheckpointManifest,
    order: Sequence[str],
) -> tuple[KeyChange, ...]:
    """What was allowed and is no key of the config: other content of the data."""
    keys = {change.key for change in known}
    names = [chunk.name for chunk in before.chunks.order]
    found = []
    for difference in allowed:
        name, _, values = difference.partition(": ")
        key = name.split(" ")[0]
        old, arrow, new = values.partition(" -> ")
        if arrow and key not in keys:
            found.append(KeyChange(kind=_kind(key, names, order), key=key, before=old, after=new))
    return tuple(found)


def _kind(key: str, before: Sequence[str], order: Sequence[str]) -> str:
    """Say what kind of change a key is; `before` and `order` are the chunks then and now."""
    if key.startswith("lr."):
        return "rate"
    if key != "data.order":
        return "config"
    if set(before) - set(order):
        return "skip"
    return "config" if set(order) - set(before) else "defer"
