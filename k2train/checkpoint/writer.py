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
from k2train.checkpoint.host_digest import state_sums
from k2train.checkpoint.manifest import expected_files, read_manifest, verify_files
from k2train.checkpoint.retention import Retention, Verified, remove_unfinished, set_aside_later
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


def nothing(*_: object) -> None:
    """Nobody asks."""


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
        still_owner: Callable[[], None] = nothing,
        told: Callable[[str], None] = nothing,
        verified: Callable[[Path], None] = nothing,
        damaged: Callable[[Path, str], None] = nothing,
        idle: Callable[[], None] = nothing,
    ):
        self.directory, self.grid, self.asynchronous = directory, grid, asynchronous
        self.retry_seconds, self.retry_every_seconds = (
            retry_seconds,
            min(RETRY_EVERY_SECONDS, retry_seconds),
        )
        self.still_owner, self.told, self.verified, self.damaged = (
            still_owner,
            told,
            verified,
            damaged,
        )
        self.idle = idle
        """Called now and then by the thread that waits for a save."""
        self.known = Verified()
        """Which checkpoints this process found whole."""
        self.audit = Scrubber(directory, verify_every_seconds, self.known, damaged, told)
        self._retirement = Retention(directory, keep_optimizer_states, self.known)
        self._agreement = Agreement(grid)
        self._buffers = HostBuffers()
        self._digests: dict[int, StateDigest] = {}
        self._hurry = Event()
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def found_whole(self, path: Path) -> None:
        """Count `path` as verified: it was checked when it was chosen to be loaded."""
        self.known.add(path.name)

    def snapshot(
        self, table: ShardLayout, lines: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Snapshot:
        """A copy of the optimizer lines [elements] in kept host memory, for `save`; waits for the save under way."""
        self.wait()
        return self._buffers.snapshot(table, lines, dtype)

    def save(
        self, name: str, state: Snapshot, facts: Facts, committed: Callable[[Path, Facts], None]
    ) -> None:
        """Save on all ranks. `facts` go into the manifest; rank 0 calls `committed(path, manifest)` after the rename."""
        self.wait()
        if not self.asynchronous:
            self._save(name, state, facts, committed)
            return

        def work() -> None:
            try:
                self._save(name, state, facts, committed)
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
        self._hurry.set()

    def wait(self) -> None:
        """Until the save under way is committed and read back; raises what went wrong in it."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(IDLE_SECONDS)
                self.idle()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """End the audit. A save under way ends with the process."""
        self.audit.close()

    def _save(
        self, name: str, state: Snapshot, facts: Facts, committed: Callable[[Path, Facts], None]
    ) -> None:
        self.known.begin(name)
        self._on_first(self.audit.start, "older checkpoints are not checked")
        digest = self._digest_of(state)
        # It is part of the name written under, which must be one on all ranks.
        token = self._agreement.from_first(facts.get("fencing_token"))
        facts = facts if token is None else {**facts, "fencing_token": token}
        with ThreadPoolExecutor(1) as side:
            sums = side.submit(state_sums, digest, state.lines)
            job = SaveJob(
                self.directory, name, state, facts, digest, sums, committed, self.still_owner
            )
            self._write(job)
        if (problem := self._read_back(job)) is not None:
            self._again(job, problem)
        self._on_first(
            self._retire,
            f"{name} is saved, but older checkpoints in {self.directory} could not be thinned (tried again after the "
            "next save)",
        )

    def _digest_of(self, state: Snapshot) -> StateDigest:
        """Of the state's table, whose tensors' names all ranks gather once."""
        found = self._digests.get(id(state.table))
        if found is None:
            mine = [slot.piece.name for slot in state.table.slots]
            names = sorted({name for part in self._agreement.all(mine) for name in part})
            found = self._digests[id(state.table)] = StateDigest(
                state.table, names, list(state.lines), self.grid.tp
            )
        return found

    def _write(self, job: SaveJob) -> None:
        """Until it is committed; DiskRefused after `retry_seconds`."""
        began, told = time.monotonic(), ""
        while True:
            try:
                write_checkpoint(job, self._agreement, self.grid.tp)
                return
            except DiskRefused as error:
                self._clear(job)
                again = self._agreement.from_first(self._may_retry(began))
                if not again:
                    raise
                if str(error) != told:
                    told = str(error)
                    meanwhile = "goes on" if self.asynchronous else "waits"
                    self._tell(
                        f"{told} (tried again every {self.retry_every_seconds:g} s, training {meanwhile})"
                    )
                if self.grid.rank == 0:
                    self._hurry.wait(self.retry_every_seconds)
            except (UserError, SaveError):
                self._clear(job)
                raise

    def _may_retry(self, began: float) -> bool:
        return not self._hurry.is_set() and time.monotonic() - began < self.retry_seconds

    def _clear(self, job: SaveJob) -> None:
        if self.grid.rank == 0:
            shutil.rmtree(job.aside, ignore_errors=True)

    def _on_first(self, part: Callable[[], None], otherwise: str) -> None:
        """Rank 0 alone does what no checkpoint depends on: an OSError in it is told, behind `otherwise`; collective."""

        def mine() -> None:
            if self.grid.rank != 0:
                return
            try:
                part()
            except OSError as error:
                with suppress(OSError):
                    self.told(f"{otherwise}: {error.strerror or error}")

        self._agreement.do(mine, lambda error: SaveError(f"{otherwise}: {error}"))

    def _tell(self, text: str) -> None:
        self._on_first(lambda: self.told(text), text)

    def _read_back(self, job: SaveJob) -> str | None:
        """What is wrong with it on the disk; None: it is whole, or nobody looked."""
        if self._agreement.from_first(self._hurry.is_set()):
            return None
        problems = self._agreement.all(self._problem_of_share(job.final))
        problem = next((text for text in problems if text), None)
        if problem is None:
            self.known.add(job.name)
            self._on_first(
                lambda: self.verified(job.final),
                f"{job.name} is whole, which could not be recorded",
            )
        return problem

    def _problem_of_share(self, path: Path) -> str | None:
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

    def _again(self, job: SaveJob, problem: str) -> None:
        """Write a checkpoint that came back damaged once more, from the snapshot. Raises SaveError when it still is."""
        self._tell(f"{job.name} came back damaged from the disk and is written again: {problem}")
        self._agreement.do(lambda: self._invalidate(job), job.refused)
        self._write(job)
        problem_now = self._read_back(job)
        if problem_now is None:
            return
        self.known.drop(job.name)
        self._on_first(
            lambda: self.damaged(job.final, problem_now),
            f"{job.name} is damaged, which could not be recorded",
        )
        raise SaveError(
            f"{job.name} came back damaged from the disk twice: {problem_now}; earlier checkpoints are untouched; see to "
            f"the disk of {self.directory} or move run.directory, then start the same command again"
        )

    def _invalidate(self, job: SaveJob) -> None:
        if self.grid.rank == 0:
            shutil.rmtree(job.aside, ignore_errors=True)
            job.final.rename(job.aside)

    def _retire(self) -> None:
        self._retirement.retire()
