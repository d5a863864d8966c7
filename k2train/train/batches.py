"""Per-rank batches of the training steps and of held-out sets, on the device.

- If any rank finds a damaged chunk, all ranks raise the same error. A rank that left alone would
  leave the others waiting in their next collective.
- The ranks therefore exchange their errors wherever a chunk is opened.

Alternatives considered:
- Exchanging errors at every step: within a verified chunk there is nothing to agree on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.data.chunk import ChunkIdentity
from k2train.data.fed_ids import MASK, agreed_ids, flags_of, sum_of_rows
from k2train.data.loader import HeldOutLoader, Loader, MicroBatch, Share
from k2train.data.order import rank_rows
from k2train.errors import DataError, UnavailableError
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.processes import file_system_view
from k2train.train.engine import Engine
from k2train.train.held_out_sets import RowLoss, held_out_facts, row_subsets
from k2train.train.monitor import DamageError
from k2train.train.preflight import Start


class DamagedChunkError(DataError):
    """A chunk is damaged; raised on every rank alike, so all of them can leave together."""


class UnavailableChunkError(UnavailableError):
    """A chunk cannot be read for now; raised on every rank alike."""


_RANK: TypeAdapter[int | None] = TypeAdapter(int | None)
"""A rank's view of the file systems, and the chunk that it opened."""


def _fed(part: MicroBatch) -> NDArray[Any]:
    """What the model is fed of a micro-batch: the ids, and the labels where it has some."""
    tokens = part.tokens if part.labels is None else torch.cat((part.tokens, part.labels), dim=1)
    found: NDArray[Any] = tokens.numpy()
    return found


class BatchSource:
    """Batches of one rank. With `verify`, this rank verifies chunks for its machine."""

    def __init__(self, start: Start, grid: ProcessGrid, verify: bool):
        config = start.setup.config
        self.grid, self.order, self._agreement = grid, start.order, Agreement(grid)
        share = Share(grid.dp.rank, grid.dp.size, config.batch.micro_sequences)
        block, most = start.setup.block, start.setup.num_microbatches
        self.loader = Loader(
            start.manifest, start.order, share, config.model.vocab_size, verify, block
        )
        self.held_out = [HeldOutLoader(part, share, most, verify, block) for part in start.held_out]
        self._row_subsets: dict[str, list[str]] = {}
        """Subset of each scored row, by set; known to rank 0."""
        self.message: Callable[[str], None] = lambda text: None
        """Called with a line for the console."""
        self.fed_ids: list[float] = []
        """This rank's part of the hash of the ids of the last step, for the step's exchange."""

    def report_to(self, progress: Callable[[], None]) -> None:
        """Call `progress` while a step waits for a chunk to be hashed."""
        self.loader.report_to(progress)
        for loader in self.held_out:
            loader.report_to(progress)

    def read_subsets(self, progress: Callable[[], None]) -> None:
        """Read on rank 0 to which subset each scored row belongs; `progress` as files are hashed.

        Part of the start. Later the other ranks would wait, in a phase with a shorter limit.
        """
        for loader in self.held_out if self.grid.rank == 0 else ():
            name = loader.set.name
            self._row_subsets[name], why = row_subsets(loader.set, progress)
            if why:
                self.message(f"held-out set {name}: no loss by subset: {why}")

    def step(self, step: int, first: bool, needed: bool) -> list[MicroBatch]:
        """Micro-batches of this rank for one step; empty if not `needed`.

        `first` marks the first step of this start. Collective where a chunk is opened.
        Raises DamagedChunkError or UnavailableChunkError on every rank where a chunk is opened;
        on one rank DataError or UnavailableError for what is found later.
        """
        position = self.order.position(step)
        opens = position.name if first or position.step_in_chunk == 0 else ""
        batch = self._read_agreed(partial(self.loader.step, step), self.loader, opens, needed)
        self.fed_ids = self._fed_ids(batch, needed)
        return [part.to(self.grid.device) for part in batch]

    def fed(self, step: int, flags: Sequence[float]) -> str:
        """Return the hash of the ids of a step, by the sums of all ranks' parts of it.

        Raises DamageError on every rank when ranks that read the same rows were fed different ids.
        """
        found = agreed_ids(flags, self.grid.dp.size)
        if not found.alike:
            raise DamageError(
                f"step {step}: ranks that read the same rows of {self.order.position(step).name} "
                "were fed different ids; compare the files that their machines see, and their "
                "memory"
            )
        return found.fingerprint

    def _fed_ids(self, batch: list[MicroBatch], needed: bool) -> list[float]:
        """Return this rank's part of the hash of the step's ids."""
        total = None
        if needed:
            rows = rank_rows(range(self.order.global_sequences), *self.loader.share)
            sums = (
                sum_of_rows(_fed(part), own.start) for part, own in zip(batch, rows, strict=True)
            )
            total = sum(sums) & MASK
        counts = self.grid.tp.rank == 0 and self.grid.coordinate.pp == 0
        return flags_of(total, counts)

    def score(
        self, engine: Engine, progress: Callable[[], None] = lambda: None
    ) -> tuple[HeldOutFacts, ...]:
        """Score every held-out set with the weights of `engine`; collective.

        Rank 0 knows the losses by subset, too. `progress` is called after each batch.
        """
        return tuple(self._score(loader, engine, progress) for loader in self.held_out)

    def _score(
        self, loader: HeldOutLoader, engine: Engine, progress: Callable[[], None]
    ) -> HeldOutFacts:
        losses: list[RowLoss] = []
        # With masks every rank counts the targets.
        needed = engine.needs_batch or loader.set.manifest.has_masks
        every = loader.set.manifest.sequence_length - 1
        for index, batch in enumerate(loader.batches):
            parts = self._read_agreed(
                partial(loader.read, index), loader, loader.opens(index), needed
            )
            on_device = [part.to(self.grid.device) for part in parts]
            sums = engine.row_losses(on_device, batch.num_microbatches).tolist()
            targets = (parts[0].row_targets if parts else None) or [every] * len(batch.rows)
            # What was filled up does not count.
            losses += map(RowLoss, sums[: len(batch.rows)], targets)
            progress()
        return held_out_facts(loader.set, losses, self._row_subsets.get(loader.set.name, []))

    def close(self) -> None:
        """Stop the loader's threads."""
        self.loader.close()
        for loader in self.held_out:
            loader.close()

    def _agree(
        self,
        problem: DataError | UnavailableError | None,
        loader: Loader | HeldOutLoader,
        opens: str,
    ) -> None:
        """Raise the first rank's problem on every rank, or that they do not read the same file."""
        mine = problem if isinstance(problem, UnavailableError) else str(problem or "")
        try:
            first = self._agreement.first(mine, "agree on a chunk")
        except UnavailableError as error:
            raise UnavailableChunkError(str(error)) from None
        if first is not None:
            raise DamagedChunkError(first[1])

        # One rank of a machine hashed the file. The others must have opened that one.
        marks = self._agreement.to_first(_marks(file_system_view(), loader.identity(opens)))
        rank = self._agreement.from_first(_apart(marks.tolist()), _RANK, "agree on a chunk")
        if rank is not None:
            raise UnavailableChunkError(
                f"{opens}: rank {rank} opened another file than a rank beside it; the chunk was "
                "exchanged at that moment; stop whatever writes to the data, then start the same "
                "command again"
            )

    def _read_agreed(
        self,
        read: Callable[[], list[MicroBatch]],
        loader: Loader | HeldOutLoader,
        opens: str,
        needed: bool,
    ) -> list[MicroBatch]:
        """`read` from `loader`; `opens` is the name of a chunk that it opens here, "" for none."""
        problem: DataError | UnavailableError | None = None
        batch = list[MicroBatch]()
        try:
            # Read even if the batch is not needed: this rank may verify chunks for its machine.
            if opens or needed:
                batch = read()
        except (DataError, UnavailableError) as error:
            # A world of one leaves together with itself.
            if not opens and self.grid.layout.world_size > 1:
                raise
            problem = error

        if opens or problem is not None:
            self._agree(problem, loader, opens)
        return batch


def _marks(view: str, opened: ChunkIdentity | None) -> torch.Tensor:
    """Marks int64 [4] of what a rank sees, and of the content of its files; 0 for none."""
    files = (None,) * 3 if opened is None or not view else opened
    parts = [repr(view), *("" if file is None else repr(file.content) for file in files)]
    return torch.tensor(
        [
            int.from_bytes(sha256(part.encode()).digest()[:7], "little") + 1 if part else 0
            for part in parts
        ]
    )


def _apart(marks: Sequence[Sequence[int]]) -> int | None:
    """Lowest rank that opened another file than the first rank of its machine; None if none did."""
    known: dict[int, Sequence[int]] = {}
    for rank, (view, *opened) in enumerate(marks):
        # A rank may need fewer of the files than another.
        first = known.setdefault(view, opened) if opened[0] else opened
        if any(mine not in (0, other) for mine, other in zip(first, opened, strict=True)):
            return rank
    return None
