"""Run overview: a table of a run's numbered checkpoints, and the location of its files.

    python tools/show_run.py RUN_DIRECTORY [RUN_DIRECTORY ...]

- Reads the ledger (its hash chain is verified), the metrics and the checkpoints' manifests. Writes
  nothing and needs no torch, so it works on a login node while the run continues.
- The ledger has priority over the manifests, because it also knows deleted checkpoints. A manifest
  that differs from the ledger is marked.

Exit codes: 0 done; 2 a missing or damaged run directory, one line on stderr.

Alternatives considered:
- Guessing from file names and times.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2train.errors import EXIT_DONE, EXIT_USAGE, RunError, UserError
from k2train.record.ledger import read_ledger
from k2train.record.metrics import latest
from k2train.text import table

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
    events = _events(directory)
    metrics = latest(directory / "metrics.jsonl") if (directory / "metrics.jsonl").exists() else []
    by_step = {row["step"]: row for row in metrics}

    saved: dict[str, dict[str, Any]] = {}
    for path in sorted((directory / "checkpoints").glob("ckpt_*/manifest.json")):
        # A half-written checkpoint keeps the suffix .tmp.
        if not path.parent.suffix:
            saved[path.parent.name] = {"manifest": path, **_manifest(path)}

    for event in events:
        if event["event"] == "checkpoint_saved":
            # Saved twice: the newer one is on the disk.
            saved[event["checkpoint"]] = {**saved.get(event["checkpoint"], {}), **event}

    chunks = {
        event["order_index"]: event["chunk"]
        for event in events
        if event["event"] == "chunk_started"
    }

    rows = []
    # Training seconds of a checkpoint are those of the steps since the previous one.
    step_before = 0
    for name, facts in sorted(saved.items()):
        step = facts.get("step")
        rows.append(
            _cells(directory, name, facts, chunks, by_step, range(step_before + 1, (step or 0) + 1))
        )
        step_before = step or step_before
    return rows


def lines_of_run(directory: Path) -> list[str]:
    """Lines of output for one run. Raises RunError as `checkpoint_rows` does."""
    events = _events(directory)
    rows = checkpoint_rows(directory)
    lines = [f"{directory.name}: {_status(events)}", ""]
    cells = [[row[heading] for heading in HEADINGS] for row in rows]
    lines += (
        table(HEADINGS, cells, LEFT_ALIGNED, drop_unknown=False) if rows else ["no checkpoint yet"]
    )
    return [*lines, "", "files", *_files(directory, events)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="show_run.py",
        description="Show the checkpoints of runs, and the location of their files.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIRECTORY", help="for example runs/demo-stage1"
    )
    try:
        # Read everything before printing, so an error is one line and not half a table.
        shown = ["\n".join(lines_of_run(Path(run))) for run in parser.parse_args(arguments).runs]
    except UserError as error:
        print(f"show_run: {error}", file=sys.stderr)
        return EXIT_USAGE

    try:
        print("\n\n".join(shown), flush=True)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`); avoid a second flush error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_DONE


def _events(directory: Path) -> list[dict[str, Any]]:
    if not directory.is_dir():
        raise RunError(
            f"{directory} is not a directory; give the directory of a run, such as runs/demo-stage1"
        )
    events = read_ledger(directory / "ledger.jsonl")
    if not events:
        raise RunError(f"{directory / 'ledger.jsonl'} has no event: this run has not started")
    return events


def _manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        facts = json.loads(data)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); the checkpoint is damaged") from None
    if not isinstance(facts, dict):
        raise RunError(
            f"{path} contains {type(facts).__name__}, expected an object; the checkpoint is damaged"
        )
    return {**facts, "sha256_found": hashlib.sha256(data).hexdigest()}


def _cells(
    directory: Path,
    name: str,
    facts: dict[str, Any],
    chunks: dict[int, str],
    by_step: dict[int, dict[str, Any]],
    steps: Iterable[int],
) -> dict[str, str]:
    consumed = facts.get("chunks_consumed")
    metrics = by_step.get(facts.get("step", -1), {})
    trained = [
        float(by_step[step]["seconds"]) for step in steps if "seconds" in by_step.get(step, {})
    ]
    return {
        "checkpoint": name,
        "chunks": _integer(consumed),
        "chunk": str(chunks.get(consumed - 1, "-"))
        if isinstance(consumed, int) and consumed > 0
        else "-",
        "step": _integer(facts.get("step")),
        "tokens": _integer(facts.get("consumed_tokens", metrics.get("consumed_tokens"))),
        "loss": _loss(facts.get("loss", metrics.get("loss"))),
        "held-out": _loss(facts.get("held_out_loss")),
        "train s": f"{sum(trained):.1f}" if trained else "-",
        "save s": _seconds(facts.get("seconds")),
        "path": f"{directory / 'checkpoints' / name}{_mark(facts)}",
    }


def _mark(facts: dict[str, Any]) -> str:
    if "manifest" not in facts:
        return "  (not on the disk)"
    expected = facts.get("manifest_sha256")
    if "event" not in facts:
        return "  (not in the ledger)"
    return (
        "  (MANIFEST CHANGED)" if expected is not None and expected != facts["sha256_found"] else ""
    )


def _integer(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "-"


def _loss(value: Any) -> str:
    # The ledger has a non-finite loss as a word.
    return (
        f"{value:.4f}" if isinstance(value, (int, float)) else "-" if value is None else str(value)
    )


def _seconds(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) else "-"


def _status(events: list[dict[str, Any]]) -> str:
    attempts = sum(event["event"] in ("started", "resumed") for event in events)
    starts = f"{attempts} start{'' if attempts == 1 else 's'}"
    for event in reversed(events):
        if event["event"] == "finished":
            return f"finished, {starts}"
        if event["event"] == "stopped":
            return (
                f"stopped at step {event.get('step', '?')} "
                f"({event.get('reason', 'no reason given')}), {starts}"
            )
        if event["event"] == "started":
            break
    return f"not finished, {starts}"


def _files(directory: Path, events: list[dict[str, Any]]) -> list[str]:
    descriptions = {
        "config.yaml": "the resolved config",
        "ledger.jsonl": f"{len(events)} events, hash chain verified",
        "metrics.jsonl": "one line per step",
        "checkpoints": "model and optimizer, safetensors",
        "wandb": "W&B's copy of the metrics",
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
