"""Checkpoints kept beside a spike: its branch, and the twin of the good run at the same step.

- They lie in `spikes/spike_NNN/branch` and `spikes/spike_NNN/twin`, so no start resumes from them,
  and retention leaves them alone.
- Written like any checkpoint, by all ranks, and read back. A start that was killed behind such a
  save finds it, and does not make it again.
- The metrics of the branch are copied beside it: its rows since the checkpoint that the run went
  back to.

Alternatives considered:
- Moving the branch's checkpoints out of `checkpoints/`: they end at chunks, and a branch does not.
"""

from pathlib import Path

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_name,
    list_checkpoints,
)
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.writer import CheckpointWriter
from k2train.files import sha256_file, write_synced
from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import FLAG
from k2train.record.metrics import POSITION, is_scores_line, lines_backwards
from k2train.record.rollback_events import SpikeCheckpoint
from k2train.train.checkpointing import CheckpointManager
from k2train.train.forward_check import run_forward_check
from k2train.train.monitor import DamageError
from k2train.train.run_logger import RunLogger
from k2train.train.spike_names import SPIKES, spike_folder
from k2train.train.state import TrainState

BRANCH, TWIN = "branch", "twin"
ROWS = "metrics.jsonl"


class _Events(SaveEvents):
    """Records a kept checkpoint in the ledger."""

    def __init__(self, checkpoints: CheckpointManager, number: int, kind: str):
        self._checkpoints, self._number, self._kind = checkpoints, number, kind

    @property
    def _logger(self) -> RunLogger:
        return self._checkpoints.logger

    def check_owner(self) -> None:
        self._checkpoints.check_owner()

    def committed(self, path: Path, manifest: CheckpointManifest) -> None:
        name = "/".join(path.parts[-4:])
        self._logger.event(
            SpikeCheckpoint(
                attempt=self._logger.attempt,
                number=self._number,
                kind=self._kind,
                checkpoint=name,
                step=manifest.step,
                manifest_sha256=sha256_file(path / MANIFEST),
            )
        )
        self._logger.info_from_thread(f"kept {name}, the {self._kind} at step {manifest.step}")

    def message(self, text: str) -> None:
        self._logger.info_from_thread(text)

    def idle(self) -> None:
        self._logger.flush_messages()


def keep_checkpoint(
    checkpoints: CheckpointManager, state: TrainState, number: int, kind: str
) -> str:
    """Save the state under `kind` in the folder of a spike; returns its path in the run.

    Collective. Raises DamageError when replicas differ, SaveError when the disk refuses it.
    """
    start, engine = checkpoints.start, checkpoints.engine
    folder = spike_folder(start.directory, number) / kind
    name = checkpoint_name(start.order.consumed_chunks(state.step), state.step)
    checkpoints.wait(state.step)
    checkpoints.monitor.phase("save", state.step)

    def is_there() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        return name in [path.name for path in list_checkpoints(folder)]

    agreement, first = Agreement(engine.grid), engine.grid.rank == 0
    if not agreement.from_first(first and is_there(), FLAG, "keep a checkpoint of a spike"):
        probe = run_forward_check(engine)
        if probe.apart:
            raise DamageError(probe.apart)
        policy = SavePolicy(
            asynchronous=False, retry_seconds=checkpoints.writer.policy.retry_seconds
        )
        writer = CheckpointWriter(folder, engine.grid, policy, _Events(checkpoints, number, kind))
        frozen = writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        state.adam_steps = engine.optimizer.adam_steps
        writer.save(name, frozen, checkpoints.facts(state, None, probe, None))
        writer.close()
    return f"{SPIKES}/{folder.parent.name}/{kind}/{name}"


def copy_rows(metrics: Path, folder: Path, after: int, last: int) -> None:
    """Copy the newest row of each step from `after` + 1 to `last` beside a branch.

    The held-out losses after a step go with it.
    """
    rows: dict[tuple[int, bool], bytes] = {}
    for line in lines_backwards(metrics):
        if (match := POSITION.match(line)) is None:
            continue
        step = int(match[1])
        if step <= after:
            break
        if step <= last:
            rows.setdefault((step, is_scores_line(line)), line)
    text = b"".join(rows[key] + b"\n" for key in sorted(rows)).decode()
    write_synced(folder / ROWS, text)
