"""Save a checkpoint on all ranks, in the background if wished: written aside, hashed, committed, read back, then thinned.

Asynchronous: training waits for the copy of the three optimizer lines only; one thread per rank does the rest over a gloo
group of its own. A second save waits for the first, and so does the end of the run: it cannot overtake it. What the disk
refuses on one rank is refused on all of them: what was written is removed, and the same snapshot is tried again every few
seconds for `retry_seconds`, while training goes on; only then is it an error, the same on every rank.

After the commit the ranks share reading all of it back from the disk. One that comes back damaged is written again from
the snapshot, once; damaged a second time it is an error, since that state is then nowhere but in memory. Reading it back
before the commit was refused: that doubles the time in which a kill loses the save. What only keeps books (a line in the
ledger, thinning what is old) is told when the disk refuses it, and ends no run that has its checkpoint.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from k2train.checkpoint.commit import Facts, SaveJob, write_checkpoint
from k2train.checkpoint.host_digest import host_digest_sums
from k2train.checkpoint.manifest import expected_files, read_manifest, verify_files
from k2train.checkpoint.retention import (
    Retention,
    VerifiedCheckpoints,
    remove_unfinished,
    set_aside_later,
)
from k2train.checkpoint.scrub import Scrubber
from k2train.checkpoint.shards import drop_caches
from k2train.checkpoint.snapshot import HostBuffers, Snapshot, snapshot
from k2train.errors import CheckpointError, UserError
from k2train.parallel.agreement import Agreement, DiskRefused, SaveError
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grad_buffer import ShardLayout
from k2train.parallel.grid import ProcessGrid

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
"""How often whoever waits for a save looks up meanwhile."""


def no_op(*_: object) -> None:
    """The default callback: do nothing."""


class CheckpointWriter:
    """Saves into `directory`; `keep_optimizer_states` newest numbered checkpoints keep theirs (0: all do).

    Called on rank 0, from the thread that saves: `told` with a line for people, `verified` when a checkpoint was read back
    whole, `damaged` when one was not (both also from the audit's thread, which checks an older one every
    `verify_every_seconds`), `still_owner` before the rename; it raises RunError when the run is no longer ours. An OSError
    of the first three is told and the save goes on; any other error of theirs is every rank's.
    """

    def __init__(
        self,
        directory: Path,
        grid: ProcessGrid,
        keep_optimizer_states: int,
        asynchronous: bool,
        *,
        retry_seconds: float = 0.0,
        verify_every_seconds: float = 0.0,
        check_owner: Callable[[], None] = no_op,
        log: Callable[[str], None] = no_op,
        on_verified: Callable[[Path], None] = no_op,
        on_damaged: Callable[[Path, str], None] = no_op,
        on_idle: Callable[[], None] = no_op,
    ):
        self.directory, self.grid, self.asynchronous = directory, grid, asynchronous
        self.retry_seconds = retry_seconds
        self.retry_every_seconds = min(RETRY_EVERY_SECONDS, retry_seconds)
        self.check_owner, self.log = check_owner, log
        self.on_verified, self.on_damaged, self.on_idle = on_verified, on_damaged, on_idle
        self.verified = VerifiedCheckpoints()
        """Which checkpoints this process found whole."""
        self.scrubber = Scrubber(directory, verify_every_seconds, self.verified, on_damaged, log)
        self._retention = Retention(directory, keep_optimizer_states, self.verified)
        self._agreement = Agreement(grid)
        self._buffers = HostBuffers()
        self._digests: dict[int, StateDigest] = {}
        self._skip_verification = Event()
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def mark_verified(self, path: Path) -> None:
        """Count `path` as verified: it was checked when it was chosen to be loaded."""
        self.verified.add(path.name)

    def snapshot(
        self, layout: ShardLayout, flat_shards: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Snapshot:
        """A copy of the optimizer lines [elements] in kept host memory, for `save`; waits for the save under way."""
        self.wait()
        return self._buffers.snapshot(layout, flat_shards, dtype)

    def save(
        self, name: str, snapshot: Snapshot, facts: Facts, on_commit: Callable[[Path, Facts], None]
    ) -> None:
        """Save on all ranks. `facts` go into the manifest; rank 0 calls `committed(path, manifest)` after the rename."""
        self.wait()
        if not self.asynchronous:
            self._save(name, snapshot, facts, on_commit)
            return

        def work() -> None:
            try:
                self._save(name, snapshot, facts, on_commit)
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=work, name=f"save-{name}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the save in the background has gone wrong; `wait` raises it."""
        return self._error is not None

    @property
    def active(self) -> bool:
        """Whether a save is under way in the background."""
        return self._thread is not None and self._thread.is_alive()

    def skip_verification(self) -> None:
        """The process is to end soon: from now on no save is tried again and none read back (rank 0's word counts)."""
        self._skip_verification.set()

    def wait(self) -> None:
        """Until the save under way is committed and read back; raises what went wrong in it."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(IDLE_SECONDS)
                self.on_idle()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """End the audit. A save under way ends with the process."""
        self.scrubber.close()

    def _save(
        self, name: str, snapshot: Snapshot, facts: Facts, on_commit: Callable[[Path, Facts], None]
    ) -> None:
        self.verified.forget(name)
        self._best_effort(self.scrubber.start, "older checkpoints are not checked")
        digest = self._state_digest(snapshot)
        # It is part of the name written under, which must be one on all ranks.
        token = self._agreement.from_first(facts.get("fencing_token"))
        facts = facts if token is None else {**facts, "fencing_token": token}
        with ThreadPoolExecutor(1) as side:
            sums = side.submit(host_digest_sums, digest, snapshot.flat_shards)
            job = SaveJob(
                self.directory, name, snapshot, facts, digest, sums, on_commit, self.check_owner
            )
            self._write(job)
        if (problem := self._read_back(job)) is not None:
            self._rewrite(job, problem)
        self._best_effort(
            self._retire,
            f"{name} is saved, but older checkpoints in {self.directory} could not be thinned "
            "(retried after the next save)",
        )

    def _state_digest(self, snapshot: Snapshot) -> StateDigest:
        """Of the state's table, whose tensors' names all ranks gather once."""
        found = self._digests.get(id(snapshot.layout))
        if found is None:
            own = [slot.param_slice.name for slot in snapshot.layout.slots]
            names = sorted({name for part in self._agreement.all(own) for name in part})
            found = self._digests[id(snapshot.layout)] = StateDigest(
                snapshot.layout, names, list(snapshot.flat_shards), self.grid.tp
            )
        return found

    def _write(self, job: SaveJob) -> None:
        """Until it is committed; DiskRefused after `retry_seconds`."""
        began, last_message = time.monotonic(), ""
        while True:
            try:
                write_checkpoint(job, self._agreement, self.grid.tp)
                return
            except DiskRefused as error:
                self._remove_temporary(job)
                retry = self._agreement.from_first(self._may_retry(began))
                if not retry:
                    raise
                if str(error) != last_message:
                    last_message = str(error)
                    meanwhile = "continues" if self.asynchronous else "waits"
                    self._log(
                        f"{last_message} (retried every {self.retry_every_seconds:g} s, training "
                        f"{meanwhile})"
                    )
                if self.grid.rank == 0:
                    self._skip_verification.wait(self.retry_every_seconds)
            except (UserError, SaveError):
                self._remove_temporary(job)
                raise

    def _may_retry(self, began: float) -> bool:
        return (
            not self._skip_verification.is_set() and time.monotonic() - began < self.retry_seconds
        )

    def _remove_temporary(self, job: SaveJob) -> None:
        if self.grid.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)

    def _best_effort(self, action: Callable[[], None], error_prefix: str) -> None:
        """Rank 0 alone does what no checkpoint depends on: an OSError in it is told, behind `otherwise`; collective."""

        def run() -> None:
            if self.grid.rank != 0:
                return
            try:
                action()
            except OSError as error:
                with suppress(OSError):
                    self.log(f"{error_prefix}: {error.strerror or error}")

        self._agreement.do(run, lambda error: SaveError(f"{error_prefix}: {error}"))

    def _log(self, text: str) -> None:
        self._best_effort(lambda: self.log(text), text)

    def _read_back(self, job: SaveJob) -> str | None:
        """What is wrong with it on the disk; None: it is whole, or nobody looked."""
        if self._agreement.from_first(self._skip_verification.is_set()):
            return None
        problems = self._agreement.all(self._check_share(job.final))
        problem = next((text for text in problems if text), None)
        if problem is None:
            self.verified.add(job.name)
            self._best_effort(
                lambda: self.on_verified(job.final),
                f"{job.name} is whole, but this could not be recorded",
            )
        return problem

    def _check_share(self, path: Path) -> str | None:
        """Each rank reads what its neighbour wrote: on a cluster its own may still lie in its node's memory."""
        rank, world_size = self.grid.rank, self.grid.layout.world_size
        drop_caches(path)
        try:
            manifest = read_manifest(path)
            names = expected_files(path, manifest)
            verify_files(path, manifest, names[(rank + 1) % world_size :: world_size])
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{path} cannot be read back ({error.strerror or error})"
        return None

    def _rewrite(self, job: SaveJob, problem: str) -> None:
        """Write a checkpoint that came back damaged once more, from the snapshot. Raises SaveError when it still is."""
        self._log(f"{job.name} came back damaged from the disk and is written again: {problem}")
        self._agreement.do(lambda: self._invalidate(job), job.disk_error)
        self._write(job)
        problem_now = self._read_back(job)
        if problem_now is None:
            return
        self.verified.mark_damaged(job.name)
        self._best_effort(
            lambda: self.on_damaged(job.final, problem_now),
            f"{job.name} is damaged, but this could not be recorded",
        )
        raise SaveError(
            f"{job.name} came back damaged from the disk twice: {problem_now}; earlier checkpoints "
            "are untouched; check "
            f"the disk of {self.directory} or move run.directory, then run the same command again"
        )

    def _invalidate(self, job: SaveJob) -> None:
        if self.grid.rank == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
            job.final.rename(job.temporary)

    def _retire(self) -> None:
        self._retention.retire()
