"""Events of the ledger as a mirror shows them: alerts, tables of checkpoints and chunks, facts.

- An alert is what a person wants to be called for: spikes, steps left out, damage, ends.
- Facts are what a run is: world, layout, parameters, code commit, hash of the data.
"""

import re
from typing import Any, Literal, NamedTuple

from k2train.record.event import Event
from k2train.record.events import (
    CheckpointDamaged,
    CheckpointSaved,
    ChunkStarted,
    Failed,
    Finished,
    Resumed,
    Spike,
    Started,
    StepSkipped,
    Stopped,
    Straggler,
)
from k2train.record.rollback_events import RolledBack

CHECKPOINTS = ("checkpoint", "step", "chunks", "tokens", "loss", "held_out_loss", "GiB", "attempt")
CHUNKS = ("position", "chunk", "first_step", "attempt", "sha256", "tokens", "mix")
EVENTS = ("time", "attempt", "step", "level", "what", "text")
STARTS = ("attempt", "from_step", "from", "world_size", "layout", "time")
"""Columns of the tables."""
QUIET_KINDS = ("benign", "level")
"""Ends of spikes that call nobody."""


class Alert(NamedTuple):
    """A message that W&B sends to a person; its title and text, of a step where it has one."""

    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"] = "WARN"


def alert_of(event: Event) -> Alert | None:
    """Return what to call a person for; None for most events."""
    match event:
        case Spike(kind=kind, step=step) if kind not in QUIET_KINDS:
            onset = "" if event.onset is None else f", since step {event.onset}"
            loss = "" if event.loss is None else f": loss {event.loss:.4f}"
            return Alert(
                f"spike {kind}",
                f"step {step}{loss}, usually {event.usual_loss:.4f}{onset}; policy {event.policy}",
            )
        case StepSkipped():
            why = event.reason or "not finite"
            return Alert(
                "step skipped",
                f"step {event.step}: {why}, loss {event.loss}, grad_norm {event.grad_norm}; "
                f"{event.in_a_row} in a row",
            )
        case RolledBack():
            text = f"from step {event.from_step} to {event.checkpoint}, onset {event.onset}"
            return Alert("rolled back", text)
        case CheckpointDamaged():
            return Alert("checkpoint damaged", f"{event.checkpoint}: {event.problem}", "ERROR")
        case Straggler():
            return Alert("straggler", event.told)
        case Failed():
            return Alert("run failed", event.problem, "ERROR")
        case Stopped() if event.problem is not None:
            return Alert("run stopped", f"step {event.step}: {event.problem}", "ERROR")
        case Finished():
            return Alert("run finished", f"step {event.step}", "INFO")
    return None


def event_row(event: Event, time: str) -> tuple[Any, ...] | None:
    """Return the row of an event that calls a person, in the table of all of them."""
    alert = alert_of(event)
    if alert is None:
        return None
    step, attempt = getattr(event, "step", None), getattr(event, "attempt", None)
    return time, attempt, step, alert.level, alert.title, alert.text


def table_row(event: Event, time: str) -> tuple[str, tuple[Any, ...]] | None:
    """Return the table that an event has a row of, and the row; None for most."""
    match event:
        case CheckpointSaved():
            return "checkpoints", (
                event.checkpoint,
                event.step,
                event.chunks_consumed,
                event.consumed_tokens,
                event.loss,
                event.held_out_loss,
                round(event.bytes / 2**30, 4),
                event.attempt,
            )
        case ChunkStarted():
            # What the manifest knows of it follows, in the mirror.
            return "chunks", (event.order_index, event.chunk, event.step, event.attempt)
        case Started():
            return "starts", (event.attempt, 0, "", event.world_size, event.layout, time)
        case Resumed():
            return "starts", (
                event.attempt,
                event.step,
                event.checkpoint,
                event.world_size,
                event.layout,
                time,
            )
    return None


COLUMNS = {"checkpoints": CHECKPOINTS, "chunks": CHUNKS, "events": EVENTS, "starts": STARTS}
"""Table -> its columns."""


def facts_of(event: Event) -> dict[str, Any]:
    """Return what a start says of the run: parts of the config that a mirror shows."""
    match event:
        case Started():
            code = event.environment.get("code") or {}
            packages = event.environment.get("packages") or {}
            return {
                "run_id": event.run_id,
                "world_size": event.world_size,
                "layout": event.layout,
                "data_parallel": _data_parallel(event.layout),
                "parameters": event.parameters,
                "total_steps": event.total_steps,
                "chunks": event.chunks,
                "kernels": event.kernels,
                "deterministic": event.deterministic,
                "precision": event.precision,
                "data_sha256": event.data_content_sha256 or event.data_manifest_sha256,
                "config_sha256": event.config_sha256,
                "code_commit": code.get("commit"),
                "code_changed": code.get("dirty"),
                "torch": packages.get("torch"),
                "python": event.environment.get("python"),
            }
        case Resumed():
            known = {
                "world_size": event.world_size,
                "layout": event.layout,
                "data_parallel": _data_parallel(event.layout),
                "kernels": event.kernels,
                "total_steps": event.total_steps,
                "config_sha256": event.config_sha256,
            }
            return {key: value for key, value in known.items() if value is not None}
    return {}


def _data_parallel(layout: str) -> int | None:
    """Degree of data parallelism, which no key of a config has."""
    found = re.search(r"\bdata=(\d+)", layout)
    return None if found is None else int(found[1])
