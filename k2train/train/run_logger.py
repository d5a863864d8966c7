"""Run logger: what the training loop reports, and a logger that writes nothing.

- Ranks other than 0 have it, so the training loop needs no `if rank == 0`.
- Rank 0 has the one of `k2train.train.rank_zero_logger`.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.checkpoint.manifest import (
    CheckpointManifest,
)
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.guard.failure_history import FailureHistory
from k2train.parallel.device_digest import StateRoot
from k2train.record.event import Event
from k2train.record.events import Entry, Failed, Finished, Stopped, Takeover
from k2train.record.ledger_head import LedgerHead
from k2train.record.metrics import (
    StepRecord,
)

ENDS = (Failed, Stopped, Finished)


class RunLogger:
    """No-op logger with all methods, for every rank but rank 0."""

    attempt = 0
    fencing_token = 0
    """Token of the lease that rank 0 holds."""
    taken_over_from: Takeover | None = None
    """Earlier holder of the run directory that did not release it."""
    memory = "malloc: default settings"
    """The host's malloc settings."""
    problem = ""
    """Why the record could not be written; the trainer shares it with all ranks."""
    config_sha256 = ""
    """Hash of `config.yaml` as this start wrote it."""
    faults: tuple[str, ...] = ()
    """Faults armed on purpose, on any rank."""
    run_id = ""
    """Identifies the training run across restarts."""
    history = FailureHistory()
    """Failures and saves of the starts before this one; known to rank 0."""

    @property
    def ledger_head(self) -> LedgerHead | None:
        """Head of the ledger; None where another rank writes it."""
        return None

    @property
    def entries(self) -> Sequence[Entry]:
        """Entries of the ledger; none where another rank writes it."""
        return ()

    def event(self, event: Event) -> None:
        """Append an event to the ledger."""

    def step(self, record: StepRecord) -> None:
        """Log a finished step."""

    def scores(self, step: int, scores: Sequence[HeldOutFacts], seconds: float) -> None:
        """Log the held-out scores of the weights after a step, which took `seconds` in all."""

    def has_end_of(self, attempt: int) -> bool:
        """Return whether the ledger records how a start ended."""
        return False

    def spike_number(self, onset: int) -> int:
        """Return the number of the spike that began at `onset`; 0 on other ranks."""
        return 0

    def was_seen_before(self, first_step: int, steps: int) -> bool:
        """Whether an earlier start met the spike of a start's first steps; False on other ranks."""
        return False

    def all_written(self) -> bool:
        """Return whether everything logged so far is on disk."""
        return True

    def info(self, text: str) -> None:
        """Log a human-readable line."""

    def progress(self, text: str, at_once: bool = False) -> None:
        """Show what goes on between steps; "" ends it.

        `at_once`: in a log, too, without waiting some seconds.
        """

    def sync_rows(self) -> None:
        """Sync the rows of all steps so far; called before a checkpoint is committed."""

    def committed(
        self,
        path: Path,
        manifest: CheckpointManifest,
        seconds: float,
        stalled_seconds: float | None = None,
    ) -> None:
        """Log that a checkpoint is whole after `seconds`; may be called from the saving thread.

        Training waited for `stalled_seconds` of them; None: for all.
        """

    def verified(self, path: Path) -> None:
        """Log that a checkpoint was read back intact; from any thread."""

    def damaged(self, path: Path, problem: str) -> None:
        """Log that a checkpoint is damaged; from any thread."""

    def removed(self, path: Path, why: str) -> None:
        """Log that a checkpoint inside a chunk was removed; from any thread."""

    def info_from_thread(self, text: str) -> None:
        """Log a human-readable line; from any thread."""

    def flush_messages(self) -> None:
        """Show the lines of other threads; called from the main thread."""

    def root(self, step: int, root: StateRoot) -> None:
        """Log the state root after a step."""

    def recover(self, checkpoints: Sequence[Path]) -> None:
        """Add checkpoints to the ledger that a kill kept out of it."""

    def close(self) -> None:
        """End the live line and the W&B mirror."""
