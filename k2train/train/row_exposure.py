"""Loss of every row of a training step, summed up by subset for the metrics, or kept in a file.

- The last stage hands over the losses that the step computes anyway. Each row's sum is shared by a
  collective of its own: the sums that the step decides by stay as they are, to the bit.
- Each row is of one rank, and the others add exact zeros. So every rank has the same numbers, on
  every layout.
- Rank 0 knows which row is of which subset, from the provenance. It is read in a thread, a chunk
  ahead. Without it there are no losses by subset, and the reason is told once.
- A row that holds documents of several subsets counts as `several subsets`; a preparation makes
  none.

Alternatives considered:
- In the step's one exchange: the length of a vector decides how it is cut and added among three
  ranks or more, so the last bits of the gradient norm would depend on this key.
- Reading the subsets on every rank, and sharing the sums by subset: as many readers as ranks, for a
  smaller message.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from k2train.data.inspect.provenance import subset_of_rows
from k2train.data.order import ChunkOrder
from k2train.data.trace.row_losses import append_losses
from k2train.errors import UnavailableError, UserError
from k2train.parallel.collectives import all_reduce
from k2train.parallel.comm_tracker import wait_scope
from k2train.plan.schedule import Op
from k2train.train.engine import Engine
from k2train.train.preflight import Start
from k2train.train.run_logger import RunLogger

SubsetLosses = dict[str, tuple[int, float]]
"""Tokens and mean loss (nats a target) by subset."""


class RowExposure:
    """Records the loss of rows, where the config asks for it: `begin` and `end` around a step."""

    def __init__(self, start: Start, engine: Engine, logger: RunLogger):
        audit = start.setup.config.audit
        self.start, self.engine, self.logger = start, engine, logger
        self.by_subset, self.by_row = audit.subset_losses, audit.row_losses
        self.on = self.by_subset or self.by_row
        self._subsets = _SubsetReader(start, logger) if engine.grid.rank == 0 else None
        self._kept: list[Tensor] = []
        self._step = 0
        self._chunk, self._rows = "", range(0)
        self._targets: Sequence[int] = ()
        """Targets of each row of the step."""

        last = engine.stages.get(engine.grid.layout.num_stages - 1)
        if self.on and last is not None:
            last.keep_losses = self._keep

    def begin(self, order: ChunkOrder, step: int, row_targets: Sequence[int] | None) -> None:
        """Expect the losses of a step, and read the subsets of its chunk and the next one.

        `row_targets` as in a `MicroBatch`.
        """
        self._kept.clear()
        if not self.on:
            return
        position = order.position(step)
        self._step, self._chunk, self._rows = step, position.name, order.rows_of(step)
        every = self.start.manifest.sequence_length - 1
        self._targets = row_targets or [every] * len(self._rows)
        if self._subsets is not None and self.by_subset:
            self._subsets.prefetch(order.names[position.order_index : position.order_index + 2])

    def end(self) -> SubsetLosses | None:
        """Return loss and tokens by subset on rank 0, and write the losses of rows; collective."""
        if not self.on:
            return None
        losses = self._shared()
        if self._subsets is None:
            return None
        if self.by_row:
            self._write(losses)
        names = self._subsets.of(self._chunk, self._rows) if self.by_subset else []
        length = self.start.manifest.sequence_length
        return by_subset(losses, self._targets, names, length) if names else None

    def _keep(self, losses: Tensor) -> None:
        self._kept.append(losses.sum(dim=0, dtype=torch.float64))

    def _shared(self) -> list[float]:
        """Sum of the loss of each row of the step, in order, on every rank; collective."""
        grid = self.engine.grid
        share = len(self._rows) // grid.dp.size
        rows = torch.zeros(grid.dp.size, share, dtype=torch.float64, device=grid.device)
        if self._kept:
            self._keep_last_computation(share)
            # Multiplied by 0, not left out: see `Engine._run`.
            mine = torch.cat(self._in_order()) * float(grid.tp.rank == 0)
            assert len(mine) == share, f"losses of {len(mine)} rows, this rank has {share}"
            rows[grid.dp.rank] = mine

        all_reduce(rows, grid.stage)
        all_reduce(rows, grid.pp)
        with wait_scope(grid.comm, "the device"):
            found: list[float] = rows.flatten().tolist()
        return found

    def _keep_last_computation(self, rows: int) -> None:
        """Leave out what an earlier computation of the step kept, which a recheck repeats."""
        counted = 0
        for first in reversed(range(len(self._kept))):
            counted += len(self._kept[first])
            if counted >= rows:
                del self._kept[:first]
                return

    def _in_order(self) -> list[Tensor]:
        """The kept losses in the order of the rows: a schedule may have another."""
        last = self.engine.grid.layout.num_stages - 1
        ran = [a.microbatch for a in self.engine.program if a.op is Op.FORWARD and a.stage == last]
        calls = len(self._kept) // max(1, len(ran))
        order = sorted(range(len(ran)), key=lambda i: ran[i])
        return [self._kept[i * calls + k] for i in order for k in range(calls)]

    def _write(self, losses: Sequence[float]) -> None:
        try:
            append_losses(self.start.directory, self.logger.attempt, self._step, losses)
        except OSError as error:
            # A fact less: no part of the run depends on it.
            self.by_row = False
            self.logger.info(f"audit.row_losses: not written any more: {error.strerror}")


def by_subset(
    losses: Sequence[float], targets: Sequence[int], names: Sequence[str], length: int
) -> SubsetLosses:
    """Sum up the losses of rows of `length` tokens, with their targets, by their subsets' names."""
    parts: dict[str, list[tuple[float, int]]] = {}
    for name, loss, count in zip(names, losses, targets, strict=True):
        parts.setdefault(name, []).append((loss, count))
    return {
        name: (
            len(part) * length,
            _sum([loss for loss, _ in part]) / sum(count for _, count in part),
        )
        for name, part in sorted(parts.items())
    }


def _sum(losses: Sequence[float]) -> float:
    # `fsum` is exact, and refuses to add what is not finite.
    return math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)


class _SubsetReader:
    """Subsets of the rows of chunks, read ahead in a thread."""

    def __init__(self, start: Start, logger: RunLogger):
        self._manifest, self._logger = start.manifest, logger
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="k2train-subsets")
        self._chunks: dict[str, Future[list[str]]] = {}
        self._told = False

    def prefetch(self, names: Sequence[str]) -> None:
        """Read these chunks, and forget all others."""
        for name in set(self._chunks) - set(names):
            del self._chunks[name]
        for name in names:
            if name not in self._chunks:
                self._chunks[name] = self._thread.submit(self._read, name)

    def of(self, chunk: str, rows: range) -> list[str]:
        """Subset of each of the rows; none, and a line that says why, where it is not known."""
        try:
            return self._chunks[chunk].result()[rows.start : rows.stop]
        except (UserError, UnavailableError, OSError) as error:
            if not self._told:
                self._logger.info(f"audit.subset_losses: no loss by subset: {error}")
            self._told = True
            return []

    def _read(self, name: str) -> list[str]:
        info = self._manifest.chunk(name)
        return subset_of_rows(self._manifest, info, info.rows)
