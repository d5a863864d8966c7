"""Per-rank batches of the training steps and of the held-out chunk, on the device.

- If any rank finds a damaged chunk, all ranks raise the same error. A rank that left alone would
  leave the others waiting in their next collective.
- The ranks therefore exchange their errors wherever a chunk is opened.

Alternatives considered:
- Exchanging errors at every step: within a verified chunk there is nothing to agree on.
"""

from collections.abc import Callable
from functools import partial

from k2train.data.loader import Loader, MicroBatch, Share
from k2train.errors import DataError
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.train.engine import Engine
from k2train.train.preflight import Start


class DamagedChunkError(DataError):
    """A chunk is damaged; raised on every rank alike, so all of them can leave together."""


class BatchSource:
    """Batches of one rank. With `verify`, this rank verifies chunks for its machine."""

    def __init__(self, start: Start, grid: ProcessGrid, verify: bool):
        config = start.setup.config
        self.grid, self.order, self._agreement = grid, start.order, Agreement(grid)
        self._max_held_out_batches = config.data.held_out_batches
        self.loader = Loader(
            start.manifest,
            start.order,
            Share(grid.dp.rank, grid.dp.size, config.batch.micro_sequences),
            config.model.vocab_size,
            verify=verify,
            documents=start.setup.block,
        )

    def step(self, step: int, first: bool, needed: bool) -> list[MicroBatch]:
        """Micro-batches of this rank for one step; empty if not `needed`.

        `first` marks the first step of this start. Collective where a chunk is opened.
        Raises DamagedChunkError where a chunk is opened, DataError for damage found later by one
        rank.
        """
        opens = first or self.order.position(step).step_in_chunk == 0
        return self._read_agreed(partial(self.loader.step, step), opens, needed)

    def held_out_loss(self, engine: Engine) -> float | None:
        """Mean loss over the held-out chunk (nats per target); None when the data has none.

        Collective.
        """
        batches = self.loader.num_held_out_batches()
        batches = (
            batches
            if self._max_held_out_batches is None
            else min(batches, self._max_held_out_batches)
        )

        losses = []
        for index in range(batches):
            batch = self._read_agreed(
                partial(self.loader.held_out, index), index == 0, engine.needs_batch
            )
            losses.append(engine.evaluate(batch))
        return sum(losses) / batches if batches else None

    def close(self) -> None:
        """Stop the loader's threads."""
        self.loader.close()

    def _read_agreed(
        self, read: Callable[[], list[MicroBatch]], opens: bool, needed: bool
    ) -> list[MicroBatch]:
        problem, batch = "", list[MicroBatch]()
        try:
            # Read even if the batch is not needed: this rank may verify chunks for its machine.
            if opens or needed:
                batch = read()
        except DataError as error:
            # A world of one leaves together with itself.
            if not opens and self.grid.layout.world_size > 1:
                raise
            problem = str(error)

        if (opens or problem) and (
            first := self._agreement.first(problem, "agree on a chunk")
        ) is not None:
            raise DamagedChunkError(first[1])
        return [part.to(self.grid.device) for part in batch]
