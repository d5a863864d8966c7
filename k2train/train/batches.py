"""Per-rank batches of the training steps and of the held-out chunk, on the device.

- If any rank finds a damaged chunk, all ranks raise the same error. A rank that left alone would
  leave the others waiting in their next collective.
- The ranks therefore exchange their errors wherever a chunk is opened.

Alternatives considered:
- Exchanging errors at every step: within a verified chunk there is nothing to agree on.
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from k2train.config.load import Config
from k2train.data.loader import Batch, Loader
from k2train.errors import DataError
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.grid import ProcessGrid
from k2train.train.engine import Engine
from k2train.train.preflight import Start


class BatchSource:
    """Batches of one rank.

    `before_raising` is called on every rank before an error about a damaged chunk is raised.
    """

    def __init__(
        self,
        config: Config,
        grid: ProcessGrid,
        start: Start,
        verify: bool,
        before_raising: Callable[[], None],
    ):
        self.grid, self.order, self._before_raising = grid, start.order, before_raising
        self._max_held_out_batches = config.data.held_out_batches
        self.loader = Loader(
            start.manifest,
            start.order,
            grid.dp.rank,
            grid.dp.size,
            config.batch.micro_sequences,
            config.model.vocab_size,
            verify=verify,
            documents=config.data.cross_documents == "block",
        )

    def step(self, step: int, first: bool, needed: bool) -> Batch:
        """Micro-batches of this rank for one step; empty if not `needed`.

        `first` marks the first step of this start. Collective where a chunk is opened.
        Raises DataError when a chunk is damaged, on every rank alike where a chunk is opened.
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
            losses.append(engine.evaluate(batch.tokens, batch.documents))
        return sum(losses) / batches if batches else None

    def close(self) -> None:
        """Stop the loader's threads."""
        self.loader.close()

    def _read_agreed(self, read: Callable[[], Batch], opens: bool, needed: bool) -> Batch:
        problem, batch = "", Batch([])
        try:
            # Read even if the batch is not needed: this rank may verify chunks for its machine.
            if opens or needed:
                batch = read()
        except DataError as error:
            if not opens:
                raise
            problem = str(error)

        if opens:
            problems: list[str] = [""] * self.grid.layout.world_size
            with collective_scope(self.grid.comm, "agree on a chunk"):
                dist.all_gather_object(problems, problem, group=self.grid.host)
            if any(problems):
                # All ranks leave together, so the save of the previous chunk can still finish.
                self._before_raising()
                raise DataError(next(text for text in problems if text))
        return batch.to(self.grid.device)
