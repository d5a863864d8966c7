"""Checkpoint saving on all ranks, optionally in the background: write, hash, commit, verify, thin.

- Asynchronous: training waits only for the copy of the three flat shards. One thread per rank does
  the rest over a gloo group of its own.
- A second save waits for the first, and so does the end of the run.
- A disk error on one rank is an error on all of them. The written files are removed, and the same
  snapshot is retried every few seconds for `retry_seconds` while training continues. Only then is
  it raised, the same on every rank.
- After the commit the ranks share reading everything back from the disk. A damaged checkpoint is
  rewritten once from the snapshot. Damaged a second time it is an error, because that state then
  exists only in memory.
- Bookkeeping (a ledger event, thinning) that fails on a disk error is logged. It ends no run that
  has its checkpoint.

Alternatives considered:
- Verifying before the commit: that doubles the time in which a kill loses the save.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
from pydantic import TypeAdapter
from torch import Tensor

from k2train.checkpoint.commit import SaveJob, write_checkpoint
from k2train.checkpoint.host_digest import host_digest_sums
from k2train.checkpoint.manifest import FOLDERS, SaveFacts, read_manifest
from k2train.checkpoint.read_back import read_back
from k2train.checkpoint.retention import (
    Retention,
    VerifiedCheckpoints,
    remove_unfinished,
    set_aside_later,
)
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.scrub import Scrubber
from k2train.checkpoint.snapshot import HostBuffers, Snapshot, snapshot
from k2train.errors import UnavailableError, UserError
from k2train.parallel.agreement import Agreement, DiskRefused, SaveError
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import FLAG, TEXTS
from k2train.parallel.shard_layout import ShardLayout
from k2train.retry import reason

__all__ = [
    "CheckpointWriter",
    "SaveError",
    "Snapshot",
    "remove_unfinished",
    "set_aside_later",
    "snapshot",
]

RETRY_EVERY_SECONDS = 5.0
IDLE_SECONDS = 0.5
"""Interval at which a thread that waits for a save calls `idle`."""
_TOKEN: TypeAdapter[int | None] = TypeAdapter(int | None)
"""What `_check_share` found."""


def named(name: str, step: int) -> str:
    """Name a checkpoint for people, with its step."""
    return f"{name}, of step {step}"


class CheckpointWriter:
    """Saves checkpoints into `directory`, as `policy` says; `events` is told of them on rank 0."""

    def __init__(
        self,
        directory: Path,
        grid: ProcessGrid,
        policy: SavePolicy | None = None,
        events: SaveEvents | None = None,
    ):
        policy, events = policy or SavePolicy(), events or SaveEvents()
        self.directory, self.grid, self.policy, self.events = directory, grid, policy, events
        self.retry_every_seconds = min(RETRY_EVERY_SECONDS, policy.retry_seconds)
        self.verified = VerifiedCheckpoints()
        """Checkpoints that this process verified."""
        self.scrubber = Scrubber(directory, policy.verify_every_seconds, self.verified, events)
        self._retention = Retention(
            directory, policy.keep_optimizer_states, self.verified, policy.keep_asked, events
        )
        self._agreement = Agreement(grid, background=True)
        self._buffers = HostBuffers()
        self._digests: dict[int, StateDigest] = {}
        self._skip_verification = Event()
        self._loaded: Path | None = None
        """Checkpoint whose weights nobody has read yet."""
        self.newest: str | None = None
        """Newest whole checkpoint of this run, with its step; rank 0 knows those that it saved."""
        self.keeps_all = False
        """Whether no checkpoint is thinned or removed for now."""
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def mark_loaded(self, path: Path) -> None:
        """Count `path` as verified once its weights are, too: a load checks what it reads.

        The next save reads them in the background, on all ranks. Older formats were checked whole.
        """
        manifest = read_manifest(path)
        self.newest = named(path.name, manifest.step)
        if manifest.format > 2:
            self._loaded = path
        else:
            self.verified.add(path.name)

    def snapshot(
        self, layout: ShardLayout, flat_shards: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Snapshot:
        """Copy the optimizer's flat shards [elements] into reused host memory, for `save`.

        Waits for a running save.
        """
        self.wait()
        return self._buffers.snapshot(layout, flat_shards, dtype)

    def save(self, name: str, snapshot: Snapshot, facts: SaveFacts) -> None:
        """Save on all ranks. Collective.

        `facts` go into the manifest.
        """
        self.wait()
        if not self.policy.asynchronous:
            self._save(name, snapshot, facts)
            return

        def work() -> None:
            try:
                self._save(name, snapshot, facts)
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=work, name=f"save-{name}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the background save has failed; `wait` raises its error."""
        return self._error is not None

    @property
    def active(self) -> bool:
        """Whether a background save is running."""
        return self._thread is not None and self._thread.is_alive()

    def skip_verification(self) -> None:
        """Stop retrying saves and reading them back, because the process ends soon.

        Only rank 0's call counts.
        """
        self._skip_verification.set()

    def wait(self) -> None:
        """Wait until the running save is committed and read back. Raises its error."""
        if self._thread is not None:
            while self._thread.is_alive():
                # Rank 0 prints messages of the saving thread meanwhile.
                self._thread.join(IDLE_SECONDS)
                self.events.idle()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Stop scrubbing. A running save ends with the process."""
        self.scrubber.close()

    def _save(self, name: str, snapshot: Snapshot, facts: SaveFacts) -> None:
        self.verified.forget(name)
        self._best_effort(self.scrubber.start, "older checkpoints are not checked")
        digest = self._state_digest(snapshot)

        # The token is part of the temporary name, which must be the same on all ranks.
        token = self._agreement.from_first(facts.fencing_token, _TOKEN)
        if token is not None:
            facts = facts.model_copy(update={"fencing_token": token})

        # The digest is computed beside the writing, by one thread.
        with ThreadPoolExecutor(1) as side:
            sums = side.submit(host_digest_sums, digest, snapshot.flat_shards)
            job = SaveJob(self.directory, name, snapshot, facts, digest, sums, self.events)
            self._write(job)

        if (problem := self._read_back(job)) is not None:
            self._rewrite(job, problem)
        self._check_loaded()

        self._best_effort(
            self._retire,
            f"{name} is saved, but older checkpoints in {self.directory} could not be thinned "
            "(retried after the next save)",
        )

    def _state_digest(self, snapshot: Snapshot) -> StateDigest:
        """Digest of the snapshot's layout, cached. All ranks gather the tensor names once."""
        found = self._digests.get(id(snapshot.layout))
        if found is None:
            own = [slot.param_slice.name for slot in snapshot.layout.slots]
            names = sorted({name for part in self._agreement.distinct(own, TEXTS) for name in part})
            found = self._digests[id(snapshot.layout)] = StateDigest(
                snapshot.layout, names, list(snapshot.flat_shards), self.grid.tp
            )
        return found

    def _write(self, job: SaveJob) -> None:
        """Write until committed. Raises DiskRefused after `retry_seconds`."""
        began, last_message = time.monotonic(), ""
        while True:
            try:
                write_checkpoint(job, self._agreement, self.grid.tp)
                return
            except DiskRefused as error:
                self._remove_temporary(job)
                # Rank 0 decides, so that all ranks retry or none does.
                retry = self._agreement.from_first(self._may_retry(began), FLAG)
                if not retry:
                    raise

                # The same error is logged once, not at every retry.
                if str(error) != last_message:
                    last_message = str(error)
                    meanwhile = "continues" if self.policy.asynchronous else "waits"
                    self._log(
                        f"{last_message} (retried every {self.retry_every_seconds:g} s, training "
                        f"{meanwhile})"
                    )

                if self.grid.rank == 0:
                    self._skip_verification.wait(self.retry_every_seconds)
            except (UserError, SaveError, UnavailableError):
                self._remove_temporary(job)
                raise

    def _may_retry(self, began: float) -> bool:
        return (
            not self._skip_verification.is_set()
            and time.monotonic() - began < self.policy.retry_seconds
        )

    def _remove_temporary(self, job: SaveJob) -> None:
        if self.grid.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)

    def _best_effort(self, action: Callable[[], None], error_prefix: str) -> None:
        """Run a best-effort action on rank 0. Collective.

        An OSError or UnavailableError is logged with `error_prefix`.
        """

        def run() -> None:
            if self.grid.rank != 0:
                return
            try:
                action()
            except (OSError, UnavailableError) as error:
                with suppress(OSError):
                    why = reason(error, self.directory) if isinstance(error, OSError) else error
                    self.events.message(f"{error_prefix}: {why}")

        self._agreement.do(run, lambda error: SaveError(f"{error_prefix}: {error}"))

    def _log(self, text: str) -> None:
        self._best_effort(lambda: self.events.message(text), text)

    def _read_back(self, job: SaveJob) -> str | None:
        """Describe what is wrong with the checkpoint on disk.

        None when it is intact or was not read.
        """
        if self._agreement.from_first(self._skip_verification.is_set(), FLAG):
            return None

        problem, away = read_back(job.final, FOLDERS, self.grid, self._agreement)
        if problem is None and away is not None:
            self._log(f"{job.name} is saved, but not verified, since it could not be read: {away}")
        elif problem is None:
            self.verified.add(job.name)
            self._best_effort(
                lambda: self.events.verified(job.final),
                f"{job.name} is whole, but this could not be recorded",
            )

        return problem

    def _check_loaded(self) -> None:
        """Verify the weights of the checkpoint that was loaded, which a load does not read."""
        path, self._loaded = self._loaded, None
        if path is None or self._agreement.from_first(self._skip_verification.is_set(), FLAG):
            return

        problem, away = read_back(path, ("model",), self.grid, self._agreement)
        if problem is not None:
            self.verified.mark_damaged(path.name)
            self._best_effort(
                lambda: self.events.damaged(path, problem),
                f"{path.name} is damaged, but this could not be recorded",
            )
        elif away is None:
            self.verified.add(path.name)

    def _rewrite(self, job: SaveJob, problem: str) -> None:
        """Rewrite a damaged checkpoint from the snapshot.

        Raises SaveError when it is damaged again.
        """
        self._log(f"{job.name} came back damaged from the disk and is written again: {problem}")
        self._agreement.do(lambda: self._invalidate(job), job.disk_error)
        self._write(job)
        problem_now = self._read_back(job)
        if problem_now is None:
            return

        self.verified.mark_damaged(job.name)
        self._best_effort(
            lambda: self.events.damaged(job.final, problem_now),
            f"{job.name} is damaged, but this could not be recorded",
        )
        raise SaveError(
            f"{job.name} came back damaged from the disk twice: {problem_now}; earlier checkpoints "
            f"are untouched; check the disk of {self.directory} or move run.directory, then run "
            "the same command again"
        )

    def _invalidate(self, job: SaveJob) -> None:
        if self.grid.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
            # It must not count as a checkpoint while it is rewritten.
            job.final.rename(job.temporary)

    def _retire(self) -> None:
        if not self.keeps_all:
            self._retention.retire()
