"""Run overview: a table of a run's numbered checkpoints, and the location of its files.

    python tools/show_run.py RUN_DIRECTORY [RUN_DIRECTORY ...]
    python tools/show_run.py RUN_DIRECTORY --exposure            tokens and loss by chunk and subset

- Reads the ledger (its hash chain is verified), the metrics and the checkpoints' manifests. Writes
  nothing and needs no torch, so it works on a login node while the run continues.
- The ledger has priority over the manifests, because it also knows deleted checkpoints. A manifest
  that differs from the ledger is marked.

Exit codes: 0 done; 2 a missing or damaged run directory, one line on stderr.

Alternatives considered:
- Guessing from file names and times.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from command_line import Parser, command

from k2train.errors import EXIT_DONE, RunError
from k2train.record.changes import change_lines
from k2train.record.events import (
    CheckpointRemoved,
    CheckpointSaved,
    ChunkStarted,
    Entry,
    Finished,
    Resumed,
    Started,
    Stopped,
    of_kind,
)
from k2train.record.exposure import exposure_lines, kept_records
from k2train.record.ledger import read_ledger, run_notes
from k2train.record.metrics import StepRecord, latest
from k2train.record.rollback_events import RolledBack, SpikeCheckpoint, StepRechecked
from k2train.text import counted, table

HEADINGS = (
    "checkpoint",
    "chunks",
    "chunk",
    "step",
    "tokens",
    "loss",
    "held-out",
    "train s",
    "save s",
    "path",
)
LEFT_ALIGNED = ("checkpoint", "chunk", "path")


def checkpoint_rows(directory: Path) -> list[dict[str, str]]:
    """One row per checkpoint of the run in the order of its chunks, cells by heading.

    Raises RunError when the directory is not that of a run, or its ledger or metrics are damaged.
    """
    entries = _entries(directory)
    metrics = latest(directory / "metrics.jsonl") if (directory / "metrics.jsonl").exists() else []
    by_step = {record.step: record for record in metrics}

    # A half-written checkpoint keeps the suffix .tmp.
    on_disk = {
        path.parent.name: _manifest(path)
        for path in sorted((directory / "checkpoints").glob("ckpt_*/manifest.json"))
        if not path.parent.suffix
    }
    # Saved twice: the newer one is on the disk.
    recorded = {event.checkpoint: event for event in of_kind(entries, CheckpointSaved)}
    chunks = {event.order_index: event.chunk for event in of_kind(entries, ChunkStarted)}

    gone = _gone(entries)
    rows = []
    # Training seconds of a checkpoint are those of the steps since the previous one.
    step_before = 0
    for name, facts in sorted({**on_disk, **recorded}.items()):
        steps = range(step_before + 1, (facts.step or 0) + 1)
        mark = _mark(recorded.get(name), on_disk.get(name), gone.get(name))
        path = f"{directory / 'checkpoints' / name}{mark}"
        rows.append({**_cells(facts, chunks, by_step, steps), "path": path})
        step_before = facts.step or step_before
    return rows


def lines_of_run(directory: Path) -> list[str]:
    """Lines of output for one run. Raises RunError as `checkpoint_rows` does."""
    entries = _entries(directory)
    rows = checkpoint_rows(directory)
    lines = [f"{directory.name}: {_status(entries)}", *run_notes(entries), ""]
    cells = [[row[heading] for heading in HEADINGS] for row in rows]
    lines += (
        table(HEADINGS, cells, LEFT_ALIGNED, drop_unknown=False) if rows else ["no checkpoint yet"]
    )
    spikes = spike_lines(entries)
    lines += ["", "spikes", *(f"  {line}" for line in spikes)] if spikes else []
    changes = change_lines(entries)
    lines += ["", "changes by hand", *(f"  {line}" for line in changes)] if changes else []
    return [*lines, "", "files", *_files(directory, entries)]


def exposure_of_run(directory: Path) -> list[str]:
    """Lines about what one run has read. Raises RunError as `checkpoint_rows` does."""
    _entries(directory)
    records = kept_records(directory / "metrics.jsonl")
    return [f"{directory.name}: what it was trained on", "", *exposure_lines(records)]


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="show_run.py",
        description="Show the checkpoints of runs, and the location of their files.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIRECTORY", help="for example runs/demo-stage1"
    )
    parser.add_argument(
        "--exposure", action="store_true", help="tokens and loss of each chunk and subset"
    )
    options = parser.parse_args(arguments)
    lines = exposure_of_run if options.exposure else lines_of_run
    # Read everything before printing, so an error is one line and not half a table.
    shown = ["\n".join(lines(Path(run))) for run in options.runs]
    print("\n\n".join(shown))
    return EXIT_DONE


def spike_lines(entries: Iterable[Entry]) -> list[str]:
    """Say what the run did about spikes: steps done again, and returns to earlier checkpoints."""
    lines = []
    for event in (entry.event for entry in entries):
        if isinstance(event, RolledBack):
            moved = (
                f"; deferred {', '.join(event.chunks)}" if event.chunks else "; nothing deferred"
            )
            kept = f"; branch in {event.branch}" if event.branch else ""
            lines.append(
                f"{event.number}: {event.verdict} since step {event.onset}, back from step "
                f"{event.from_step} to {event.checkpoint}{moved}{kept}"
            )
        elif isinstance(event, SpikeCheckpoint) and event.kind == "twin":
            lines.append(f"{event.number}: the good run at step {event.step} in {event.checkpoint}")
        elif isinstance(event, StepRechecked) and not event.same:
            ranks = ", ".join(map(str, event.ranks))
            lines.append(
                f"step {event.step} was computed again with another result (rank {ranks}): "
                "hardware or nondeterminism"
            )
    return lines


def _entries(directory: Path) -> list[Entry]:
    if not directory.is_dir():
        raise RunError(
            f"{directory} is not a directory; give the directory of a run, such as runs/demo-stage1"
        )
    entries = read_ledger(directory / "ledger.jsonl")
    if not entries:
        raise RunError(f"{directory / 'ledger.jsonl'} has no event: this run has not started")
    return entries


def _manifest(path: Path) -> CheckpointSaved:
    """What the ledger would say of a checkpoint; a value that the manifest lacks is None."""
    try:
        data = path.read_bytes()
        facts = json.loads(data)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); the checkpoint is damaged") from None
    if not isinstance(facts, dict):
        raise RunError(
            f"{path} contains {type(facts).__name__}, expected an object; the checkpoint is damaged"
        )
    shown = ("step", "chunks_consumed", "consumed_tokens", "loss", "held_out_loss")
    known: dict[str, Any] = {key: facts.get(key) for key in shown}
    digest = hashlib.sha256(data).hexdigest()
    return CheckpointSaved(
        checkpoint=path.parent.name, attempt=0, bytes=0, manifest_sha256=digest, **known
    )


def _cells(
    facts: CheckpointSaved,
    chunks: dict[int, str],
    by_step: dict[int, StepRecord],
    steps: Iterable[int],
) -> dict[str, str]:
    consumed = facts.chunks_consumed
    seconds = [by_step[step].seconds for step in steps if step in by_step]
    trained = [one for one in seconds if math.isfinite(one)]
    return {
        "checkpoint": facts.checkpoint,
        "chunks": _integer(consumed),
        "chunk": str(chunks.get(consumed - 1, "-"))
        if isinstance(consumed, int) and consumed > 0
        else "-",
        "step": _integer(facts.step),
        "tokens": _integer(facts.consumed_tokens),
        "loss": _loss(facts.loss),
        "held-out": _loss(facts.held_out_loss),
        "train s": f"{sum(trained):.1f}" if trained else "-",
        "save s": _seconds(facts.seconds),
    }


def _gone(entries: Iterable[Entry]) -> dict[str, str]:
    """Why checkpoints are not on the disk, by name, as far as the ledger says."""
    found: dict[str, str] = {}
    for event in (entry.event for entry in entries):
        if isinstance(event, CheckpointSaved):
            found.pop(event.checkpoint, None)
        elif isinstance(event, CheckpointRemoved):
            found[event.checkpoint] = f"removed: {event.reason}"
        elif isinstance(event, Resumed):
            aside = f"in set_aside_by_attempt_{event.attempt}, since the run went back"
            found |= dict.fromkeys(event.set_aside, aside)
    return found


def _mark(
    recorded: CheckpointSaved | None, on_disk: CheckpointSaved | None, gone: str | None
) -> str:
    if on_disk is None:
        return f"  ({gone or 'not on the disk, and the ledger does not say why'})"
    if recorded is None:
        return "  (not in the ledger)"
    changed = recorded.manifest_sha256 != on_disk.manifest_sha256
    return "  (MANIFEST CHANGED)" if changed else ""


def _integer(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "-"


def _loss(value: Any) -> str:
    # A manifest has a non-finite loss as a word.
    return (
        f"{value:.4f}" if isinstance(value, (int, float)) else "-" if value is None else str(value)
    )


def _seconds(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) else "-"


def _status(entries: list[Entry]) -> str:
    events = [entry.event for entry in entries]
    attempts = sum(isinstance(event, Started | Resumed) for event in events)
    starts = counted(attempts, "start")
    for event in reversed(events):
        if isinstance(event, Finished):
            return f"finished, {starts}"
        if isinstance(event, Stopped):
            return f"stopped at step {event.step} ({event.reason}), {starts}"
        if isinstance(event, Started):
            break
    return f"not finished, {starts}"


def _files(directory: Path, entries: list[Entry]) -> list[str]:
    descriptions = {
        "config.yaml": "the resolved config",
        "ledger.jsonl": f"{counted(len(entries), 'event')}, hash chain verified",
        "metrics.jsonl": "a line of each step, and of each evaluation",
        "held_out.jsonl": "held-out losses, a line of each set",
        "state_roots.jsonl": "hashes of the state after some steps",
        "checkpoints": "model and optimizer, safetensors",
        "wandb": "W&B's copy of the record",
        "tensorboard": "TensorBoard's copy of the record",
        "profile": "where the time of some steps went",
        "spikes": "what each spike was made of",
        "report.html": "curves and tables, for a browser",
    }
    found = [
        (directory / name, text)
        for name, text in descriptions.items()
        if (directory / name).exists()
    ]
    width = max(len(str(path)) for path, _ in found)
    return [f"  {str(path).ljust(width)}  {text}" for path, text in found]


if __name__ == "__main__":
    sys.exit(main())
